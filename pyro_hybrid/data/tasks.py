"""Tasks: a data set of many systems, with a few trajectories of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.data.validate import (
    check_initial,
    check_latents,
    check_rows,
    check_trajectories,
    require_integer,
    require_measured,
)
from pyro_hybrid.errors import require
from pyro_hybrid.shapes import Mask, Times, Trajectories

__all__ = ["Tasks"]


@dataclass(frozen=True, eq=False)
class Tasks:
    """Hold a data set: many systems, a few trajectories of each. Build one with :meth:`from_trajectories`.

    Arguments:
        times: ``(time,)``.
        values: ``(task, shot, time, sensor)``, with zeros where nothing was observed.
        observed: True where a value was measured, in the values' shape.
        scored: True where a value counts in the likelihood, in the values' shape.
        num_support: number of a task's shots that condition its prior.
        initial: measured states at the first time, ``(task, shot, component)``, or None.
        states: measured states at all times, ``(task, shot, time, component)``, or None.
        inputs: known controls, ``(task, shot, time, input)``, or None.
        true_latents: the latents by name if they are known, ``(task, component)`` each, or None.
    """

    times: Times
    values: Trajectories
    observed: Mask
    scored: Mask
    num_support: int
    initial: Tensor | None = None
    states: Tensor | None = None
    inputs: Tensor | None = None
    true_latents: Mapping[str, Tensor] | None = None

    @classmethod
    def from_trajectories(
        cls,
        times: Times,
        values: Trajectories,
        *,
        num_support: int,
        initial: Tensor | None = None,
        observed: Mask | None = None,
        true_latents: Mapping[str, Tensor] | None = None,
    ) -> Tasks:
        """Check trajectories and make them tasks.

        Arguments:
            times: ``(time,)``, strictly increasing.
            values: ``(task, shot, time, sensor)``.
            num_support: number of a task's shots that condition its prior; the others are to be explained.
            initial: the states at the first time, ``(task, shot, component)``; or the measured states at all times,
                ``(task, shot, time, component)``, where segments can start. By default the sensors are the state's
                components, and the first value is the measurement of the initial state: it is then not scored.
            observed: ``(task, shot, time, sensor)``, False where a value is missing.
            true_latents: the latents where they are known, ``{"omega": (task, component), ...}``.
        """
        check_trajectories(times, values, num_support, observed)
        check_latents(true_latents, len(values))
        states = _states_with_gaps(values, observed) if initial is None else initial
        check_initial(states, values)
        is_complete = states.dim() == 4
        if is_complete and observed is not None:
            states = _fill_gaps(times, states)
        require_measured("initial", states)
        if observed is None:
            observed = torch.ones_like(values, dtype=torch.bool)
        scored = observed
        if is_complete:  # the first observation has become the initial state
            scored = observed.clone()
            scored[:, :, 0] = False
        return cls(
            times,
            values.where(observed, 0.0),
            observed,
            scored,
            num_support,
            initial=states[:, :, 0] if is_complete else states,
            states=states if is_complete else None,
            true_latents=true_latents,
        )

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Tensor) -> Tasks:
        """Select some of the tasks."""
        check_rows(rows)

        def select(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows]

        true_latents = None
        if self.true_latents is not None:
            true_latents = {name: value[rows] for name, value in self.true_latents.items()}
        return replace(
            self,
            values=self.values[rows],
            observed=self.observed[rows],
            scored=self.scored[rows],
            initial=select(self.initial),
            states=select(self.states),
            inputs=select(self.inputs),
            true_latents=true_latents,
        )

    def split(self, n: int) -> tuple[Tasks, Tasks]:
        """Separate the last ``n`` tasks from those before them."""
        require_integer("the number of tasks to split off", n)
        require(
            0 < n < len(self),
            f"a split from 1 to {len(self) - 1}",
            n,
            "Simulate more tasks or hold out fewer.",
        )
        return self[: len(self) - n], self[len(self) - n :]

    def episode(self, num_support: int | None = None) -> Episode:
        """All tasks as one batch: the first shots are the support, the others the query."""
        size = self.num_support if num_support is None else num_support
        require_integer("num_support", size)
        most = self.values.shape[1] - 1
        require(
            1 <= size <= most,
            f"num_support from 1 to {most}",
            size,
            "Leave at least one shot to each side.",
        )
        return Episode(self.shots(slice(0, size)), self.shots(slice(size, None)))

    def batches(self, size: int, seed: int) -> Iterator[Episode]:
        """Yield batches without end: tasks in random order, with a new random choice of support shots every time."""
        return (episode for _, episode in self.numbered_batches(size, seed))

    def numbered_batches(
        self, size: int, seed: int, start: int = 0
    ) -> Iterator[tuple[Tensor, Episode]]:
        """Yield the same batches from number ``start`` on, each with the indices of its tasks."""
        require_integer("the size of a batch", size)
        require(size >= 1, "a batch of 1 task or more", size, "Pass a positive integer.")
        generator = torch.Generator().manual_seed(seed)
        num_shots = self.values.shape[1]
        size = min(size, len(self))
        number = 0
        while True:
            order = torch.randperm(len(self), generator=generator)
            for rows in order[: len(order) // size * size].split(size):
                roles = torch.rand(size, num_shots, generator=generator).argsort(1)
                if number >= start:
                    yield rows, self[rows]._random_episode(roles.to(self.values.device))
                number += 1

    def _random_episode(self, roles: Tensor) -> Episode:
        """Assign shots to support and query by their order in ``roles`` (task, shot)."""
        shots = self.shots()
        return Episode(
            shots.select_shots(roles[:, : self.num_support]),
            shots.select_shots(roles[:, self.num_support :]),
        )

    def shots(self, which: slice = slice(None)) -> Shots:
        """Select some shots of every task."""
        check_rows(which)

        def select(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[:, which]

        return Shots(
            self.times,
            self.values[:, which],
            select(self.initial),
            self.observed[:, which],
            self.scored[:, which],
            inputs=select(self.inputs),
            states=select(self.states),
        )


def _states_with_gaps(values: Tensor, observed: Tensor | None) -> Tensor:
    return values if observed is None else values.where(observed, torch.nan)


def _fill_gaps(times: Tensor, states: Tensor) -> Tensor:
    """Interpolate missing states linearly in time, because segments may have to start there."""
    trailing = [1] * (states.dim() - 3)
    last = len(times) - 1
    is_known = torch.isfinite(states)
    index = torch.arange(last + 1, device=times.device).view(-1, *trailing)
    before = index.where(is_known, -1).cummax(2).values
    after = index.where(is_known, last + 1).flip(2).cummin(2).values.flip(2)
    start = before.where(before >= 0, after).clamp(max=last)
    end = after.where(after <= last, before).clamp(min=0)
    known = states.where(is_known, 0.0)
    gap = times[end] - times[start]
    share = (times.view(-1, *trailing) - times[start]) / gap.where(gap > 0.0, 1.0)
    share = share.where(gap > 0.0, 0.0)
    return torch.lerp(known.gather(2, start), known.gather(2, end), share)
