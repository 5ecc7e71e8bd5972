"""Tasks and shots whose values say where they came from, for tests of the data."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from pyro_hybrid import Episode, Shots, Tasks
from pyro_hybrid.data.segments import to_segments

T, SHOTS, POINTS, SENSORS = 4, 5, 11, 2
TIMES = torch.linspace(0.0, 2.0, POINTS)


def numbered(
    tasks: int = T, shots: int = SHOTS, points: int = POINTS, sensors: int = SENSORS
) -> Tensor:
    """Values that say where they came from."""
    return torch.arange(float(tasks * shots * points * sensors)).view(tasks, shots, points, sensors)


def make(values: Tensor | None = None, **options: Any) -> Tasks:
    values = numbered() if values is None else values
    return Tasks.from_trajectories(TIMES[: values.shape[2]], values, **{"num_support": 2} | options)


def tensors(episode: Episode | Shots | None) -> dict[str, Tensor]:
    """Everything in an episode, by path."""
    if episode is None:
        return {}
    out: dict[str, Tensor] = {}
    for f in fields(episode):
        value = getattr(episode, f.name)
        if isinstance(value, Shots):
            out |= {f"{f.name}.{name}": inner for name, inner in tensors(value).items()}
        elif isinstance(value, Tensor):
            out[f.name] = value
    return out


def assert_same(a: Episode | Shots, b: Episode | Shots) -> None:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def whole_episode(masked: bool = False, points: int = POINTS) -> Episode:
    values = numbered(points=points)
    observed = torch.rand(values.shape) < 0.8 if masked else None
    return make(values, observed=observed).episode()


def whole_shots(masked: bool = False, points: int = POINTS) -> Shots:
    return whole_episode(masked, points).query


def cut(episode: Episode, num_intervals: int | None) -> Episode:
    return episode.map_shots(lambda shots: to_segments(shots, num_intervals))
