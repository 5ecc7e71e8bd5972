"""Check the conditions of the identifiability theorem on a program, its guide and its data."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_hybrid.data.tasks import Tasks, require_tasks
from pyro_hybrid.errors import fail, is_installed, require, require_callable, require_seed
from pyro_hybrid.identifiability.certificate import Certificate
from pyro_hybrid.identifiability.efficiency import judge_efficiency, measure_efficiency
from pyro_hybrid.identifiability.fisher import judge_information, measure_information
from pyro_hybrid.identifiability.fit import judge_misfit, measure_misfit
from pyro_hybrid.identifiability.injectivity import equivalent_latents, judge_equivalent_latents
from pyro_hybrid.identifiability.noise import inspect_noise, judge_noise
from pyro_hybrid.identifiability.statistics import judge_statistics, measure_statistics
from pyro_hybrid.identifiability.task_beliefs import TaskBeliefs, infer_tasks
from pyro_hybrid.identifiability.variability import (
    NAMES,
    judge_too_few_tasks,
    judge_variability,
    measure_variability,
)
from pyro_hybrid.programs.run import Program
from pyro_hybrid.scores.ambiguity import judge_ambiguity, measure_ambiguity
from pyro_hybrid.scores.check import Check
from pyro_hybrid.scores.separability import judge_separability, measure_separability

__all__ = ["certify"]

_T = TypeVar("_T")
INFERRED = 300  # tasks looked at by all checks together
LINEARIZED = 40  # tasks looked at by the checks that solve most
CONSTANT = 1e-2  # share of a population sd below which means are constant
FOLLOWING = 1e-5  # share of a standard deviation that the other latents leave open


def certify(
    model: Program,
    guide: Program,
    tasks: Tasks,
    *,
    restarts: Sequence[Program] = (),
    seed: int = 0,
    progress: bool = True,
) -> Certificate:
    r"""Check if the latents that a program recovers are the only ones, up to a linear map, or some of many.

    The theorem: if :math:`x = F(z) + \varepsilon`, where (i) the characteristic function of :math:`\varepsilon` is
    zero on a null set at most, (ii) F is injective, (iii) the k statistics of each of n latents are linearly
    independent, and (iv) there are :math:`nk + 1` supports whose natural parameters differ in every direction,

    .. math:: L = \bigl(\lambda(S_1) - \lambda(S_0), \dots, \lambda(S_{nk}) - \lambda(S_0)\bigr)
              \;\text{ invertible},

    then a maximum of the ELBO identifies the latents: :math:`T(z) = A\, T(\tilde z) + c`. Each condition is measured,
    with an interval, and holds only with a margin; it fails only on evidence. Model, guide and data are not changed.

    References:
        | Variational Autoencoders and Nonlinear ICA: A Unifying Framework (Khemakhem et al., 2020)
        | https://arxiv.org/abs/1907.04809

    Arguments:
        model, guide: any Pyro program with task-level latents from exponential families, and its guide; trained.
        tasks: the training data. Their true latents, if known, are compared with the recovered ones.
        restarts: models of other trainings, from other seeds, whose latents are compared with the model's.
        seed: of draws and resampling; the global random state is left alone.
        progress: show progress bars.
    """
    _check_arguments(model, guide, tasks, restarts, seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return _certify(model, guide, tasks, restarts, seed, progress)


def _check_arguments(
    model: object, guide: object, tasks: Tasks, restarts: object, seed: object
) -> None:
    require_callable("model", model, "Pass the trained Pyro program: certify(model, guide, tasks).")
    require_callable("guide", guide, "Pass the trained guide: certify(model, guide, tasks).")
    require_tasks(tasks)
    require(
        len(tasks) >= 2,
        "two tasks or more",
        len(tasks),
        "Identifiability is about what differs between systems.",
    )
    if not isinstance(restarts, Sequence):
        fail(
            "restarts to be a list of trained models",
            type(restarts).__name__,
            "Pass restarts=[model], even for one.",
            TypeError,
        )
    for restart in restarts:
        require_callable("each of restarts", restart, "Pass trained models: restarts=[model].")
    require_seed(seed)


class _Measurements:
    """Named measurements, with a progress bar that advances with each."""

    def __init__(self, total: int, progress: bool) -> None:
        self.numbers: dict[str, Any] = {}
        self.bar = tqdm(
            total=total, desc="certify", unit="check", leave=False, disable=not progress
        )

    def take(self, name: str, measure: Callable[[], _T]) -> _T:
        """Run a measurement, and keep its result under a name."""
        self.bar.set_postfix_str(name)
        result = measure()
        self.numbers[name] = result
        self.bar.update()
        return result


def _certify(
    model: Program,
    guide: Program,
    tasks: Tasks,
    restarts: Sequence[Program],
    seed: int,
    progress: bool,
) -> Certificate:
    started = time.perf_counter()
    model, guide, *restarts = _evaluation_copies([model, guide, *restarts])
    sample = _spaced(tasks, INFERRED)
    measurements = _Measurements(9 + len(restarts) + (tasks.true_latents is not None), progress)
    with measurements.bar:
        beliefs = measurements.take(
            "beliefs", lambda: infer_tasks(model, sample, progress=progress)
        )
        conditions = _check_program(model, guide, tasks, beliefs, measurements, seed, progress)
        statistics = measurements.take("statistics", lambda: measure_statistics(beliefs, seed=seed))
        independence = judge_statistics(statistics)
        conditions.append(independence)
        conditions += _check_variability(beliefs, len(tasks), independence, measurements, seed)
        further = _further_checks(model, restarts, sample, beliefs, measurements, seed, progress)
    return Certificate(
        conditions=conditions,
        further=further,
        numbers=measurements.numbers,
        systems=len(tasks),
        shots=beliefs.num_support,
        seconds=time.perf_counter() - started,
    )


def _check_program(
    model: Program,
    guide: Program,
    tasks: Tasks,
    beliefs: TaskBeliefs,
    measurements: _Measurements,
    seed: int,
    progress: bool,
) -> list[Check]:
    """Check noise, fit and injectivity, for which the program is solved."""
    episode = _spaced(_with_query(tasks), LINEARIZED).episode()
    noise = measurements.take("noise", lambda: inspect_noise(model, episode))
    misfit = measurements.take("fit", lambda: measure_misfit(model, guide, episode))
    fisher = measurements.take(
        "fisher", lambda: measure_information(model, guide, episode, beliefs)
    )
    equivalents = measurements.take(
        "equivalent latents",
        lambda: equivalent_latents(model, episode, beliefs, fisher, progress=progress),
    )
    return [
        judge_noise(noise),
        judge_misfit(misfit, seed=seed),
        judge_information(fisher),
        judge_equivalent_latents(equivalents),
    ]


def _check_variability(
    beliefs: TaskBeliefs,
    num_tasks: int,
    independence: Check,
    measurements: _Measurements,
    seed: int,
) -> list[Check]:
    num_terms = len(beliefs.terms)
    if num_tasks <= num_terms:
        return judge_too_few_tasks(num_terms, num_tasks)
    if independence.status == "fails":
        why = "Natural parameters have no meaning unless (iii) holds."
        return [Check.skipped(name, why, "See (iii).") for name in NAMES]
    variability = measurements.take(
        "variability", lambda: measure_variability(beliefs, num_tasks=num_tasks, seed=seed)
    )
    return judge_variability(variability)


def _further_checks(
    model: Program,
    restarts: Sequence[Program],
    tasks: Tasks,
    beliefs: TaskBeliefs,
    measurements: _Measurements,
    seed: int,
    progress: bool,
) -> list[Check]:
    """Check what the theorem leaves open; with too few tasks for any statistics, nothing."""
    latents = beliefs.constrained(beliefs.mean[0])
    others = _latents_to_compare_with(restarts, tasks, progress)
    widest = max([latents.shape[1], *(other.shape[1] for other in others.values())])
    varies = beliefs.mean[0].std(0) > CONSTANT * beliefs.population_sd
    if len(tasks) < 4 * (widest + 1) or not bool(varies.all()):
        why = "There are too few tasks, or a recovered latent is the same in all of them."
        names = ("residual ambiguity", "separability", "efficiency")
        return [Check.skipped(name, why, "Pass more tasks.") for name in names]
    checks = _check_ambiguity(latents, others, measurements, seed)
    checks.append(_check_separability(latents, measurements, seed, progress))
    efficiency = measurements.take(
        "efficiency",
        lambda: measure_efficiency(
            model, tasks, beliefs, true_latents=tasks.true_latents, seed=seed
        ),
    )
    return [*checks, judge_efficiency(efficiency)]


def _latents_to_compare_with(
    restarts: Sequence[Program], tasks: Tasks, progress: bool
) -> dict[str, Tensor]:
    others = {}
    for number, restart in enumerate(restarts, start=1):
        beliefs = infer_tasks(restart, tasks, progress=progress)
        others[f"against restart {number}"] = beliefs.constrained(beliefs.mean[0])
    if tasks.true_latents is not None:
        true_latents = [value.double() for value in tasks.true_latents.values()]
        others["against the truth"] = torch.cat(true_latents, -1)
    return others


def _check_ambiguity(
    latents: Tensor, others: dict[str, Tensor], measurements: _Measurements, seed: int
) -> list[Check]:
    checks = []
    for name, other in others.items():
        condition = f"ambiguity {name}"
        if _varies(other):
            ambiguity = measurements.take(name, _ambiguity_between(latents, other, seed))
            checks.append(judge_ambiguity(ambiguity)._replace(condition=condition))
        else:
            why = "A latent of the other side is the same in all systems."
            checks.append(Check.skipped(condition, why))
    if checks:
        return checks
    why = "There are no other latents to compare with."
    remedy = "Train again from another seed, and pass restarts=[model]."
    return [Check.skipped("residual ambiguity", why, remedy)]


def _ambiguity_between(latents: Tensor, other: Tensor, seed: int) -> Callable[[], Any]:
    return lambda: measure_ambiguity(latents, other, seed=seed)


def _check_separability(
    latents: Tensor, measurements: _Measurements, seed: int, progress: bool
) -> Check:
    if not is_installed("sklearn"):
        why = "The check needs the module sklearn, which is not installed."
        remedy = "Install it: pip install 'pyro_hybrid[ica]'."
        return Check.skipped("separability", why, remedy)
    standard = (latents - latents.mean(0)) / latents.std(0)
    smallest = float(torch.linalg.svdvals(standard)[-1])
    if smallest < FOLLOWING * len(standard) ** 0.5:
        why = "Some of the recovered latents are functions of the others."
        return Check.skipped("separability", why, "See (ii).")
    separability = measurements.take(
        "separability", lambda: measure_separability(latents, seed=seed, progress=progress)
    )
    return judge_separability(separability)


def _varies(values: Tensor) -> bool:
    return bool((values.std(0) > 1e-6 * values.abs().amax(0)).all())


def _spaced(tasks: Tasks, most: int) -> Tasks:
    """Return all tasks, or evenly spaced ones if there are more than ``most``."""
    if len(tasks) <= most:
        return tasks
    return tasks[torch.linspace(0, len(tasks) - 1, most).long()]


def _with_query(tasks: Tasks) -> Tasks:
    """Return the tasks that have observations beside their support."""
    has_query = tasks.scored[:, tasks.num_support :].flatten(1).any(1)
    require(
        bool(has_query.any()),
        "systems with observations beside their support",
        "none",
        "Take fewer shots into the support, or record more.",
    )
    return tasks[has_query]


def _evaluation_copies(programs: Iterable[Program]) -> list[Any]:
    """Return copies on the CPU in evaluation mode; parts that programs share stay shared."""
    copies = copy.deepcopy(list(programs))
    return [
        program.cpu().eval() if isinstance(program, nn.Module) else program for program in copies
    ]
