"""Measure recovery against the number of tasks and of shots, and extrapolate how many are required."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hybrid.data.tasks import Tasks, require_tasks
from pyro_hybrid.errors import require, require_callable
from pyro_hybrid.identifiability.task_beliefs import infer_tasks, latent_names
from pyro_hybrid.programs.run import Program
from pyro_hybrid.scores.arrays import Array
from pyro_hybrid.scores.mcc import mcc

__all__ = ["LearningCurve", "required_size", "shots_curve", "tasks_curve"]

BEGUN = 0.9  # unexplained variance below which a latent has begun to be recovered
SLOWEST = -0.05  # slope above which 1 - R² does not fall


class LearningCurve(NamedTuple):
    """Agreement with the truth, up to a linear map, against a number of tasks or shots.

    Attributes:
        of: unit of the sizes, ``tasks`` or ``shots``.
        names: the true latents.
        sizes: numbers of tasks or shots.
        linear_r: linear R of each true latent, ``(size, latent)``.
        interval: its 95% interval, ``(size, latent, 2)``.
        strong: strong MCC, ``(size,)``.
        threshold: n·k + 1, the number of supports that the theorem counts; None for shots.
    """

    of: Literal["tasks", "shots"]
    names: list[str]
    sizes: list[int]
    linear_r: Array
    interval: Array
    strong: Array
    threshold: int | None


class _Recovery(NamedTuple):
    """Point of a curve, and the number of natural parameters."""

    linear_r: Array
    interval: Array
    strong: float
    num_terms: int


def tasks_curve(
    train: Callable[[Tasks], Program],
    tasks: Tasks,
    held_out: Tasks,
    sizes: Sequence[int],
    *,
    progress: bool = True,
) -> LearningCurve:
    """Train on more and more tasks, and compare the inferred latents of held-out tasks with the truth.

    Arguments:
        train: maps tasks to a trained model.
        tasks: to train on; the first ``size`` of them are used.
        held_out: tasks whose truth is known.
        sizes: ascending numbers of tasks.
        progress: show a progress bar.
    """
    require_callable("train", train, "Pass a function from tasks to a trained model.")
    require_tasks(tasks)
    _require_truth(held_out)
    _require_sizes(sizes, 2, len(tasks), "Simulate more tasks, or ask for fewer.")
    bar = tqdm(
        sizes,
        desc="training on more and more tasks",
        unit="training",
        leave=False,
        disable=not progress,
    )
    points = [_recovery(train(tasks[:size]), held_out, held_out.num_support) for size in bar]
    return _curve("tasks", held_out, sizes, points, points[-1].num_terms + 1)


def shots_curve(
    model: Program, held_out: Tasks, sizes: Sequence[int] | None = None, *, progress: bool = True
) -> LearningCurve:
    """Infer held-out tasks from supports of more and more shots, with one model.

    Arguments:
        model: the trained program.
        held_out: tasks whose truth is known.
        sizes: ascending numbers of shots; by default 1, 2, 4, ... as far as the tasks go.
        progress: show a progress bar.
    """
    require_callable("model", model, "Pass the trained program.")
    _require_truth(held_out)
    most = held_out.values.shape[1]
    if sizes is None:
        sizes = [2**i for i in range(int(math.log2(most)) + 1)]
    _require_sizes(sizes, 1, most, "Record more shots, or ask for fewer.")
    bar = tqdm(
        sizes,
        desc="inferring from more and more shots",
        unit="support",
        leave=False,
        disable=not progress,
    )
    points = [_recovery(model, held_out, size) for size in bar]
    return _curve("shots", held_out, sizes, points, None)


def _require_truth(held_out: Tasks) -> None:
    require_tasks(held_out, "held_out")
    require(
        held_out.true_latents is not None,
        "held-out tasks with truth",
        "none",
        "Pass true_latents= to Tasks.from_trajectories, or simulate.",
    )


def _require_sizes(sizes: Sequence[int], least: int, most: int, remedy: str) -> None:
    is_whole = all(isinstance(size, Integral) for size in sizes)
    is_ascending = bool(sizes) and list(sizes) == sorted(set(sizes))
    require(
        is_whole and is_ascending and least <= sizes[0] and sizes[-1] <= most,
        f"ascending whole numbers from {least} to {most} as sizes",
        list(sizes),
        remedy,
    )


def _recovery(model: Program, tasks: Tasks, num_support: int) -> _Recovery:
    beliefs = infer_tasks(model, tasks, num_support=num_support, progress=False)
    estimate = beliefs.constrained(beliefs.mean[0])
    score = mcc(estimate, torch.cat([value.double() for value in _truth(tasks).values()], -1))
    interval = np.stack([score.low.linear_r, score.high.linear_r], -1)
    return _Recovery(score.linear_r, interval, score.strong, len(beliefs.terms))


def _truth(tasks: Tasks) -> dict[str, Tensor]:
    return dict(tasks.true_latents or {})


def _curve(
    of: Literal["tasks", "shots"],
    held_out: Tasks,
    sizes: Sequence[int],
    points: Sequence[_Recovery],
    threshold: int | None,
) -> LearningCurve:
    return LearningCurve(
        of=of,
        names=latent_names({name: value.shape[-1] for name, value in _truth(held_out).items()}),
        sizes=list(sizes),
        linear_r=np.stack([point.linear_r for point in points]),
        interval=np.stack([point.interval for point in points]),
        strong=np.array([point.strong for point in points]),
        threshold=threshold,
    )


def required_size(curve: LearningCurve, target: float = 0.95) -> int | None:
    r"""Extrapolate the number of tasks or shots at which every latent's linear R reaches a target.

    .. math:: 1 - R^2 \approx c \, N^{-a}

    This trend is fitted to the worst latent where it has begun to fall. The result is None where it does not fall: more
    of the same would not help.

    Arguments:
        curve: result of :func:`tasks_curve` or :func:`shots_curve`.
        target: linear R to be reached.

    >>> sizes = np.array([10, 100, 1000])
    >>> r = np.sqrt(1 - 5.0 / sizes)[:, None]
    >>> required_size(LearningCurve("tasks", ["z"], sizes.tolist(), r, np.stack([r, r], -1), r[:, 0], 3), 0.999)
    2502
    """
    require(
        0.0 < target < 1.0,
        "a target between 0 and 1",
        target,
        "Linear R of 1 takes infinitely many.",
    )
    wanted = 1.0 - target**2
    unexplained = np.maximum(1.0 - curve.linear_r.min(1) ** 2, 1e-12)
    for size, share in zip(curve.sizes, unexplained, strict=True):
        if share <= wanted:
            return size
    has_begun = unexplained < BEGUN
    if has_begun.sum() < 2:
        return None
    log_sizes = np.log(np.array(curve.sizes)[has_begun])
    slope, offset = np.polyfit(log_sizes, np.log(unexplained[has_begun]), 1)
    if slope > SLOWEST:
        return None
    extrapolated = math.exp((math.log(wanted) - offset) / slope)
    return max(math.ceil(extrapolated), curve.sizes[-1] + 1)
