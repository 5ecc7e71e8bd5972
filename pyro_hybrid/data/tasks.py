"""Tasks, a data set of many systems, and Episode, one batch of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import pyro
import torch
from torch import Tensor

from pyro_hybrid.data.validate import check_trajectories, require_measured
from pyro_hybrid.errors import fail, require, require_floating
from pyro_hybrid.shapes import State, Times, Trajectories

__all__ = ["Episode", "Tasks"]


_T = TypeVar("_T")


def _over(state: State, change: Callable[[Tensor], Tensor]) -> State:
    return tuple(change(part) for part in state) if isinstance(state, tuple) else change(state)


@dataclass(frozen=True, eq=False)
class Episode:
    """Trajectories of a batch of tasks, to be explained, and the support that conditions the prior.

    The support is an episode itself, of the same tasks, without a support of its own: a program can be run on either.

    Arguments:
        times: ``(time,)``, or ``(shot, time)`` where each shot has its own clock.
        query: ``(task, shot, time, sensor)``; None to simulate.
        initial: the state at the first time, as measured: a tuple of ``(task, shot)``, or ``(task, shot, component)``.
        support: the episode of the support shots, or None.
        mask: True where an observation counts, False where it doesn't; or True for all.
        seen: True where a value was observed at all: what an encoder may read.
        states: measured states at all times, from which :meth:`cut` takes restart states; or None.
        whole: the trajectories from beginning to end, which encoders read; None where these are they.
        uncut: what this episode was cut from, or None.
    """

    times: Times
    query: Trajectories | None
    initial: State
    support: Episode | None = None
    mask: Tensor | bool = True
    seen: Tensor | bool = True
    states: State | None = None
    whole: Episode | None = field(default=None, repr=False)
    uncut: Episode | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of tasks and of shots."""
        first = self.initial[0] if isinstance(self.initial, tuple) else self.initial[..., 0]
        return first.shape[0], first.shape[1]

    @property
    def measured(self) -> Tensor:
        """The initial state as one tensor, ``(task, shot, component)``."""
        return torch.stack(self.initial, -1) if isinstance(self.initial, tuple) else self.initial

    @property
    def plate(self) -> pyro.plate:
        """Tasks are independent: ``with episode.plate: ...``."""
        return pyro.plate("task", self.shape[0], dim=-1)

    @cached_property
    def canonical(self) -> Episode:
        """The same shots in an order that depends on their values alone: what makes the prior exactly invariant."""
        whole = self.whole or self
        if whole.query is None or whole.query.shape[1] == 1 or whole.times.dim() == 2:
            return self
        if (
            self.times.dim() == 2 and self.uncut is None
        ):  # some segments: only what encoders read has an order
            return replace(self, whole=whole.canonical)
        values = whole.query.double().flatten(2)
        # Unequal weights: of trajectories that conserve something, the plain sums are equal.
        key = (
            (values * torch.arange(1, values.shape[-1] + 1, device=values.device).sqrt())
            .sum(-1)
            .argsort(1)
        )
        pieces = torch.arange(self.shape[1] // key.shape[1], device=key.device)
        order = (key.unsqueeze(-1) * len(pieces) + pieces).flatten(1)
        return replace(
            self._picked(order),
            whole=self.whole and self.whole.canonical,
            uncut=self.uncut and self.uncut.canonical,
        )

    def pick(self, order: Tensor) -> Episode:
        """Shots by index ``(task, shot)``, for each task its own."""
        require(
            self.times.dim() == 1,
            "one clock for all shots",
            "a clock for each shot",
            "Pick shots before cutting.",
        )
        return self._picked(order)

    def _picked(self, order: Tensor) -> Episode:
        def take(value: Tensor) -> Tensor:
            index = order.reshape(*order.shape, *[1] * (value.dim() - 2)).expand(
                -1, -1, *value.shape[2:]
            )
            return value.gather(1, index)

        return self._changed(take)

    def only(self, task: int | Tensor) -> Episode:
        """One task of them, or several by index, as an episode."""
        rows = torch.as_tensor(task).reshape(-1)
        require(
            bool(((rows >= 0) & (rows < self.shape[0])).all()),
            f"a task from 0 to {self.shape[0] - 1}",
            task,
            "Count tasks from 0.",
        )
        return self._changed(
            lambda value: value[rows.to(value.device)], lambda episode: episode.only(rows)
        )

    def to(self, device: torch.device | str) -> Episode:
        """The same episode on another device."""
        return self._changed(
            lambda value: value.to(device),
            lambda episode: episode.to(device),
            self.times.to(device),
        )

    def double(self) -> Episode:
        """The same episode in float64."""
        return self._changed(
            lambda value: value.double() if value.is_floating_point() else value,
            lambda episode: episode.double(),
            self.times.double(),
        )

    def simulation(self) -> Episode:
        """The same initial states and support, with nothing observed."""
        return replace(self, query=None, mask=True)

    def until(self, steps: int) -> Episode:
        """The first ``steps`` steps alone; encoders go on reading the whole trajectories."""
        require(steps >= 1, "1 step or more", steps, "Leave at least two times.")
        if steps >= self.times.shape[-1] - 1:
            return self
        begun = self._changed(
            lambda value: value[:, :, : steps + 1] if value.dim() > 2 else value,
            lambda episode: episode.until(steps),
            self.times[..., : steps + 1],
        )
        return replace(
            begun, initial=self.initial, whole=self.whole or self
        )  # initial has no time axis

    def cut(self, steps: int | None) -> Episode:
        """Multiple shooting: every trajectory cut into segments of ``steps`` steps, each a shot with its own clock.

        A segment starts from the measured state there, which then no longer counts as an observation. Encoders go on
        reading the whole trajectories. The last segment is moved back to end with the data; what it repeats is masked.
        Segments that are shorter already stay as they are, and ``None`` undoes the cut.
        """
        require(
            steps is None or steps >= 1,
            "segments of 1 step or more",
            steps,
            "Pass None for the whole horizon.",
        )
        if self.uncut is not None:
            return (
                self.uncut.cut(steps) if steps is None or steps < self.times.shape[-1] - 1 else self
            )
        last = self.times.shape[-1] - 1
        if steps is None or steps >= last or self.query is None:
            return self
        if self.states is None:
            fail(
                "measured states at all times, to restart from",
                "initial states alone",
                "Pass initial= with a time axis to Tasks, or meta_train(..., curriculum={0.0: None}).",
            )
        starts = [min(s, last - steps) for s in range(0, last, steps)]
        index = torch.tensor(
            [[s + k for k in range(steps + 1)] for s in starts], device=self.times.device
        )
        fresh = torch.ones(len(starts), steps + 1, dtype=torch.bool, device=self.times.device)
        fresh[:, 0] = False
        fresh[-1, : len(starts) * steps - last + 1] = False
        counts = torch.as_tensor(self.mask, device=self.query.device).expand_as(self.query)

        def pieces(
            x: Tensor,
        ) -> Tensor:  # (task, shot, time, ...) -> (task, shot * segment, steps + 1, ...)
            return x[:, :, index].flatten(1, 2)

        shots = self.query.shape[1]
        return Episode(
            times=self.times[index].repeat(shots, 1),
            query=pieces(self.query),
            initial=_over(self.states, lambda x: x[:, :, starts].flatten(1, 2)),
            support=self.support and self.support.cut(steps),
            mask=pieces(counts) & fresh.repeat(shots, 1).unsqueeze(-1),
            whole=self.whole or self,
            uncut=self,
        )

    def some(self, shots: Tensor) -> Episode:
        """Some of the segments that it was cut into, by index, the same ones for every task."""
        require(
            self.times.dim() == 2,
            "an episode that was cut into segments",
            "whole trajectories",
            "Cut it first.",
        )
        few = self._changed(lambda value: value[:, shots], times=self.times[shots])
        return replace(few, uncut=None, whole=self.whole or self)

    def _changed(
        self,
        change: Callable[[Tensor], Tensor],
        nested: Callable[[Episode], Episode] | None = None,
        times: Times | None = None,
    ) -> Episode:
        """``change`` done to everything that has axes (task, shot, ...), ``nested`` to the episodes inside."""

        def each(value: _T) -> _T:
            return change(value) if isinstance(value, Tensor) else value  # type: ignore[return-value]

        inside = {
            name: nested(episode)
            for name in ("support", "whole", "uncut")
            if nested and (episode := getattr(self, name)) is not None
        }
        return replace(
            self,
            times=self.times if times is None else times,
            query=each(self.query),
            initial=_over(self.initial, change),
            mask=each(self.mask),
            seen=each(self.seen),
            states=None if self.states is None else _over(self.states, change),
            **inside,
        )


@dataclass(frozen=True, eq=False)
class Tasks:
    """A data set: many systems, a few trajectories of each. Build it with :meth:`from_trajectories`."""

    times: Times
    values: Trajectories
    states: State
    num_support: int
    mask: Tensor | bool = True
    seen: Tensor | bool = True
    timed: bool = True
    truth: Mapping[str, Tensor] | None = None

    @classmethod
    def from_trajectories(
        cls,
        times: Times,
        values: Trajectories,
        *,
        num_support: int,
        initial: State | None = None,
        mask: Tensor | None = None,
        truth: Mapping[str, Tensor] | None = None,
    ) -> Tasks:
        """Check the data, loudly, and make them tasks.

        Arguments:
            times: ``(time,)``, strictly increasing.
            values: ``(task, shot, time, sensor)``.
            num_support: how many of a task's shots condition its prior; the rest are to be explained.
            initial: the states at the first time, a tuple of ``(task, shot)`` or one tensor ``(task, shot, component)``
                for fields on a grid; with a time axis after the shots, the measured states at all times, from which
                segments can be restarted. By default the sensors are the state's components, and the first
                observation is the measurement of the initial state: it then no longer counts as an observation.
            mask: ``(task, shot, time, sensor)``, False where an observation is missing.
            truth: the latents where they are known, ``{"omega": (task, component), ...}``.
        """
        check_trajectories(times, values, num_support, mask)
        seen: Tensor | bool = True if mask is None else mask
        states, timed = _measured(times, values, initial, mask)
        values, counts = values if mask is None else values.where(mask, 0.0), seen
        if timed:  # the first observation has become the initial state
            counts = torch.as_tensor(seen, device=values.device).expand_as(values).clone()
            counts[:, :, 0] = False
        for name, value in (truth or {}).items():
            require(
                isinstance(value, Tensor) and value.dim() == 2 and len(value) == len(values),
                f"truth[{name!r}], a tensor of shape ({len(values)}, component)",
                tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__,
                "Give one row for each task.",
            )
        return cls(times, values, states, num_support, counts, seen, timed, truth)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Tensor) -> Tasks:
        """Some of the tasks."""
        require(
            isinstance(rows, slice | Tensor),
            "a slice or a tensor of rows",
            repr(rows),
            "One task is a data set too: tasks[3:4].",
            TypeError,
        )

        def take(value: _T) -> _T:
            return value[rows] if isinstance(value, Tensor) else value  # type: ignore[return-value]

        truth = (
            None
            if self.truth is None
            else {name: value[rows] for name, value in self.truth.items()}
        )
        return replace(
            self,
            values=self.values[rows],
            states=_over(self.states, take),
            mask=take(self.mask),
            seen=take(self.seen),
            truth=truth,
        )

    def split(self, n: int) -> tuple[Tasks, Tasks]:
        """The first tasks and the last ``n``."""
        require(
            0 < n < len(self),
            f"a split from 1 to {len(self) - 1}",
            n,
            "Simulate more tasks or hold out fewer.",
        )
        return self[: len(self) - n], self[len(self) - n :]

    def episode(self, num_support: int | None = None) -> Episode:
        """All of it as one batch: the first shots are the support, the others the query."""
        size = self.num_support if num_support is None else num_support
        require(
            1 <= size < self.values.shape[1],
            f"num_support from 1 to {self.values.shape[1] - 1}",
            size,
            "Leave at least one shot to each side.",
        )
        return replace(self.shots(slice(size, None)), support=self.shots(slice(0, size)))

    def batches(self, size: int, seed: int) -> Iterator[Episode]:
        """Batches without end: tasks in random order, and every time a fresh draw of who is support and who query."""
        return (episode for _, episode in self.numbered_batches(size, seed))

    def numbered_batches(
        self, size: int, seed: int, start: int = 0
    ) -> Iterator[tuple[Tensor, Episode]]:
        """The same from the ``start``-th on, each with the numbers of its tasks."""
        require(size >= 1, "a batch of 1 task or more", size, "Pass a positive integer.")
        generator = torch.Generator().manual_seed(seed)
        shots, size, step = self.values.shape[1], min(size, len(self)), 0
        while True:
            order = torch.randperm(len(self), generator=generator)
            for rows in order[: len(order) // size * size].split(size):
                roles = torch.rand(size, shots, generator=generator).argsort(1)
                if step >= start:
                    yield rows, self[rows]._drawn(roles.to(self.values.device))
                step += 1

    def _drawn(self, roles: Tensor) -> Episode:
        everything = self.shots(slice(None))
        return replace(
            everything.pick(roles[:, self.num_support :]),
            support=everything.pick(roles[:, : self.num_support]),
        )

    def shots(self, which: slice) -> Episode:
        """Some shots of every task, with no support."""

        def take(value: _T) -> _T:
            return value[:, which] if isinstance(value, Tensor) else value  # type: ignore[return-value]

        states = _over(self.states, take)
        return Episode(
            self.times,
            self.values[:, which],
            _over(states, lambda x: x[:, :, 0]) if self.timed else states,
            mask=take(self.mask),
            seen=take(self.seen),
            states=states if self.timed else None,
        )


def _measured(
    times: Tensor, values: Tensor, initial: State | None, mask: Tensor | None
) -> tuple[State, bool]:
    """The measured states, gaps filled, and whether they are of all times."""
    gaps = values if mask is None else values.where(mask, torch.nan)
    states = gaps.unbind(-1) if initial is None else initial
    parts = states if isinstance(states, tuple) else (states,)
    require(
        len(parts) > 0,
        "a component or more in initial",
        "an empty tuple",
        "Give one tensor for each component.",
    )
    last = () if isinstance(states, tuple) else ("component",)
    timed = parts[0].dim() == 3 + len(last)
    shape = tuple(values.shape[: 3 if timed else 2])
    for part in parts:
        require_floating("initial", part)
        require(
            part.dtype == values.dtype,
            f"initial in {values.dtype}, as the values",
            part.dtype,
            "Convert one.",
            TypeError,
        )
        require(
            part.dim() == len(shape + last) and part.shape[: len(shape)] == shape,
            f"initial states of shape ({', '.join(map(str, shape + last))})",
            tuple(part.shape),
            "Give one state for each shot of each task, or one for each of its times.",
        )
    if timed and mask is not None:
        states = _over(states, lambda part: _filled(times, part))
    for part in states if isinstance(states, tuple) else (states,):
        require_measured("initial", part)
    return states, timed


def _filled(times: Tensor, states: Tensor) -> Tensor:
    """Gaps filled from the states before and after, linearly in time: segments may have to start there."""
    axes, last = [1] * (states.dim() - 3), len(times) - 1
    seen, index = (
        torch.isfinite(states),
        torch.arange(last + 1, device=times.device).view(-1, *axes),
    )
    before = index.where(seen, -1).cummax(2).values
    after = index.where(seen, last + 1).flip(2).cummin(2).values.flip(2)
    before, after = (
        before.where(before >= 0, after).clamp(max=last),
        after.where(after <= last, before).clamp(min=0),
    )
    known, gap = states.where(seen, 0.0), times[after] - times[before]
    share = (times.view(-1, *axes) - times[before]) / gap.where(gap > 0.0, 1.0)
    return torch.lerp(known.gather(2, before), known.gather(2, after), share.where(gap > 0.0, 0.0))
