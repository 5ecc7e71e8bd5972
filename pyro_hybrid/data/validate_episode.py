"""Checks of an episode that may have been put together by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots, require_shots
from pyro_hybrid.data.validate import (
    check_clocks,
    check_times,
    require_measured,
    require_same_kind,
)
from pyro_hybrid.errors import fail, require, require_floating

__all__ = ["check_episode"]


def check_episode(episode: object) -> Episode:
    """Check a batch that may have been put together by hand, and put zeros where nothing was observed."""
    if not isinstance(episode, Episode):
        fail(
            "an Episode",
            type(episode).__name__,
            "Pass tasks.episode(), or ph.Episode(None, shots) for shots without a support.",
            TypeError,
        )
    query = _check_shots("query", episode.query)
    support = episode.support
    if support is None:
        return episode if query is episode.query else replace(episode, query=query)
    support = _check_shots("support", support)
    num_tasks = query.shape[0]
    require(
        support.values is not None and support.shape[0] == num_tasks,
        f"a support of the same {num_tasks} tasks",
        f"one of {support.shape[0]}" + (" without values" if support.values is None else ""),
        "Condition each task on trajectories of its own.",
    )
    if query is episode.query and support is episode.support:
        return episode
    return replace(episode, support=support, query=query)


def _check_shots(role: str, shots: Shots) -> Shots:
    require_shots(shots, f"the {role} of an episode")
    num_tasks, num_shots = shots.shape
    require(
        num_tasks > 0 and num_shots > 0,
        f"a {role} of one task and one shot or more",
        f"{num_tasks} and {num_shots}",
        "Pass at least one task with one shot.",
    )
    require_floating("times", shots.times)
    check_clocks(shots.times, (num_tasks, num_shots, shots.times.shape[-1]))
    check_times(shots.times)
    is_used = shots.scored | shots.observed
    if shots.initial is not None:
        _check_part("initial", shots.initial, shots, None)
    if shots.inputs is not None:
        _check_part("inputs", shots.inputs, shots, None)
    values = shots.values
    if values is None:
        return shots
    _check_part(role, values, shots, is_used)
    num_times = shots.times.shape[-1]
    require(
        values.dim() == 4 and values.shape[2] == num_times,
        f"a {role} (task, shot, time, sensor) of {num_times} times",
        tuple(values.shape),
        "Give one value for each time; swap axes if time isn't the third.",
    )
    for name, mask in (("observed", shots.observed), ("scored", shots.scored)):
        require(
            mask.dtype == torch.bool and mask.shape == values.shape,
            f"{name}, a boolean tensor of the values' shape {tuple(values.shape)}",
            f"{mask.dtype} of shape {tuple(mask.shape)}",
            "Build shots with ph.Shots.from_tensors.",
        )
    if bool(torch.isfinite(values).all()):
        return shots
    return replace(shots, values=values.where(is_used, 0.0))


def _check_part(name: str, part: Tensor, shots: Shots, is_used: Tensor | None) -> None:
    require_floating(name, part)
    require_same_kind("times", shots.times, name, part)
    require_measured(name, part, is_used)
    require(
        part.shape[:2] == shots.shape,
        f"{name} of {shots.shape[0]} tasks and {shots.shape[1]} shots, as the masks",
        tuple(part.shape),
        "Give every part of an episode the same tasks and shots.",
    )
