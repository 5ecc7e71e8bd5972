"""Shots: trajectories of a batch of tasks, as tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from pyro_hybrid.errors import fail, require
from pyro_hybrid.shapes import Mask, Times, Trajectories

__all__ = ["Shots", "require_shots"]


@dataclass(frozen=True, eq=False)
class Shots:
    """Hold trajectories of a batch of tasks, with what is known about them.

    Every field is a tensor or None. Build one by hand with :meth:`from_tensors`, which fills in the masks.

    Arguments:
        times: ``(time,)`` for one common clock, ``(shot, time)`` if each shot has its own, or ``(task, shot, time)``.
            Trajectories of different lengths are padded to the longest: padded times go on increasing, so that a
            solver can pass through them, and padded values are neither observed nor scored.
        values: ``(task, shot, time, sensor)``, or None to simulate.
        initial: the measured state at the first time, ``(task, shot, component)``, or None if it was not measured.
        observed: True where a value was measured, in the values' shape: an encoder may read it.
        scored: True where a value counts in the likelihood, in the values' shape.
        inputs: known controls at all times, ``(task, shot, time, input)``, padded times included; or None.
        states: measured states at all times, ``(task, shot, time, component)``, from which
            :func:`~pyro_hybrid.data.segments.to_segments` takes the starts of segments; or None.
        whole: the complete trajectories, which encoders read, if these are segments or truncated; else None.
        uncut: the shots that these segments were cut from, or None.
        is_sample: True if these are only some of the segments.

    >>> import pyro_hybrid as ph
    >>> shots = ph.Shots.from_tensors(torch.arange(3.0), torch.zeros(5, 4, 3, 1), torch.zeros(5, 4, 1))
    >>> shots.shape, bool(shots.scored.all())
    ((5, 4), True)
    """

    times: Times
    values: Trajectories | None
    initial: Tensor | None
    observed: Mask
    scored: Mask
    inputs: Tensor | None = None
    states: Tensor | None = None
    whole: Shots | None = field(default=None, repr=False)
    uncut: Shots | None = field(default=None, repr=False)
    is_sample: bool = False

    @classmethod
    def from_tensors(
        cls,
        times: Times,
        values: Trajectories | None = None,
        initial: Tensor | None = None,
        *,
        observed: Mask | None = None,
        scored: Mask | None = None,
        inputs: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Shots:
        """Build shots whose values are all observed and scored unless masks are given.

        Without ``values`` the masks have one sensor, which broadcasts, and the numbers of tasks and shots are those of
        ``initial`` or ``inputs``.
        """
        if observed is None:
            observed = _all_true(times, values, initial, inputs)
        if scored is None:
            scored = observed
        return cls(times, values, initial, observed, scored, inputs, states)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of tasks and of shots."""
        return self.observed.shape[0], self.observed.shape[1]

    @property
    def expanded_times(self) -> Tensor:
        """The clock of every trajectory, ``(task, shot, time)``."""
        return self.times.expand(*self.shape, -1)

    @property
    def measured_initial(self) -> Tensor:
        """The measured initial states; raise if there are none."""
        if self.initial is None:
            fail(
                "shots with measured initial states",
                "initial=None",
                "Pass initial= with the data, or sample the initial states in the program.",
            )
        return self.initial

    @property
    def is_segmented(self) -> bool:
        """True if these are segments, cut from longer trajectories."""
        return self.uncut is not None or self.is_sample

    @cached_property
    def sorted_shots(self) -> Shots:
        """The same shots in an order that depends on their values alone, so that results don't depend on theirs."""
        whole = self.whole or self
        if whole.values is None or whole.shape[1] == 1:
            return self
        if self.is_sample:  # encoders read whole trajectories; only these have an order
            return replace(self, whole=whole.sorted_shots)
        order = _order_of_shots(whole.values, whole.times)
        segments_per_shot = self.shape[1] // whole.shape[1]
        segment = torch.arange(segments_per_shot, device=order.device)
        rows = (order.unsqueeze(-1) * segments_per_shot + segment).flatten(1)
        times = self.times if whole.times.dim() == 1 else _select(self.expanded_times, rows)
        return replace(
            self.map_tensors(lambda value: _select(value, rows), times),
            whole=self.whole and self.whole.sorted_shots,
            uncut=self.uncut and self.uncut.sorted_shots,
        )

    def select_tasks(self, rows: int | Tensor) -> Shots:
        """Select one task, or several by index."""
        rows = torch.as_tensor(rows).reshape(-1)
        num_tasks = self.shape[0]
        require(
            bool(((rows >= 0) & (rows < num_tasks)).all()),
            f"a task from 0 to {num_tasks - 1}",
            rows.tolist(),
            "Count tasks from 0.",
        )
        return self.map_all(lambda value: value[rows.to(value.device)])

    def select_shots(self, order: Tensor) -> Shots:
        """Select shots by index ``(task, shot)``, different ones for each task."""
        require(
            not self.is_segmented,
            "whole trajectories",
            "segments",
            "Select shots before you cut them into segments.",
        )
        times = self.times if self.times.dim() == 1 else _select(self.expanded_times, order)
        selected = self.map_tensors(lambda value: _select(value, order), times)
        return replace(selected, whole=self.whole and self.whole.select_shots(order))

    def to(self, device: torch.device | str) -> Shots:
        """Move all tensors to a device."""
        return self.map_all(lambda value: value.to(device), lambda times: times.to(device))

    def double(self) -> Shots:
        """Convert all numbers to float64."""

        def convert(value: Tensor) -> Tensor:
            return value.double() if value.is_floating_point() else value

        return self.map_all(convert, convert)

    def simulation(self) -> Shots:
        """Remove the values, so that a program simulates them."""
        return replace(self, values=None, scored=torch.ones_like(self.scored))

    def map_tensors(self, change: Callable[[Tensor], Tensor], times: Times | None = None) -> Shots:
        """Apply ``change`` to every tensor with axes (task, shot, ...), clocks of tasks included.

        ``whole`` and ``uncut`` stay as they are. If new ``times`` are given, they replace the old ones unchanged.
        """

        def changed(value: Tensor | None) -> Tensor | None:
            return None if value is None else change(value)

        if times is None:
            times = change(self.times) if self.times.dim() == 3 else self.times
        return replace(
            self,
            times=times,
            values=changed(self.values),
            initial=changed(self.initial),
            observed=change(self.observed),
            scored=change(self.scored),
            inputs=changed(self.inputs),
            states=changed(self.states),
        )

    def map_all(
        self,
        change: Callable[[Tensor], Tensor],
        change_times: Callable[[Tensor], Tensor] | None = None,
    ) -> Shots:
        """Apply ``change`` to every tensor with axes (task, shot, ...), also inside ``whole`` and ``uncut``."""

        def inside(shots: Shots | None) -> Shots | None:
            return None if shots is None else shots.map_all(change, change_times)

        times = None if change_times is None else change_times(self.times)
        changed = self.map_tensors(change, times)
        return replace(changed, whole=inside(self.whole), uncut=inside(self.uncut))


