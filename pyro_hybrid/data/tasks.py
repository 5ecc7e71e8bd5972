"""Tasks: a data set of many systems, with a few trajectories of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pyro_hybrid.data.arrange import cut_times, measured_states
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.data.tables import read_table
from pyro_hybrid.data.validate import (
    check_inputs,
    check_latents,
    check_pieces,
    check_rows,
    check_trajectories,
    require_integer,
)
from pyro_hybrid.errors import fail, require
from pyro_hybrid.shapes import Mask, Times, Trajectories

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Tasks", "require_tasks"]


@dataclass(frozen=True, eq=False)
class Tasks:
    """Hold a data set: many systems, a few trajectories of each.

    Build one with :meth:`from_trajectories` or :meth:`from_frame`, which check the data. :class:`Shots` says more about
    clocks, masks and padding.

    Arguments:
        times: ``(time,)``, ``(shot, time)`` or ``(task, shot, time)``.
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
        initial: Tensor | Literal["sensors"] | None = "sensors",
        observed: Mask | None = None,
        inputs: Tensor | None = None,
        pieces: int = 1,
        true_latents: Mapping[str, Tensor] | None = None,
    ) -> Tasks:
        """Check trajectories and make them tasks.

        Arguments:
            times: strictly increasing, ``(time,)`` for one common clock, ``(shot, time)`` or ``(task, shot, time)``.
                Pad trajectories of different lengths to the longest: times that go on increasing, any values, and
                False in ``observed``.
            values: ``(task, shot, time, sensor)``. A single time is legal, for data that don't move.
            num_support: number of a task's shots that condition its prior; the others are to be explained.
            initial: the states at the first time, ``(task, shot, component)``; or the measured states at all times,
                ``(task, shot, time, component)``, where segments can start. With ``"sensors"``, the sensors are the
                state's components, and the first value is the measurement of the initial state: it is then not
                scored. With None the starts are not measured: the program samples its own.
            observed: ``(task, shot, time, sensor)``, False where a value is missing.
            inputs: known controls, ``(task, shot, time, input)``, also at padded times.
            pieces: cut each trajectory into so many shots of equal length, such as one long recording of each system.
            true_latents: the latents where they are known, ``{"omega": (task, component), ...}``.

        >>> import pyro_hybrid as ph
        >>> tasks = ph.Tasks.from_trajectories(0.1 * torch.arange(50.0), torch.randn(9, 4, 50, 2), num_support=2)
        >>> len(tasks), tasks.episode().query.values.shape
        (9, torch.Size([9, 2, 50, 2]))
        """
        if pieces != 1:
            check_pieces(pieces, values, initial)
            clocks = times if times.dim() > 1 else times.expand(values.shape[1], -1)
            times, values, observed, inputs = (
                cut_times(clocks, pieces, clocks.dim() - 1),
                cut_times(values, pieces, 2),
                cut_times(observed, pieces, 2),
                cut_times(inputs, pieces, 2),
            )
            initial = cut_times(initial, pieces, 2) if isinstance(initial, Tensor) else initial
        check_trajectories(times, values, num_support, observed)
        check_inputs(inputs, values)
        check_latents(true_latents, len(values))
        if observed is None:
            observed = torch.ones_like(values, dtype=torch.bool)
        measured = measured_states(times, values, observed, initial)
        is_complete = measured is not None and measured.dim() == 4
        scored = observed
        if is_complete:  # the first observation has become the initial state
            scored = observed.clone()
            scored[:, :, 0] = False
        start = measured
        if measured is not None and is_complete:
            start = measured[:, :, 0]
        return cls(
            times,
            values.where(observed, 0.0),
            observed,
            scored,
            num_support,
            initial=start,
            states=measured if is_complete else None,
            inputs=inputs,
            true_latents=true_latents,
        )

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame | str | Path,
        *,
        sensors: Sequence[str],
        num_support: int,
        task: str = "task",
        shot: str = "shot",
        time: str = "time",
        inputs: Sequence[str] = (),
        initial: Sequence[str] | Literal["sensors"] | None = "sensors",
        true_latents: Mapping[str, Sequence[str]] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tasks:
        """Read a long table: one row for each time of each trajectory, one column for each sensor.

        Rows may come in any order; tasks and shots are numbered in the order in which they first appear. Trajectories
        may have clocks and lengths of their own: shorter ones are padded, and padding counts as not observed. An empty
        cell of a sensor is a missing value. Needs pandas.

        Arguments:
            frame: a pandas DataFrame, or the path of a CSV or parquet file.
            sensors: names of the columns that were observed.
            num_support: number of a task's shots that condition its prior.
            task, shot, time: names of the columns that say which system a row is of, which of its trajectories, and
                when. Every task needs equally many shots.
            inputs: names of the columns of known controls, if there are any.
            initial: names of the columns that measure the state at all times; ``"sensors"`` if the sensors do; or None
                if starts are not measured. See :meth:`from_trajectories`.
            true_latents: by name of a latent, the columns of its components, which must not change within a task.
            dtype: of the tensors. Subtract the start from times such as 1.7e9 s, or take ``torch.float64``.

        >>> import pandas as pd
        >>> import pyro_hybrid as ph
        >>> rows = [(s, k, t, t + k) for s in ("a", "b") for k in (0, 1) for t in (0.0, 0.1, 0.2)]
        >>> frame = pd.DataFrame(rows, columns=["task", "shot", "time", "angle"])
        >>> ph.Tasks.from_frame(frame, sensors=["angle"], num_support=1).values.shape
        torch.Size([2, 2, 3, 1])
        """
        components = None if isinstance(initial, str) or initial is None else initial
        table = read_table(
            frame,
            ids=(task, shot),
            time=time,
            sensors=sensors,
            inputs=inputs,
            components=components,
            latents=true_latents,
            dtype=dtype,
        )
        states: Tensor | Literal["sensors"] | None = table.states
        if components is None:
            states = "sensors" if initial is not None else None
        return cls.from_trajectories(
            table.times,
            table.values,
            num_support=num_support,
            initial=states,
            observed=table.observed,
            inputs=table.inputs,
            true_latents=table.latents,
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
            times=self.times[rows] if self.times.dim() == 3 else self.times,
            values=self.values[rows],
            observed=self.observed[rows],
            scored=self.scored[rows],
            initial=select(self.initial),
            states=select(self.states),
            inputs=select(self.inputs),
            true_latents=true_latents,
        )

    def double(self) -> Tasks:
        """Convert all numbers to float64."""

        def convert(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.double()

        return replace(
            self,
            times=self.times.double(),
            values=self.values.double(),
            initial=convert(self.initial),
            states=convert(self.states),
            inputs=convert(self.inputs),
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
        """Return all tasks as one batch: the first shots are the support, the others the query."""
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

        times = self.times if self.times.dim() == 1 else self.times[..., which, :]
        return Shots(
            times,
            self.values[:, which],
            select(self.initial),
            self.observed[:, which],
            self.scored[:, which],
            inputs=select(self.inputs),
            states=select(self.states),
        )


def require_tasks(tasks: object, name: str = "tasks") -> None:
    """Require a data set where one is needed."""
    if not isinstance(tasks, Tasks):
        fail(
            f"{name} to be a data set (ph.Tasks)",
            type(tasks).__name__,
            "Make one with ph.Tasks.from_trajectories, or of a table with ph.Tasks.from_frame.",
            TypeError,
        )
