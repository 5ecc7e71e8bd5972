"""Long tables: one row for each time of each trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_hybrid.errors import fail, require, require_package

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Table", "read_table"]

Rows = NDArray[np.intp]


class Table(NamedTuple):
    """Tensors of a long table, padded to the longest trajectory."""

    times: Tensor
    values: Tensor
    observed: Tensor
    inputs: Tensor | None
    states: Tensor | None
    latents: dict[str, Tensor] | None


class _Layout(NamedTuple):
    """The place of each row: sorted rows of the table, and the task, shot and time index of each of them."""

    rows: Rows
    task: Rows
    shot: Rows
    step: Rows
    shape: tuple[int, int, int]


def read_table(
    source: pd.DataFrame | str | Path,
    *,
    ids: tuple[str, str],
    time: str,
    sensors: Sequence[str],
    inputs: Sequence[str],
    components: Sequence[str] | None,
    latents: Mapping[str, Sequence[str]] | None,
    dtype: torch.dtype,
) -> Table:
    """Read, check and arrange a long table.

    Arguments:
        source: a DataFrame, or the path of a CSV or parquet file.
        ids: names of the columns of task and shot.
        time: name of the column of time.
        sensors, inputs, components: names of the columns of sensors, of known inputs, and of the measured state.
        latents: by name of a latent, the columns of its components.
        dtype: of the tensors.
    """
    frame = _load(source)
    groups = {"sensors": list(_names("sensors", sensors)), "inputs": list(_names("inputs", inputs))}
    groups["initial"] = list(_names("initial", components or ()))
    for name, columns in (latents or {}).items():
        groups[f"true_latents[{name!r}]"] = list(_names(f"true_latents[{name!r}]", columns))
    require(bool(groups["sensors"]), "one sensor or more", "none", "Name the observed columns.")
    _require_columns(frame, [*ids, time, *(c for columns in groups.values() for c in columns)])
    require(len(frame) > 0, "a table with rows", "an empty one", "Check how it was read.")
    clock = _numbers(frame, time, required=True)
    layout = _arrange(frame, ids, time, clock)
    times = _times(frame, layout, clock, dtype)
    sensed, observed = _gather(frame, layout, groups["sensors"], dtype)
    known_inputs = _complete(frame, layout, groups["inputs"], dtype) if inputs else None
    states = _gather(frame, layout, groups["initial"], dtype)[0] if components else None
    known = None
    if latents is not None:
        known = {
            name: _constants(frame, layout, groups[f"true_latents[{name!r}]"], ids[0], dtype)
            for name in latents
        }
    return Table(times, sensed.nan_to_num(0.0), observed, known_inputs, states, known)


def _pandas() -> ModuleType:
    module: ModuleType = require_package(
        "pandas", "tables", "make tensors of the table for Tasks.from_trajectories"
    )
    return module


def _load(source: pd.DataFrame | str | Path) -> pd.DataFrame:
    pandas = _pandas()
    if isinstance(source, pandas.DataFrame):
        return source
    if not isinstance(source, str | Path):
        fail(
            "a pandas DataFrame, or the path of a CSV or parquet file",
            type(source).__name__,
            "Convert it with pandas.DataFrame(...).",
            TypeError,
        )
    path = Path(source)
    require(path.is_file(), "a file that exists", path, "Check the path.", FileNotFoundError)
    if path.suffix == ".parquet":
        require_package("pyarrow", "parquet", "save the table as CSV")
        return pandas.read_parquet(path)
    require(
        path.suffix == ".csv",
        "a file that ends in .csv or .parquet",
        path.name,
        "Read it yourself and pass the DataFrame.",
    )
    return pandas.read_csv(path)


def _names(role: str, columns: Sequence[str]) -> Sequence[str]:
    """Require a sequence of names, all different."""
    if isinstance(columns, str) or not all(isinstance(column, str) for column in columns):
        fail(
            f"{role}, a sequence of names of columns",
            repr(columns),
            f"Pass {role}=['angle', 'speed'], for example.",
            TypeError,
        )
    doubled = sorted({column for column in columns if list(columns).count(column) > 1})
    require(not doubled, f"{role} of different names", f"{doubled} twice", "Name each column once.")
    return columns


def _require_columns(frame: pd.DataFrame, names: Sequence[str]) -> None:
    existing = list(frame.columns)
    missing = [name for name in dict.fromkeys(names) if name not in existing]
    require(
        not missing,
        f"a table with the columns {missing}",
        f"the columns {existing}",
        "Name the columns that the table has, such as task='system'.",
    )
    doubled = [name for name in dict.fromkeys(names) if existing.count(name) > 1]
    require(not doubled, "columns of different names", f"{doubled} twice", "Rename one of them.")


def _numbers(frame: pd.DataFrame, column: str, *, required: bool = False) -> NDArray[np.float64]:
    """A column as numbers; NaN where a cell is empty, unless values are required."""
    pandas = _pandas()
    cells = frame[column]
    converted = pandas.to_numeric(cells, errors="coerce")
    is_time = pandas.api.types.is_datetime64_any_dtype(cells)
    numbers: NDArray[np.float64] = converted.to_numpy(dtype=np.float64, na_value=np.nan)
    is_text = np.isnan(numbers) & cells.notna().to_numpy()
    require(
        not is_time and not is_text.any(),
        f"numbers in column {column!r}",
        "dates" if is_time else f"{_cell(frame, column, is_text)}",
        "Convert dates to seconds since the start."
        if is_time
        else "Correct the cell, or leave it empty if the value is missing.",
    )
    is_infinite = np.isinf(numbers)
    require(
        not is_infinite.any(),
        f"finite numbers in column {column!r}",
        _cell(frame, column, is_infinite),
        "Correct the cell, or leave it empty if the value is missing.",
    )
    is_empty = np.isnan(numbers)
    require(
        not required or not is_empty.any(),
        f"a number in every row of column {column!r}",
        _cell(frame, column, is_empty),
        "Fill it in, or drop the row.",
    )
    return numbers


def _cell(frame: pd.DataFrame, column: str, wrong: NDArray[np.bool_]) -> str:
    """Describe the first wrong cell of a column: its content and the label of its row."""
    if not wrong.any():
        return "none"
    position = int(wrong.argmax())
    others = int(wrong.sum()) - 1
    more = f", and {others} more such cells" if others else ""
    return f"{_plain(frame[column].iloc[position])} in row {_plain(frame.index[position])}{more}"


def _plain(value: object) -> str:
    """A value as a user would write it: 10, and not np.int64(10)."""
    return repr(value.item() if isinstance(value, np.generic) else value)


def _arrange(
    frame: pd.DataFrame, ids: tuple[str, str], time: str, clock: NDArray[np.float64]
) -> _Layout:
    """Sort rows by task, shot and time; tasks and shots in the order in which they first appear."""
    pandas = _pandas()
    for column in ids:
        is_empty = frame[column].isna().to_numpy()
        require(
            not is_empty.any(),
            f"a label in every row of column {column!r}",
            _cell(frame, column, is_empty),
            "Say which task and shot each row is of, or drop the row.",
        )
    task, task_labels = pandas.factorize(frame[ids[0]])
    pairs = pandas.MultiIndex.from_arrays([task, pandas.factorize(frame[ids[1]])[0]])
    trajectory, trajectory_labels = pandas.factorize(pairs)
    task_of = np.array([pair[0] for pair in trajectory_labels], dtype=np.intp)
    num_shots = np.bincount(task_of)
    _require_equal_shots(num_shots, list(task_labels))
    shot_of = np.zeros_like(task_of)
    for number in range(len(num_shots)):
        members = task_of == number
        shot_of[members] = np.arange(members.sum())
    rows = np.lexsort((clock, shot_of[trajectory], task))
    sorted_trajectory = trajectory[rows]
    starts = np.flatnonzero(np.r_[True, np.diff(sorted_trajectory) != 0])
    lengths = np.diff(np.r_[starts, len(rows)])
    step = np.arange(len(rows)) - np.repeat(starts, lengths)
    _require_different_times(frame, ids, time, rows, clock, step)
    shape = (len(num_shots), int(num_shots[0]), int(lengths.max()))
    return _Layout(rows, task[rows], shot_of[sorted_trajectory], step, shape)


def _require_equal_shots(num_shots: Rows, labels: Sequence[object]) -> None:
    first, other = int(num_shots[0]), int((num_shots != num_shots[0]).argmax())
    require(
        bool((num_shots == first).all()),
        "equally many shots of every task",
        f"{first} of task {_plain(labels[0])} and {int(num_shots[other])} of task {_plain(labels[other])}",
        "Drop shots, or read tasks with different numbers of them apart.",
    )


def _require_different_times(
    frame: pd.DataFrame,
    ids: tuple[str, str],
    time: str,
    rows: Rows,
    clock: NDArray[np.float64],
    step: Rows,
) -> None:
    is_repeated = (step > 0) & (np.diff(clock[rows], prepend=np.nan) == 0.0)
    if not is_repeated.any():
        return
    row = int(rows[is_repeated.argmax()])
    fail(
        f"each time once in a trajectory (column {time!r})",
        f"{clock[row]:g} twice in task {_plain(frame[ids[0]].iloc[row])}, "
        f"shot {_plain(frame[ids[1]].iloc[row])}, the second one in row {_plain(frame.index[row])}",
        "Drop the doubled rows, or give the trajectories different shots.",
    )


def _times(
    frame: pd.DataFrame, layout: _Layout, clock: NDArray[np.float64], dtype: torch.dtype
) -> Tensor:
    """Clocks (task, shot, time), padded with their last step; (time,) if all of them are equal."""
    times = np.full(layout.shape, np.nan)
    times[layout.task, layout.shot, layout.step] = clock[layout.rows]
    lengths = np.isfinite(times).sum(-1, keepdims=True)
    last = np.take_along_axis(times, lengths - 1, -1)
    previous = np.take_along_axis(times, np.maximum(lengths - 2, 0), -1)
    spacing = np.where(lengths > 1, last - previous, 1.0)
    beyond = np.arange(layout.shape[-1]) - (lengths - 1)
    times = np.where(beyond > 0, last + beyond * spacing, times)
    if (times == times[:1, :1]).all():
        times = times[0, 0]
    converted = torch.as_tensor(times).to(dtype)
    is_lost = ~(torch.diff(converted) > 0)
    require(
        not bool(is_lost.any()),
        f"times that differ in {dtype}",
        f"times near {float(clock.max()):.10g} that don't",
        "Subtract the start of each trajectory, or pass dtype=torch.float64.",
    )
    return converted


def _gather(
    frame: pd.DataFrame, layout: _Layout, columns: Sequence[str], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Columns as a tensor (task, shot, time, column) with NaN where nothing is known, and where something is."""
    values = np.full((*layout.shape, len(columns)), np.nan)
    for number, column in enumerate(columns):
        numbers = _numbers(frame, column)[layout.rows]
        values[layout.task, layout.shot, layout.step, number] = numbers
    return torch.as_tensor(values).to(dtype), torch.as_tensor(np.isfinite(values))