def require_shots(shots: object, name: str = "shots") -> None:
    """Require trajectories where some are needed."""
    if not isinstance(shots, Shots):
        fail(
            f"{name} of class Shots",
            type(shots).__name__,
            "Pass episode.query or episode.support, tasks.shots(), or ph.Shots.from_tensors(...).",
            TypeError,
        )


def _all_true(
    times: Tensor, values: Tensor | None, initial: Tensor | None, inputs: Tensor | None
) -> Tensor:
    """A mask of the values' shape, or of one sensor if there are no values."""
    if values is not None:
        return torch.ones_like(values, dtype=torch.bool)
    known = initial if initial is not None else inputs
    if known is None:
        fail(
            "values, initial states or inputs",
            "none of them",
            "Pass one of them: it says how many tasks and shots there are.",
        )
    shape = (*known.shape[:2], times.shape[-1], 1)
    return torch.ones(shape, dtype=torch.bool, device=times.device)


def _order_of_shots(values: Tensor, times: Tensor) -> Tensor:
    """Indices (task, shot) that sort shots by a weighted sum of their values, and of their times if these differ."""
    flat = values.double().flatten(2)
    if times.dim() > 1:
        flat = torch.cat([flat, times.double().expand(*flat.shape[:2], -1)], -1)
    # Weights differ because plain sums are equal for trajectories that conserve something.
    weights = torch.arange(1, flat.shape[-1] + 1, device=flat.device).sqrt()
    return (flat * weights).sum(-1).argsort(1)


def _select(value: Tensor, order: Tensor) -> Tensor:
    """Take shots by index (task, shot) from a tensor (task, shot, ...)."""
    trailing = [1] * (value.dim() - 2)
    index = order.reshape(*order.shape, *trailing).expand(-1, -1, *value.shape[2:])
    return value.gather(1, index)
