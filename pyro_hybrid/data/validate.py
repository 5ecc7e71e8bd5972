"""What data may be: said loudly, with the number of the task, before they reach a program."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_hybrid.errors import fail, require, require_floating

if TYPE_CHECKING:
    from pyro_hybrid.data.tasks import Episode

__all__ = ["check_trajectories", "checked", "require_measured"]

LARGEST = 1e15  # squares of thousands of these can still be added up in float32
_log = logging.getLogger(__name__)


def check_trajectories(
    times: Tensor, values: Tensor, num_support: int, mask: Tensor | None
) -> None:
    """A data set as it comes from outside."""
    require_floating("times", times)
    require_floating("values", values)
    _alike("times", times, "values", values)
    require(
        values.dim() == 4,
        "values with axes (task, shot, time, sensor)",
        f"{values.dim()} axes",
        "Add the missing axes with unsqueeze, or stack trajectories of equal length.",
    )
    require(
        times.dim() == 1 and len(times) == values.shape[2],
        f"{values.shape[2]} times, as many as values has",
        tuple(times.shape),
        "Pass times of shape (time,); swap axes if time isn't the third.",
    )
    _check_times(times)
    require(
        values.numel() > 0 and len(times) > 1,
        "at least one task, shot, sensor and two times",
        tuple(values.shape),
        "Check how the data were read.",
    )
    if not 1 <= num_support < values.shape[1]:
        fail(
            f"num_support from 1 to {values.shape[1] - 1} (of {values.shape[1]} shots)",
            num_support,
            "The support can't be empty, and the query needs a shot too.",
        )
    if mask is not None:
        require(
            isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == values.shape,
            f"a boolean tensor of shape {tuple(values.shape)} as mask",
            f"{getattr(mask, 'dtype', type(mask).__name__)} of shape {tuple(getattr(mask, 'shape', ()))}",
            "True where an observation counts.",
        )
        seen = mask.flatten(1).any(1)
        require(
            bool(seen.all()),
            "an observation in every task",
            f"none in task {_numbers(~seen)}, which is masked entirely",
            "Drop the task: tasks are rows of values, mask and truth.",
        )
    require_measured("values", values, mask)
    spread = values.amax((1, 2)) - values.amin((1, 2))
    if bool((still := (spread == 0.0).all(-1)).any()):
        _log.warning(
            "Nothing ever changes in task %s. It can be trained on, and says little: is a sensor dead?",
            _numbers(still),
        )


def checked(episode: Episode) -> Episode:
    """A batch that somebody may have put together by hand, with zeros where nothing was seen."""
    tasks, shots = episode.shape
    require(
        tasks > 0 and shots > 0,
        "an episode of one task and one shot or more",
        f"{tasks} and {shots}",
        "An empty query can't be explained, and an empty support says nothing.",
    )
    require_floating("times", episode.times)
    require(
        episode.times.dim() in (1, 2),
        "times of shape (time,) or (shot, time)",
        tuple(episode.times.shape),
        "Give all shots one clock, or each its own.",
    )
    _check_times(episode.times)
    parts = episode.initial if isinstance(episode.initial, tuple) else (episode.initial,)
    named = [
        *(("initial", part) for part in parts),
        *([] if episode.query is None else [("query", episode.query)]),
    ]
    looked_at = (torch.as_tensor(episode.mask) | torch.as_tensor(episode.seen)).to(
        episode.times.device
    )
    for name, part in named:
        require_floating(name, part)
        _alike("times", episode.times, name, part)
        require_measured(name, part, looked_at if name == "query" else None)
        require(
            part.shape[:2] == (tasks, shots),
            f"{name} of {tasks} tasks and {shots} shots, as initial",
            tuple(part.shape),
            "Give every part of an episode the same tasks and shots.",
        )
    if episode.query is not None:
        require(
            episode.query.dim() == 4 and episode.query.shape[2] == episode.times.shape[-1],
            f"a query (task, shot, time, sensor) of {episode.times.shape[-1]} times",
            tuple(episode.query.shape),
            "Give one value for each time; swap axes if time isn't the third.",
        )
    if episode.support is not None:
        require(
            episode.support.query is not None and episode.support.shape[0] == tasks,
            f"a support of the same {tasks} tasks",
            f"one of {episode.support.shape[0]}"
            + (" without trajectories" if episode.support.query is None else ""),
            "Condition each task on trajectories of its own.",
        )
        support = checked(episode.support)
        episode = (
            episode if support is episode.support else replace(episode, support=support)
        )  # beliefs go by identity
    if episode.query is None or bool(torch.isfinite(episode.query).all()):
        return episode
    return replace(episode, query=episode.query.where(looked_at, 0.0))


def require_measured(name: str, value: Tensor, mask: Tensor | None = None) -> None:
    """Every entry that counts must be a number that can be squared; says in which task the first bad one is."""
    bad = ~(value.abs() <= LARGEST) if mask is None else ~(value.abs() <= LARGEST) & mask
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        one, every = value[where].item(), bad.flatten(1).any(1)
        fail(
            f"finite {name}"
            if not abs(one) < float("inf")
            else f"{name} of at most {LARGEST:.0e}, to be squared",
            f"{one:g} at index {where} ({int(bad.sum())} such entries, in task {_numbers(every)})",
            "Drop them, or pass mask= with False where an observation is missing."
            if not abs(one) < float("inf")
            else "Choose a larger unit, or mask what was misread.",
        )


def _check_times(times: Tensor) -> None:
    require(
        bool(torch.isfinite(times).all()),
        "finite times",
        "NaN or Inf",
        "Drop those times and their values.",
    )
    require(
        times.shape[-1] > 1,
        "at least two times",
        times.shape[-1],
        "One time says nothing of a motion.",
    )
    require(
        bool((torch.diff(times) > 0).all()),
        "strictly increasing times",
        "unsorted or duplicate times",
        "Sort the times (and the values with them) and drop duplicates.",
    )


def _alike(name: str, one: Tensor, other_name: str, other: Tensor) -> None:
    require(
        one.dtype == other.dtype,
        f"{name} and {other_name} of one dtype",
        f"{one.dtype} and {other.dtype}",
        "Convert one of them.",
        TypeError,
    )
    require(
        one.device == other.device,
        f"{name} and {other_name} on one device",
        f"{one.device} and {other.device}",
        "Move one of them with .to(device).",
    )


def _numbers(rows: Tensor) -> str:
    """The numbers of the tasks for which something is true."""
    found = rows.nonzero().squeeze(-1).tolist()
    return ", ".join(map(str, found[:5])) + (
        f" and {len(found) - 5} others" if len(found) > 5 else ""
    )
