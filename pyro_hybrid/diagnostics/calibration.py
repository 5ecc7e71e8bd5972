"""Check if the guide is the program's posterior, by simulation and by importance weights."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_hybrid.data.tasks import Tasks, require_tasks
from pyro_hybrid.diagnostics.ranks import Array, LatentCalibration, judge_ranks
from pyro_hybrid.diagnostics.simulate import episodes_of, simulate_and_rank
from pyro_hybrid.dynamics.modes import nan_on_failure
from pyro_hybrid.errors import require_callable, require_integer, require_seed
from pyro_hybrid.inference.importance import RELIABLE_K, ParetoK, pareto_k
from pyro_hybrid.programs.module import local_parameters
from pyro_hybrid.programs.run import Program
from pyro_hybrid.scores.check import Check, Status, Threshold, proportion_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HEADLINES", "CalibrationReport", "check_calibration"]

RELIABLE = Threshold(holds=0.8, fails=0.8)  # share of the tasks whose weights are reliable
WEIGHED = 100  # tasks whose weights are looked at
NAMED = 5  # unreliable tasks that are named
COLUMNS = "truth inside 50%  80%            95%            z mean    z sd  contraction  verdict"
HEADLINES: dict[Status, str] = {
    "holds": "Calibrated: the guide's draws lie around the truth as they should.",
    "fails": "NOT CALIBRATED: the guide is not the program's posterior.",
    "undecided": "Undecided: there were too few simulations, or too few tasks, to tell.",
}
WEIGHTS_HEADLINE = (
    "NOT THE POSTERIOR: each latent is calibrated by itself, but the weights of the guide's draws on the real "
    "queries are not reliable."
)


@dataclass(frozen=True)
class CalibrationReport:
    """Calibration of a guide on data from the program itself, and its distance from the exact posterior on real data.

    Attributes:
        latents: a row for each latent.
        weights: the check of the importance weights.
        ranks: share of draws below the truth, ``(simulation, latent)``: uniform where the guide is the posterior.
        pareto_k: diagnostics of importance weights on the real queries, of up to 100 tasks, evenly spaced.
        tasks, num_draws: number of tasks, and of draws from each posterior.
        diverged: number of simulations that were left out because their trajectories were not finite.
        seconds: duration.
    """

    latents: Sequence[LatentCalibration]
    weights: Check
    ranks: Array = field(repr=False)
    pareto_k: ParetoK = field(repr=False)
    tasks: int
    num_draws: int
    diverged: int = 0
    seconds: float = 0.0

    @property
    def verdict(self) -> Status:
        """``holds`` if the weights and all latents do, ``fails`` if one of them does, ``undecided`` otherwise."""
        statuses = {self.weights.status, *(latent.status for latent in self.latents)}
        if "fails" in statuses:
            return "fails"
        return "holds" if statuses == {"holds"} else "undecided"

    @property
    def headline(self) -> str:
        """The verdict as a sentence."""
        latents_hold = all(latent.status == "holds" for latent in self.latents)
        if latents_hold and self.weights.status == "fails":
            return WEIGHTS_HEADLINE
        return HEADLINES[self.verdict]

    def __getitem__(self, name: str) -> LatentCalibration:
        """Return one latent's row."""
        for latent in self.latents:
            if latent.name == name:
                return latent
        raise KeyError(f"{name!r} isn't among {[latent.name for latent in self.latents]}")

    def __str__(self) -> str:
        width = max(7, *(len(latent.name) for latent in self.latents))
        left_out = f"; {self.diverged} more diverged and were left out" if self.diverged else ""
        settings = (
            f"({len(self.ranks)} simulations of {self.tasks} tasks, {self.num_draws} draws of each{left_out}; "
            f"{self.seconds:.0f} s)"
        )
        lines = [self.headline, settings, "", f"{'latent':<{width}}  {COLUMNS}"]
        lines += [_row(latent, width) for latent in self.latents]
        lines += ["", f"{'weights':<{width}}  {self.weights.status}: {self.weights.why}"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return all verdicts and their reasons as JSON holds them."""
        latents = [
            {key: _to_json(value) for key, value in latent._asdict().items()}
            for latent in self.latents
        ]
        return {
            "verdict": self.verdict,
            "simulations": len(self.ranks),
            "tasks": self.tasks,
            "num_draws": self.num_draws,
            "diverged": self.diverged,
            "seconds": round(self.seconds, 1),
            "latents": latents,
            "weights": self.weights.to_dict(),
            "pareto_k": _to_json(self.pareto_k.k_hat.tolist()),
            "relative_ess": _to_json(self.pareto_k.relative_ess.tolist()),
        }

    def plot(self) -> Figure:
        """Draw all latents' ranks in their band, coverage, z-scores, contraction, and k-hat."""
        from pyro_hybrid.diagnostics.plots import plot_calibration  # imports matplotlib

        return plot_calibration(self)


def _row(latent: LatentCalibration, width: int) -> str:
    cells = [
        f"{100 * value:.0f} [{100 * low:.0f}, {100 * high:.0f}]"
        for value, (low, high) in zip(latent.coverage, latent.intervals, strict=True)
    ]
    inside = f"{cells[0]:<16}  " + "  ".join(f"{cell:<13}" for cell in cells[1:])
    finding = latent.finding.upper() if latent.status == "fails" else latent.finding
    return (
        f"{latent.name:<{width}}  {inside}  {latent.z_mean:+6.2f}  {latent.z_sd:6.2f}  {latent.contraction:11.2f}"
        f"  {finding}"
    )


def _to_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    is_number = not isinstance(value, float) or math.isfinite(value)
    return value if is_number else None


def check_calibration(
    model: Program,
    guide: Program,
    tasks: Tasks,
    *,
    simulations: int = 1000,
    num_draws: int = 999,
    seed: int = 0,
    progress: bool = True,
) -> CalibrationReport:
    r"""Check a guide by simulation-based calibration given each task's own support, and by PSIS on its real query.

    Latents are drawn from the prior, the program simulates a query with them, and the guide explains it, many times:

    .. math:: z \sim p(z \mid S), \qquad x \sim p(x \mid z), \qquad z_1, \dots, z_n \sim q(z \mid S, x)

    If the guide is the program's posterior, the rank of z among its draws is uniform. Support, measured initial states,
    times and masks stay those of the task. Of the latents of shots, those of the first shot are ranked: a task's shots
    are not independent. Model, guide and data are not changed.

    On the real queries, draws are weighted by :math:`p(x, z \mid S) / q(z \mid S, x)`. A task's weights are reliable
    where PSIS k-hat is below 0.7. It counts as 0 where the effective sample size is 0.999 of the draws or more: weights
    that are nearly equal have no tail that k-hat could describe.

    The question is if the guide is right about the *program*. Only data can show if the program is right about the
    *data*: :func:`~pyro_hybrid.rescale_intervals` asks them, and intervals that it widens are too wide here.

    References:
        | Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018)
        | https://arxiv.org/abs/1804.06788
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2015)
        | https://arxiv.org/abs/1507.02646

    Arguments:
        model, guide: any Pyro program that observes ``episode.query.values``, and its guide; trained.
        tasks: their supports condition the prior, and importance weights are of their queries. The truth is not needed.
        simulations: least number of simulations; every task is simulated equally often.
        num_draws: draws of each posterior.
        seed: of everything random; the global random state is left alone.
        progress: show a progress bar if it takes longer than two seconds.
    """
    _check_arguments(model, guide, tasks)
    remedy = "The defaults are enough to see standard deviations that are 20% off."
    require_integer("simulations", simulations, 2, remedy)
    require_integer("num_draws", num_draws, 50, remedy)
    require_seed(seed)
    started = time.perf_counter()
    model, guide = _evaluation_copies([model, guide])
    simulated = tasks[_spaced(tasks, simulations)]
    repeats = -(-simulations // len(simulated))
    weighed = _spaced(tasks, WEIGHED)
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        torch.no_grad(),
        poutine.block(),
        local_parameters(),
        nan_on_failure(),
        pyro.validation_enabled(False),
    ):
        torch.manual_seed(seed)
        scores = simulate_and_rank(model, guide, simulated, repeats, num_draws, progress)
        real = next(episodes_of(model, tasks[weighed], WEIGHED))
        weights = pareto_k(model, guide, real, num_draws, progress=progress)
    columns = zip(scores.names, scores.rank.T, scores.z.T, scores.contraction.T, strict=True)
    return CalibrationReport(
        latents=[judge_ranks(*column, num_latents=len(scores.names)) for column in columns],
        weights=judge_weights(weights, weighed.tolist()),
        ranks=scores.rank,
        pareto_k=weights,
        tasks=len(simulated),
        num_draws=num_draws,
        diverged=scores.num_diverged,
        seconds=time.perf_counter() - started,
    )


def _check_arguments(model: object, guide: object, tasks: object) -> None:
    call = "check_calibration(model, guide, tasks)"
    require_callable("model", model, f"Pass the trained Pyro program: {call}.")
    require_callable("guide", guide, f"Pass the trained guide: {call}.")
    require_tasks(tasks)


def judge_weights(weights: ParetoK, tasks: Sequence[int]) -> Check:
    """Judge the share of tasks whose importance weights are reliable.

    Arguments:
        weights: result of :func:`~pyro_hybrid.pareto_k`.
        tasks: numbers of the tasks that they are of.
    """
    total = len(weights.k_hat)
    num_reliable = int(weights.is_reliable.sum())
    others = [task for task, good in zip(tasks, weights.is_reliable, strict=True) if not good]
    exceptions = ""
    if others:
        named = ", ".join(map(str, others[:NAMED]))
        exceptions = f", but not in {named}{', ...' if len(others) > NAMED else ''}"
    why = (
        f"The weights of the guide's draws are reliable (k-hat below {RELIABLE_K}) in {num_reliable} of {total} "
        f"tasks{exceptions}. Largest k-hat: {weights.k_hat.max():.2f}; smallest effective sample size: "
        f"{weights.relative_ess.min():.3g} of the draws."
    )
    interval = proportion_interval(num_reliable, total)
    return Check.from_interval("weights", num_reliable / total, interval, RELIABLE, why)


def _spaced(tasks: Tasks, most: int) -> Tensor:
    """Return the numbers of all tasks, or of evenly spaced ones if there are more than ``most``."""
    return torch.linspace(0, len(tasks) - 1, min(most, len(tasks))).round().long()


def _evaluation_copies(programs: Iterable[Program]) -> list[Any]:
    """Return copies in evaluation mode; parts that programs share stay shared."""
    copies = copy.deepcopy(list(programs))
    return [program.eval() if isinstance(program, nn.Module) else program for program in copies]
