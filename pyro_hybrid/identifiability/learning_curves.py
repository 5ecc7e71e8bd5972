"""How many are enough: what is recovered against the number of tasks and of shots, and how many more it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import require
from pyro_hybrid.evidence.gauss_newton import Program
from pyro_hybrid.identifiability.task_beliefs import names_of, read
from pyro_hybrid.scores.mcc import mcc

__all__ = ["Curve", "how_many", "shots_curve", "tasks_curve"]


class Curve(NamedTuple):
    """Agreement with the truth, up to a linear map, against a number of tasks or shots.

    Attributes:
        of: what was counted, ``tasks`` or ``shots``.
        names: the true latents.
        sizes: how many there were.
        linear_r: linear R of each true latent, ``(size, latent)``.
        interval: its 95% interval, ``(size, latent, 2)``.
        strong: strong MCC, ``(size,)``.
        threshold: n·k + 1, the number of supports that the theorem counts; None for shots.
    """

    of: Literal["tasks", "shots"]
    names: list[str]
    sizes: list[int]
    linear_r: np.ndarray
    interval: np.ndarray
    strong: np.ndarray
    threshold: int | None


def tasks_curve(
    train: Callable[[Tasks], Program],
    tasks: Tasks,
    held_out: Tasks,
    sizes: Sequence[int],
    *,
    progress: bool = True,
) -> Curve:
    """Train on the first so many tasks, again and again, and compare what is read of held-out ones with their truth.

    Arguments:
        train: from tasks to a trained model.
        tasks: to train on.
        held_out: tasks whose truth is known.
        sizes: numbers of tasks, rising.
        progress: show a progress bar.
    """
    require(
        bool(sizes)
        and list(sizes) == sorted(set(sizes))
        and 2 <= sizes[0]
        and sizes[-1] <= len(tasks),
        f"rising sizes from 2 to {len(tasks)}",
        list(sizes),
        "Simulate more tasks, or ask for fewer.",
    )
    _require_truth(held_out)
    bar = tqdm(
        sizes,
        desc="training on more and more tasks",
        unit="training",
        leave=False,
        disable=not progress,
    )
    models = (train(tasks[:size]) for size in bar)
    scores, terms = zip(
        *(_score(model, held_out, held_out.num_support) for model in models), strict=True
    )
    return _curve("tasks", held_out, list(sizes), scores, terms[-1] + 1)


def shots_curve(
    model: Program, held_out: Tasks, sizes: Sequence[int] | None = None, *, progress: bool = True
) -> Curve:
    """Read held-out tasks from supports of more and more shots, with one model.

    Arguments:
        model: the trained program.
        held_out: tasks whose truth is known.
        sizes: numbers of shots, rising; by default 1, 2, 4, ... as far as the tasks go.
        progress: show a progress bar.
    """
    most = held_out.values.shape[1]
    sizes = [2**i for i in range(int(math.log2(most)) + 1)] if sizes is None else list(sizes)
    require(
        bool(sizes) and sizes == sorted(set(sizes)) and 1 <= sizes[0] and sizes[-1] <= most,
        f"rising sizes from 1 to {most}",
        sizes,
        "Record more shots, or ask for fewer.",
    )
    _require_truth(held_out)
    bar = tqdm(
        sizes,
        desc="reading from more and more shots",
        unit="reading",
        leave=False,
        disable=not progress,
    )
    scores = [_score(model, held_out, size)[0] for size in bar]
    return _curve("shots", held_out, sizes, scores, None)


def _require_truth(tasks: Tasks) -> None:
    require(
        tasks.true_latents is not None,
        "held-out tasks with truth",
        "none",
        "Pass true_latents= to Tasks.from_trajectories, or simulate.",
    )


def _score(
    model: Program, tasks: Tasks, shots: int
) -> tuple[tuple[np.ndarray, np.ndarray, float], int]:
    """Linear R, its interval and strong MCC of what is read from so many shots; and how many numbers λ has."""
    truth = tasks.true_latents or {}
    reading = read(model, tasks, shots=shots, progress=False)
    estimate = reading.constrained(reading.coordinates()[0][0])
    score = mcc(estimate, torch.cat([value.double() for value in truth.values()], -1))
    interval = np.stack([score.low.linear_r, score.high.linear_r], -1)
    return (score.linear_r, interval, score.strong), len(reading.terms)


def _curve(
    of: Literal["tasks", "shots"],
    held_out: Tasks,
    sizes: list[int],
    scores: Sequence[tuple[np.ndarray, np.ndarray, float]],
    threshold: int | None,
) -> Curve:
    truth: dict[str, Tensor] = dict(held_out.true_latents or {})
    linear_r, interval, strong = (np.stack(part) for part in zip(*scores, strict=True))
    return Curve(
        of,
        names_of({name: value.shape[-1] for name, value in truth.items()}),
        sizes,
        linear_r,
        interval,
        strong,
        threshold,
    )


def how_many(curve: Curve, target: float = 0.95) -> int | None:
    r"""How many tasks or shots it takes until every latent's linear R reaches a target, by the curve's own trend.

    .. math:: 1 - R^2 \approx c \, N^{-a}

    fitted to the worst latent where it has begun to fall. None where it doesn't fall: more of the same won't do.

    Arguments:
        curve: what :func:`tasks_curve` or :func:`shots_curve` measured.
        target: linear R to be reached.

    >>> sizes = np.array([10, 100, 1000])
    >>> r = np.sqrt(1 - 5.0 / sizes)[:, None]
    >>> how_many(Curve("tasks", ["z"], sizes.tolist(), r, np.stack([r, r], -1), r[:, 0], 3), 0.999)
    2502
    """
    require(
        0.0 < target < 1.0,
        "a target between 0 and 1",
        target,
        "Linear R of 1 takes infinitely many.",
    )
    missing = np.maximum(1.0 - curve.linear_r.min(1) ** 2, 1e-12)
    reached = [
        size for size, gap in zip(curve.sizes, missing, strict=True) if gap <= 1.0 - target**2
    ]
    if reached:
        return reached[0]
    begun = [i for i in range(len(missing)) if missing[i] < 0.9]
    if len(begun) < 2:
        return None
    slope, offset = np.polyfit(np.log(np.array(curve.sizes)[begun]), np.log(missing[begun]), 1)
    if slope > -0.05:
        return None
    return max(
        math.ceil(math.exp((math.log(1.0 - target**2) - offset) / slope)), curve.sizes[-1] + 1
    )
