"""The stages of identify: each takes a posterior and returns a new one, with a line that says what it did."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from pyro_hybrid.beliefs.belief import Belief
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.evidence.least_squares import LeastSquares
from pyro_hybrid.evidence.settings import describe
from pyro_hybrid.fitting.networks import find_network, find_noise
from pyro_hybrid.fitting.posterior import Posterior
from pyro_hybrid.fitting.stages import fix_gauge, rescale_intervals
from pyro_hybrid.fitting.verdict import judge
from pyro_hybrid.inference.prior import SupportPrior
from pyro_hybrid.nets.gauge import Gauge
from pyro_hybrid.programs.module import HybridModel, local_parameters
from pyro_hybrid.training.refinement import Refinement
from pyro_hybrid.training.second_order import BatchRecord, Refiner

__all__ = ["STAGES", "Given", "StageFunction"]

MOST_BATCHES = 80
LOOK_EVERY = 4  # batches
LOOKED_AT = 16  # held-out tasks
PATIENCE = 2  # looks without improvement
EARLY = {"prior_sd": 1.0, "forgetting": 0.5}  # what was seen before is soon wrong
LATE = {"prior_sd": 0.1, "forgetting": 0.05}  # batches add up; what they say nothing about stays
LEAST_GAIN = 0.01, 0.002  # of the log density, early and late
READ_AT_ONCE = 20
SAME_COST = 0.02  # of a task's observations: costs that differ by less are the same
FEW = 0.02  # share of tasks that may be read better by more effort


class Given(NamedTuple):
    """What every stage is given beside the posterior.

    Attributes:
        train: the tasks to learn from.
        held_out: those to judge on.
        seed: seed of everything random.
        progress: whether to show progress bars.
    """

    train: Tasks
    held_out: Tasks
    seed: int
    progress: bool


StageFunction = Callable[[Posterior, Given], Posterior]


def fit(posterior: Posterior, given: Given) -> Posterior:
    """Bring weights, noise and population to their optimum by Gauss-Newton over many systems."""
    started = time.perf_counter()
    changed = posterior.copy()
    network = find_network(changed.model)
    if network is None:
        return changed.after("fit", {}, {}, "there is no neural term to train")
    reading = first_reading(given.train)
    settings = Refinement(
        num_steps=MOST_BATCHES,
        evidence=replace(reading, num_iterations=reading.num_iterations // 2),  # takes them twice
        forgetting=EARLY["forgetting"],
        prior_sd=EARLY["prior_sd"],
        outlier_factor=3.0,
        noise=find_noise(changed.model, given.train),
        seed=given.seed,
    )
    if isinstance(changed.model.prior, SupportPrior):
        changed.model.prior.evidence = reading  # encoders know nothing yet
    dtype = next(changed.model.parameters()).dtype
    train = _in_double(changed.model, given.train)
    is_double = train.values.dtype == torch.float64
    held_out = given.held_out.double() if is_double else given.held_out
    before = density(changed.model, held_out, reading)
    refiner = Refiner(changed.model, changed.guide, train, settings, network=network)
    records, looks, is_settled = _run(refiner, train, held_out[:LOOKED_AT], reading, given)
    refiner.finish()
    after = density(changed.model, held_out, reading)
    changed.model.to(dtype)
    changed.guide.to(dtype)
    changed.model.prior.interval_scale.fill_(1.0)
    num_rejected = sum(not record.is_accepted for record in records)
    seconds = time.perf_counter() - started
    numbers = {
        "seconds": seconds,
        "cost": [record.cost for record in records],
        "looks": looks,
        "is_settled": is_settled,
        "num_rejected": num_rejected,
        "held_out": [before, after],
    }
    summary = (
        f"{len(records)} batches of {settings.batch_size} systems, {num_rejected} steps rejected, "
        f"{seconds:.0f} s; log density of a held-out observation {before:.3g} -> {after:.3g}"
    )
    noted = settings._asdict() | {"evidence": describe(settings.evidence)}
    return changed.after("fit", noted, numbers, summary)


def _run(
    refiner: Refiner, train: Tasks, looked_at: Tasks, reading: GaussNewton, given: Given
) -> tuple[list[BatchRecord], list[float], bool]:
    """Take batches until held-out tasks are explained no better: first with a short memory, and then with a long one.

    Returns:
        What happened in each batch, the log density at each look, and whether the end was reached.
    """
    batches = train.numbered_batches(refiner.settings.batch_size, given.seed)
    records: list[BatchRecord] = []
    looks: list[float] = []
    bar = tqdm(
        total=MOST_BATCHES,
        desc="fitting",
        unit="batch",
        disable=not given.progress,
        dynamic_ncols=True,
        leave=False,
    )
    with bar:
        for phase, least_gain in zip((EARLY, LATE), LEAST_GAIN, strict=True):
            refiner.hold(**phase)
            best = looks[-1] if looks else -math.inf
            num_idle = 0
            while num_idle < PATIENCE:
                if len(records) >= MOST_BATCHES:
                    return records, looks, False
                records.append(refiner.step(next(batches)[0]))
                bar.update()
                bar.set_postfix_str(str(records[-1]))
                if len(records) % LOOK_EVERY:
                    continue
                population = refiner.population.belief
                looks.append(density(refiner.model, looked_at, reading, population))
                has_improved = looks[-1] > best + least_gain
                num_idle = 0 if has_improved else num_idle + 1
                best = max(best, looks[-1])
    return records, looks, True


def _in_double(model: HybridModel, tasks: Tasks) -> Tasks:
    """Convert model and tasks to float64, if the program runs in it; derivatives by differences are exact then."""
    dtype = next(model.parameters()).dtype
    precise = tasks.double()
    model.double()
    try:
        with torch.no_grad(), local_parameters():
            problem = LeastSquares(model, precise[:2].shots(), model.prior.population())
            problem.at(problem.mean)
    except (TypeError, RuntimeError):
        model.to(dtype)
        return tasks
    return precise


def first_reading(tasks: Tasks) -> GaussNewton:
    """Return evidence that finds most systems from far away: on short segments first, if states are measured."""
    num_intervals = tasks.times.shape[-1] - 1
    if tasks.states is None or num_intervals < 14:
        return GaussNewton(6)
    length = max(num_intervals // 7, 3)
    return GaussNewton(6, segments=(length, length))


@torch.no_grad()
def density(
    model: HybridModel, tasks: Tasks, evidence: GaussNewton, population: Belief | None = None
) -> float:
    """Return the log density of a typical task's observations at its latents as they are read, per observation."""
    belief = model.prior.population() if population is None else population
    values = []
    with local_parameters():
        for start in range(0, len(tasks), READ_AT_ONCE):
            some = tasks[start : start + READ_AT_ONCE]
            problem = LeastSquares(model, some.shots(), belief)
            iterate = evidence.minimize(problem)
            total = torch.zeros_like(problem.num_observed)
            for site in problem.observe(iterate.task[None], iterate.shot[None]):
                log_prob = site.fn.log_prob(site.value).where(site.mask, 0.0)
                total = total + log_prob.double().reshape(len(some), -1).sum(1)
            values.append(total / problem.num_observed.clamp(min=1.0))
    return float(torch.cat(values).nan_to_num(-torch.inf).median())


