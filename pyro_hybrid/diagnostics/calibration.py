"""check_calibration -> Calibration: whether the guide is the program's posterior."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.diagnostics import simulate
from pyro_hybrid.diagnostics.ranks import Array, Latent, judge, share
from pyro_hybrid.dynamics.solve import failures_as_values
from pyro_hybrid.errors import require
from pyro_hybrid.evidence.gauss_newton import Program
from pyro_hybrid.identifiability.check import Check, Status, Threshold, judged
from pyro_hybrid.inference.posterior import pareto_k
from pyro_hybrid.programs.module import local_parameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Calibration", "check_calibration"]

RELIABLE, MOST = (
    0.7,
    Threshold(holds=0.8, fails=0.8),
)  # a good k-hat, and in what share of the tasks it should be good
WEIGHED, NAMED = 100, 5  # tasks whose k-hat is looked at, and so many of the bad ones are named
HEAD = "truth inside 50%  80%            95%            z mean    z sd  contraction  verdict"
SAYS = {
    "holds": "calibrated: the guide's draws lie about the truth as they should",
    "fails": "NOT CALIBRATED: the guide isn't the program's posterior",
    "undecided": "undecided: too little was simulated, or looked at, to tell",
    "weights": "NOT THE POSTERIOR: every latent is calibrated, but not all together or not on the real queries (k-hat)",
}


@dataclass(frozen=True)
class Calibration:
    """How posteriors fared on data from the program itself, and how near they come to the exact ones on real data.

    Attributes:
        latents: a row for each latent.
        weights: the check of PSIS k-hat.
        ranks: share of draws below the truth, ``(simulation, latent)``: uniform where the guide is the posterior.
        pareto_k: PSIS k-hat of the real queries, of up to 100 tasks, evenly spaced.
        tasks, num_draws: how many of each.
        diverged: simulations that were left out, their trajectories not being finite.
        seconds: how long it took.
    """

    latents: Sequence[Latent]
    weights: Check
    ranks: Array = field(repr=False)
    pareto_k: Array = field(repr=False)
    tasks: int
    num_draws: int
    diverged: int = 0
    seconds: float = 0.0

    @property
    def verdict(self) -> Status:
        """``holds`` if every latent and the weights do, ``fails`` if one of them does, ``undecided`` otherwise."""
        found = {self.weights.status, *(latent.status for latent in self.latents)}
        return "fails" if "fails" in found else "holds" if found == {"holds"} else "undecided"

    @property
    def says(self) -> str:
        """The verdict in words."""
        every = all(latent.status == "holds" for latent in self.latents)
        return SAYS["weights" if every and self.weights.status == "fails" else self.verdict]

    def __getitem__(self, name: str) -> Latent:
        """One latent's row, by its name."""
        for latent in self.latents:
            if latent.name == name:
                return latent
        raise KeyError(f"{name!r} isn't among {[latent.name for latent in self.latents]}")

    def __str__(self) -> str:
        name = max(6, *(len(latent.name) for latent in self.latents))
        lost = f"; {self.diverged} more diverged and were left out" if self.diverged else ""
        run = (
            f"({len(self.ranks)} simulations of {self.tasks} tasks, {self.num_draws} draws of each{lost}; "
            f"{self.seconds:.0f} s)"
        )
        head = f"{'latent':<{name}}  {HEAD}"
        return "\n".join(
            [
                self.says,
                run,
                "",
                head,
                *(_row(latent, name) for latent in self.latents),
                "",
                f"{'k-hat':<{name}}  {self.weights.status}: {self.weights.why}",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything that was judged, as JSON can hold it."""
        latents = [
            {key: _plain(value) for key, value in latent._asdict().items()}
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
            "pareto_k": _plain(self.pareto_k.tolist()),
        }

    def plot(self) -> Figure:
        """One figure: every latent's ranks in their band, coverage, z-scores, contraction, and k-hat."""
        from pyro_hybrid.diagnostics.plots import calibration

        return calibration(self, RELIABLE)


def _row(latent: Latent, name: int) -> str:
    first, *others = (
        f"{100 * value:.0f} [{100 * low:.0f}, {100 * high:.0f}]"
        for value, (low, high) in zip(latent.coverage, latent.intervals, strict=True)
    )
    inside = f"{first:<16}  " + "  ".join(f"{text:<13}" for text in others)
    says = latent.says.upper() if latent.status == "fails" else latent.says
    return (
        f"{latent.name:<{name}}  {inside}  {latent.z_mean:+6.2f}  {latent.z_sd:6.2f}  {latent.contraction:11.2f}"
        f"  {says}"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_calibration(
    model: Program,
    guide: Program,
    tasks: Tasks,
    *,
    simulations: int = 1000,
    num_draws: int = 999,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    r"""Simulation-based calibration given each task's own support, and PSIS on its real query.

    Again and again latents are drawn from the prior, the program simulates a query with them, the guide explains it:

    .. math:: z \sim p(z \mid S), \qquad x \sim p(x \mid z), \qquad z_1, \dots, z_n \sim q(z \mid S, x)

    If the guide is the program's posterior, the rank of z among its draws is uniform. Support, measured initial states,
    times and masks stay those of the task. Of the latents of shots, those of the first shot are ranked: a task's shots
    aren't independent. What was trained isn't changed.

    It asks whether the guide is right about the *program*. Whether the program is right about the *data*, only data can
    say: :func:`~pyro_hybrid.calibrate` asks them, and what it widens is too wide here.

    References:
        | Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018)
        | https://arxiv.org/abs/1804.06788
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2015)
        | https://arxiv.org/abs/1507.02646

    Arguments:
        model, guide: any Pyro program that observes ``episode.query.values``, and its guide; trained.
        tasks: their supports condition the prior, and importance weights are of their queries. The truth isn't needed.
        simulations: at least so many; as many for one task as for another.
        num_draws: draws of each posterior.
        seed: of everything random; the global random state is left alone.
        progress: show a progress bar where it takes longer than two seconds.
    """
    require(
        isinstance(tasks, Tasks),
        "tasks",
        type(tasks).__name__,
        "It makes their episodes itself.",
        TypeError,
    )
    require(
        simulations >= 2 and num_draws >= 50,
        "simulations of 2 and num_draws of 50 or more",
        f"{simulations} and {num_draws}",
        "The defaults are enough to see standard deviations that are 20% off.",
    )
    began, (model, guide) = time.perf_counter(), _at_rest(model, guide)
    some, looked_at = tasks[_evenly(tasks, simulations)], _evenly(tasks, WEIGHED)
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        torch.no_grad(),
        poutine.block(),
        local_parameters(),
        failures_as_values(),
        pyro.validation_enabled(False),
    ):
        torch.manual_seed(seed)
        scores = simulate.simulations(
            model, guide, some, -(-simulations // len(some)), num_draws, progress
        )
        real = next(simulate.batches(model, tasks[looked_at], WEIGHED))
        k = pareto_k(model, guide, real, num_draws, progress=progress)
    columns = zip(scores.names, scores.rank.T, scores.z.T, scores.contraction.T, strict=True)
    latents = [judge(*column, latents=len(scores.names)) for column in columns]
    return Calibration(
        latents,
        _judge_weights(k, looked_at),
        scores.rank,
        k,
        len(some),
        num_draws,
        scores.diverged,
        time.perf_counter() - began,
    )


def _judge_weights(k: Array, tasks: Tensor) -> Check:
    good, bad = int((k < RELIABLE).sum()), tasks[torch.from_numpy(~(k < RELIABLE))].tolist()
    but = (
        f", but not in {', '.join(map(str, bad[:NAMED]))}{', ...' if len(bad) > NAMED else ''}"
        if bad
        else ""
    )
    why = f"below {RELIABLE} in {good} of {len(k)} tasks{but}; the largest is {k.max():.2f}"
    return judged("k-hat", good / len(k), share(good, len(k)), MOST, why)


def _evenly(tasks: Tasks, most: int) -> Tensor:
    """So many of them, evenly spaced."""
    return torch.linspace(0, len(tasks) - 1, min(most, len(tasks))).round().long()


def _at_rest(*programs: Program) -> list[Any]:
    """Copies that don't train, what they share being shared still."""
    return [
        program.eval() if isinstance(program, nn.Module) else program
        for program in copy.deepcopy(programs)
    ]
