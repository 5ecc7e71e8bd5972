"""The loss of one batch and its gradients, without the tasks that fail."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.segments import select_segments, to_segments, truncate
from pyro_hybrid.dynamics.modes import nan_on_failure
from pyro_hybrid.dynamics.failures import SolverError
from pyro_hybrid.training.guards import ElboTerms, NonFiniteTasks, seeded
from pyro_hybrid.training.schedule import Length
from pyro_hybrid.training.svi import SVI

__all__ = ["Batch", "BatchLoss", "Evaluation", "sampled_segments", "shortened"]

NUMERICAL_ERRORS = (
    SolverError,
    ValueError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
)


@dataclass(frozen=True)
class Batch:
    """The tasks of one step: their numbers in the data set, and their trajectories."""

    step: int
    tasks: Tensor
    episode: Episode


class Evaluation(NamedTuple):
    """The loss of a batch; its gradients are on the parameters.

    Attributes:
        loss: of the batch; NaN if it failed.
        log_likelihood: the part of the observed sites.
        episode: what was looked at.
        failed_tasks: numbers of the tasks that were left out, or whose failure made the loss fail.
        failure: the last error of a solver or of a density, in words.
    """

    loss: float
    log_likelihood: float
    episode: Episode
    failed_tasks: tuple[int, ...] = ()
    failure: str = ""


@dataclass(frozen=True)
class BatchLoss:
    """Evaluate the loss of batches, robustly.

    Arguments:
        svi: computes the loss.
        seed: of the random numbers.
        segments_per_shot: number of segments of each shot to look at; None for all.
    """

    svi: SVI
    seed: int
    segments_per_shot: int | None

    def __call__(self, batch: Batch, kl_weight: float) -> Evaluation:
        """Return the loss of a batch, without those of its tasks that fail, if others don't."""
        evaluation = self._evaluate(batch, kl_weight)
        if math.isfinite(evaluation.loss):
            return evaluation
        failed = self._failed_tasks(batch)
        numbers = tuple(batch.tasks[failed].tolist())
        if failed.any() and not failed.all():
            kept = (~failed).nonzero().squeeze(-1)
            second = self._evaluate(batch, kl_weight, kept)
            evaluation = second._replace(failure=second.failure or evaluation.failure)
        return evaluation._replace(failed_tasks=numbers)

    def _evaluate(self, batch: Batch, kl_weight: float, kept: Tensor | None = None) -> Evaluation:
        with self._drawn(batch) as (episode, share):
            if kept is not None:
                episode = episode.select_tasks(kept)
            terms = ElboTerms(kl_weight, 1.0 / share, episode.query.shape[1])
            with terms:
                loss, failure = self._loss(episode, checked=batch.step == 0)
        numbers = batch.tasks if kept is None else batch.tasks[kept]
        log_likelihood = terms.log_likelihood / self.svi.num_particles
        return Evaluation(
            loss, log_likelihood, episode, failure=_with_task_numbers(failure, numbers)
        )

    @contextlib.contextmanager
    def _drawn(self, batch: Batch) -> Iterator[tuple[Episode, float]]:
        """Seed the random numbers of a step; yield what is looked at of its episode, and its share."""
        with seeded(self.seed, batch.step):
            yield sampled_segments(batch.episode, self.segments_per_shot)

    def _loss(self, episode: Episode, *, checked: bool) -> tuple[float, str]:
        """Return the loss, or NaN and the error where the numbers are wrong and not the program."""
        try:
            with pyro.validation_enabled(checked):
                return float(self.svi.backward(episode)), ""
        except NUMERICAL_ERRORS as error:
            failure: Exception = error
        if isinstance(failure, ValueError):
            is_of_the_program = not checked or math.isfinite(self._loss(episode, checked=False)[0])
            if is_of_the_program:
                raise failure
        return math.nan, str(failure).partition("\n")[0]

    def _failed_tasks(self, batch: Batch) -> Tensor:
        """Return a mask of the tasks whose densities aren't finite."""
        with (
            self._drawn(batch) as (episode, _),
            NonFiniteTasks(episode.query.shape[0]) as tasks,
            nan_on_failure(),
            pyro.validation_enabled(False),
            contextlib.suppress(*NUMERICAL_ERRORS),
        ):
            self.svi.evaluate_loss(episode)
        return tasks.failed


def shortened(episode: Episode, length: Length) -> Episode:
    """Cut an episode as a curriculum says: to a horizon, and into segments."""
    segment, horizon = length if isinstance(length, tuple) else (length, None)
    if horizon is not None:
        episode = episode.map_shots(lambda shots: truncate(shots, horizon))
    return episode.map_shots(lambda shots: to_segments(shots, segment))


def sampled_segments(episode: Episode, per_shot: int | None) -> tuple[Episode, float]:
    """Draw segments of an episode that was cut; return them and their share of all segments."""
    number = episode.query.shape[1]
    num_shots = (episode.query.uncut or episode.query).shape[1]
    if per_shot is None or per_shot * num_shots >= number:
        return episode, 1.0
    chosen = torch.randperm(number)[: per_shot * num_shots]
    sample = replace(episode, query=select_segments(episode.query, chosen))
    return sample, per_shot * num_shots / number


def _with_task_numbers(message: str, numbers: Tensor) -> str:
    """Replace the place of a task in the batch by its number in the data set."""
    return re.sub(
        r"in task (\d+) \(batch index \([^)]*\)\)",
        lambda found: f"in task {numbers[int(found[1])]}",
        message,
    )