def gauge(posterior: Posterior, given: Given) -> Posterior:
    """Credit the physics with all that it explains."""
    if not any(isinstance(part, Gauge) for part in posterior.model.modules()):
        summary = (
            "the model has no gauge, so that the neural term may stand for a part of the physics"
        )
        return posterior.copy().after("gauge", {}, {}, summary)
    changed = fix_gauge(posterior, given.train[:200])
    return Posterior(changed.model, changed.guide, posterior.stages).after(
        "gauge", {}, {}, "the physics is credited with all that it explains"
    )


@torch.no_grad()
def read(posterior: Posterior, given: Given) -> Posterior:
    """Choose as many iterations and restarts for the reading of a system as help."""
    changed = posterior.copy()
    model = changed.model
    first = first_reading(given.train)
    tasks = given.held_out
    problem_of = _problems(model, tasks)
    chosen, costs = first, _costs(problem_of, first)
    shares = []
    for num_iterations, num_restarts in ((12, 0), (12, 4), (20, 8)):
        candidate = replace(first, num_iterations=num_iterations, num_restarts=num_restarts)
        others = _costs(problem_of, candidate)
        is_better = others < costs - SAME_COST * problem_of[0].num_observed.mean()
        shares.append(float(is_better.double().mean()))
        if shares[-1] > FEW:
            chosen, costs = candidate, others
        elif num_restarts:
            break
    if isinstance(model.prior, SupportPrior):
        model.prior.evidence = chosen
        changed.guide.evidence = GaussNewton(2)
    else:
        changed.guide.evidence = chosen
    summary = f"{chosen.num_iterations} iterations, {chosen.num_restarts} restarts"
    numbers = {"read_better": shares}
    return changed.after("read", {"evidence": describe(chosen)}, numbers, summary)


def _problems(model: HybridModel, tasks: Tasks) -> list[LeastSquares]:
    """Pose the problems of some tasks' supports."""
    support = tasks.episode().support
    with local_parameters():
        rows = torch.arange(len(tasks)).split(READ_AT_ONCE)
        return [
            LeastSquares(model, support.select_tasks(some), model.prior.population())
            for some in rows
            if support is not None
        ]


def _costs(problems: list[LeastSquares], evidence: GaussNewton) -> torch.Tensor:
    with local_parameters():
        return torch.cat([evidence.minimize(problem).cost for problem in problems])


def intervals(posterior: Posterior, given: Given) -> Posterior:
    """Scale intervals so that halves of a system's shots agree as often as they should."""
    if not isinstance(posterior.model.prior, SupportPrior):
        return posterior.copy().after("intervals", {}, {}, "the prior reads no support")
    changed = rescale_intervals(posterior, given.train[:200])
    scale = changed.model.prior.interval_scale.tolist()
    summary = f"standard deviations scaled by {min(scale):.2f} to {max(scale):.2f}"
    return Posterior(changed.model, changed.guide, posterior.stages).after(
        "intervals", {}, {"scale": scale}, summary
    )


def judge_fit(posterior: Posterior, given: Given) -> Posterior:
    """Look for signs that the fit failed."""
    verdict = judge(posterior, given.held_out)
    return posterior.copy().after("judge", {}, verdict.to_dict(), verdict.headline)


def certify(posterior: Posterior, given: Given) -> Posterior:
    """Check which latents the data identify."""
    if len(given.train) < 2:
        summary = "one system can't tell which of many descriptions is the true one: record others"
        return posterior.copy().after("certify", {}, {}, summary)
    certificate = posterior.certify(given.train, seed=given.seed, progress=given.progress)
    numbers: dict[str, Any] = {"certificate": certificate.to_dict()}
    return posterior.copy().after("certify", {}, numbers, str(certificate).partition("\n")[0])


STAGES: dict[str, StageFunction] = {
    "fit": fit,
    "gauge": gauge,
    "read": read,
    "intervals": intervals,
    "judge": judge_fit,
    "certify": certify,
}
