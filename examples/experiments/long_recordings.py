"""Long recordings of pendulums, cut into pieces with a clock among their states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.dynamics.slopes import Field
from pyro_hybrid.nets.hybrid_field import Force
from pyro_hybrid.shapes import State
from pyro_hybrid.systems import Pendulum

__all__ = ["Clocked", "cut", "with_clock"]

CLOCK = 1e-3  # standard deviation of a clock


class Clocked(Pendulum):
    """A pendulum whose clock is part of its state, so that a piece of a recording is a trajectory like any other.

    The push depends on the time since it was first pushed, and not since the piece began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noise, self.start_noise = (*self.noise, CLOCK), (*self.start_noise, CLOCK)
        self.names = (*self.names, "clock")

    def known(self, physics: Mapping[str, Tensor], force: Force) -> Field:
        rate = physics["omega"] ** 2

        def field(t: Tensor, state: State) -> State:
            angle, speed, clock = state
            return speed, force(clock, angle, speed) - rate * angle.sin(), torch.ones_like(clock)

        return field


def with_clock(tasks: Tasks, clock: Tensor | float = 0.0) -> Tasks:
    """Add a clock to the sensors, which is observed but doesn't count in the likelihood.

    ``clock`` is its value at the start of each trajectory, a number or (task, shot).
    """
    shape = (*tasks.values.shape[:3], 1)
    start = torch.as_tensor(clock, dtype=tasks.values.dtype).expand(shape[:2])
    values = torch.cat([tasks.values, (start.unsqueeze(-1) + tasks.times).unsqueeze(-1)], -1)
    clocked = Tasks.from_trajectories(
        tasks.times,
        values,
        initial=values,
        num_support=tasks.num_support,
        true_latents=tasks.true_latents,
    )
    is_sensor = torch.tensor([True] * tasks.values.shape[-1] + [False])
    return replace(clocked, scored=clocked.scored & is_sensor)


def cut(long: Tasks, pieces: int) -> Tasks:
    """Cut trajectories of one shot a task into pieces, half of them support."""
    points = len(long.times) // pieces
    values = long.values[:, 0, : pieces * points].unflatten(1, (pieces, points))
    tasks = Tasks.from_trajectories(
        long.times[:points],
        values,
        initial=values,
        num_support=pieces // 2,
        true_latents=long.true_latents,
    )
    return with_clock(tasks, long.times[: pieces * points : points])