def _complete(
    frame: pd.DataFrame, layout: _Layout, columns: Sequence[str], dtype: torch.dtype
) -> Tensor:
    """Columns without gaps, (task, shot, time, column); padding repeats the last value."""
    values = np.full((*layout.shape, len(columns)), np.nan)
    for number, column in enumerate(columns):
        numbers = _numbers(frame, column, required=True)[layout.rows]
        values[layout.task, layout.shot, layout.step, number] = numbers
    lengths = np.isfinite(values[..., :1]).sum(2, keepdims=True)
    last = np.take_along_axis(
        values, np.broadcast_to(lengths - 1, (*lengths.shape[:3], len(columns))), 2
    )
    return torch.as_tensor(np.where(np.isnan(values), last, values)).to(dtype)


def _constants(
    frame: pd.DataFrame, layout: _Layout, columns: Sequence[str], task: str, dtype: torch.dtype
) -> Tensor:
    """Columns that don't change within a task, (task, column)."""
    values = np.empty((layout.shape[0], len(columns)))
    for number, column in enumerate(columns):
        numbers = _numbers(frame, column, required=True)
        first = np.empty(layout.shape[0])
        first[layout.task[::-1]] = numbers[layout.rows[::-1]]
        expected = np.empty_like(numbers)
        expected[layout.rows] = first[layout.task]
        is_other = numbers != expected
        require(
            not is_other.any(),
            f"one value of column {column!r} for each task (column {task!r})",
            _cell(frame, column, is_other),
            "Latents belong to a task: they must not change within it.",
        )
        values[:, number] = first
    return torch.as_tensor(values).to(dtype)
