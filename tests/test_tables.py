"""Long tables: what is read from them, and each error that names a row and a column."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import pyro_hybrid as ph
from pyro_hybrid import Tasks

TASKS, SHOTS, POINTS = 3, 2, 4
SENSORS = ["angle", "speed"]


def long_table(
    times: Tensor | None = None, values: Tensor | None = None, **columns: Tensor
) -> pd.DataFrame:
    """Trajectories (task, shot, time, sensor) as one row for each time of each trajectory."""
    times = 0.5 * torch.arange(float(POINTS)) if times is None else times
    if values is None:
        values = torch.arange(float(TASKS * SHOTS * POINTS * 2)).view(TASKS, SHOTS, POINTS, 2)
    rows = []
    for task in range(values.shape[0]):
        for shot in range(values.shape[1]):
            clock = times.expand(*values.shape[:3])[task, shot]
            for step in range(values.shape[2]):
                row: dict[str, Any] = {
                    "task": f"system {task}",
                    "shot": 10 * shot,
                    "time": float(clock[step]),
                }
                row |= dict(zip(SENSORS, values[task, shot, step].tolist(), strict=True))
                row |= {name: float(value[task, shot, step]) for name, value in columns.items()}
                rows.append(row)
    return pd.DataFrame(rows)


def read(frame: pd.DataFrame | str | Path, **options: Any) -> Tasks:
    return Tasks.from_frame(frame, **{"sensors": SENSORS, "num_support": 1} | options)


# ------------------------------------------------------------------------------------------ what is read


def test_a_table_gives_the_tasks_that_it_was_made_of() -> None:
    times, values = torch.tensor([0.0, 0.1, 0.3, 0.7]), torch.randn(TASKS, SHOTS, POINTS, 2)
    expected = Tasks.from_trajectories(times, values, num_support=1)
    tasks = read(long_table(times, values))
    assert tasks.times.shape == (POINTS,)
    for name in ("times", "values", "observed", "scored", "initial", "states"):
        assert torch.equal(getattr(tasks, name), getattr(expected, name)), name
    assert tasks.num_support == 1 and tasks.inputs is None and tasks.true_latents is None


def test_the_order_of_rows_does_not_matter_but_for_the_numbers_of_tasks() -> None:
    frame = long_table()
    shuffled = frame.iloc[np.r_[3:0:-1, 0, len(frame) - 1 : 3 : -1]]
    expected = read(frame)
    tasks = read(shuffled)
    assert torch.equal(tasks.values[0, 0], expected.values[0, 0])
    assert torch.equal(tasks.values[1, 0], expected.values[2, 1])  # the one that appears next


def test_columns_may_have_any_names() -> None:
    frame = long_table().rename(columns={"task": "mouse", "shot": "day", "time": "t [s]"})
    tasks = read(frame, task="mouse", shot="day", time="t [s]", sensors=["speed"])
    assert torch.equal(tasks.values, read(long_table()).values[..., 1:])


@pytest.mark.parametrize("form", [str, Path])
def test_a_csv_file_is_read_like_its_table(form: type, tmp_path: Path) -> None:
    frame = long_table()
    path = tmp_path / "data.csv"
    frame.to_csv(path, index=False)
    assert torch.equal(read(form(path)).values, read(frame).values)


def test_a_parquet_file_is_read_like_its_table(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    frame = long_table()
    path = tmp_path / "data.parquet"
    frame.to_parquet(path)
    assert torch.equal(read(path).values, read(frame).values)


def test_empty_cells_are_missing_values() -> None:
    frame = long_table()
    frame.loc[5, "speed"] = np.nan  # task 0, shot 1, time 1
    tasks = read(frame)
    assert (~tasks.observed).nonzero().tolist() == [[0, 1, 1, 1]]
    assert not tasks.scored[0, 1, 1, 1] and tasks.values[0, 1, 1, 1] == 0.0
    assert_close(tasks.states[0, 1, 1, 1], torch.tensor(0.5 * (9.0 + 13.0)))


def test_text_columns_of_numbers_are_numbers() -> None:
    frame = long_table()
    frame["angle"] = frame["angle"].astype(str)
    assert torch.equal(read(frame).values, read(long_table()).values)


def test_irregular_clocks_are_kept_by_trajectory() -> None:
    times = torch.rand(TASKS, SHOTS, POINTS, dtype=torch.float64).sort(-1).values
    tasks = read(long_table(times), dtype=torch.float64)
    assert tasks.times.shape == (TASKS, SHOTS, POINTS)
    assert torch.equal(tasks.times, times) and tasks.observed.all()
    assert tasks.values.dtype == torch.float64


def shortened() -> pd.DataFrame:
    """The second shot of the first task has two rows, the first of the last task one."""
    frame = long_table()
    is_gone = (frame["task"] == "system 0") & (frame["shot"] == 10) & (frame["time"] > 0.6)
    is_gone |= (frame["task"] == "system 2") & (frame["shot"] == 0) & (frame["time"] > 0.0)
    return frame[~is_gone]


def test_shorter_trajectories_are_padded_and_padding_is_no_data() -> None:
    tasks, whole = read(shortened()), read(long_table())
    assert tasks.values.shape == whole.values.shape
    expected = torch.ones(TASKS, SHOTS, POINTS, 2, dtype=torch.bool)
    expected[0, 1, 2:] = False
    expected[2, 0, 1:] = False
    assert torch.equal(tasks.observed, expected)
    assert not (tasks.scored & ~expected).any()
    assert torch.equal(tasks.values, whole.values.where(expected, 0.0))


def test_padded_times_go_on_increasing_by_the_last_step() -> None:
    times = read(shortened()).times
    assert (torch.diff(times) > 0).all()
    assert_close(times[0, 1], torch.tensor([0.0, 0.5, 1.0, 1.5]))
    assert_close(times[2, 0], torch.tensor([0.0, 1.0, 2.0, 3.0]))


def test_padding_has_no_influence_on_encoders_and_likelihoods() -> None:
    encoder = ph.SetEncoder(2, POINTS, 3)
    shots = read(shortened()).shots()
    spoiled = torch.where(shots.observed, shots.values, 1e6)
    other = ph.Shots.from_tensors(
        shots.times, spoiled, shots.initial, observed=shots.observed, scored=shots.scored
    )
    assert torch.equal(encoder(shots), encoder(other))
    x = torch.distributions.Normal(torch.zeros(()), 1.0)
    likelihoods = [x.log_prob(s.values)[s.scored].sum() for s in (shots, other)]
    assert torch.equal(*likelihoods)


def test_states_at_padded_times_are_the_last_ones_known() -> None:
    states = read(shortened()).states
    assert torch.equal(states[0, 1, 2], states[0, 1, 1]) and states.isfinite().all()


def test_inputs_are_read_and_padded_with_their_last_value() -> None:
    push = torch.randn(TASKS, SHOTS, POINTS)
    frame = long_table(push=push)
    assert torch.equal(read(frame, inputs=["push"]).inputs[..., 0], push)
    short = frame.drop(index=[7])  # task 0, shot 1, its last time
    inputs = read(short, inputs=["push"]).inputs
    assert inputs[0, 1, 3, 0] == push[0, 1, 2] and inputs.isfinite().all()


def test_states_may_have_columns_of_their_own() -> None:
    states = torch.randn(TASKS, SHOTS, POINTS)
    tasks = read(long_table(state=states), initial=["state"])
    assert torch.equal(tasks.states[..., 0], states)
    assert torch.equal(tasks.initial[..., 0], states[:, :, 0])


def test_starts_may_be_unmeasured() -> None:
    tasks = read(long_table(), initial=None)
    assert tasks.initial is None and tasks.states is None and tasks.scored.all()


def test_a_single_time_is_legal_where_nothing_moves() -> None:
    tasks = read(long_table(torch.zeros(1), torch.randn(TASKS, SHOTS, 1, 2)), initial=None)
    assert tasks.values.shape == (TASKS, SHOTS, 1, 2) and tasks.times.shape == (1,)


def test_true_latents_are_read_by_task() -> None:
    mass = torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1).expand(TASKS, SHOTS, POINTS)
    tasks = read(long_table(mass=mass, drag=-mass), true_latents={"both": ["mass", "drag"]})
    assert_close(tasks.true_latents["both"], torch.tensor([[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]]))


# -------------------------------------------------------------------------------------------- what is refused


def changed(column: str, row: int, value: object) -> Callable[[], pd.DataFrame]:
    def make() -> pd.DataFrame:
        frame = long_table()
        frame[column] = frame[column].astype(object)
        frame.loc[row, column] = value
        return frame.rename(index={row: f"row {row}"})

    return make


def doubled() -> pd.DataFrame:
    frame = long_table()
    frame.loc[6, "time"] = 0.5
    return frame


BAD: dict[str, tuple[Callable[[], object], dict[str, Any], type[Exception], str]] = {
    "text among the values": (
        changed("angle", 5, "n/a"),
        {},
        ValueError,
        r"numbers in column 'angle'; got 'n/a' in row 'row 5'. Correct the cell, or leave it empty",
    ),
    "an infinite value": (
        changed("speed", 3, np.inf),
        {},
        ValueError,
        "finite numbers in column 'speed'; got inf in row 'row 3'",
    ),
    "text among the times": (
        changed("time", 2, "noon"),
        {},
        ValueError,
        "numbers in column 'time'; got 'noon' in row 'row 2'",
    ),
    "a missing time": (
        changed("time", 2, np.nan),
        {},
        ValueError,
        "a number in every row of column 'time'; got nan in row 'row 2'. Fill it in, or drop",
    ),
    "dates": (
        lambda: long_table().assign(time=pd.date_range("2020-01-01", periods=24)),
        {},
        ValueError,
        "numbers in column 'time'; got dates. Convert dates to seconds since the start",
    ),
    "a time twice": (
        doubled,
        {},
        ValueError,
        r"each time once in a trajectory \(column 'time'\); got 0.5 twice in task 'system 0', shot 10, "
        "the second one in row 6. Drop the doubled rows",
    ),
    "times that float32 can't tell apart": (
        lambda: long_table(1.7e9 + 0.1 * torch.arange(4.0, dtype=torch.float64)),
        {},
        ValueError,
        "times that differ in torch.float32; got times near 170000000.* Subtract the start",
    ),
    "a missing task": (
        changed("task", 4, None),
        {},
        ValueError,
        "a label in every row of column 'task'; got .* in row 'row 4'",
    ),
    "a shot too few": (
        lambda: long_table().iloc[:-POINTS],
        {},
        ValueError,
        "equally many shots of every task; got 2 of task 'system 0' and 1 of task 'system 2'",
    ),
    "a column that isn't there": (
        long_table,
        {"sensors": ["angle", "velocity"], "time": "t"},
        ValueError,
        r"the columns \['t', 'velocity'\]; got the columns \['task', 'shot', 'time', 'angle', 'speed'\]",
    ),
    "a sensor twice": (
        long_table,
        {"sensors": ["angle", "angle"]},
        ValueError,
        r"sensors of different names; got \['angle'\] twice. Name each column once",
    ),
    "a column twice": (
        lambda: pd.concat([long_table(), long_table()[["angle"]]], axis=1),
        {},
        ValueError,
        r"columns of different names; got \['angle'\] twice. Rename one",
    ),
    "one sensor as text": (
        long_table,
        {"sensors": "angle"},
        TypeError,
        r"sensors, a sequence of names of columns; got 'angle'. Pass sensors=\[",
    ),
    "no sensors": (long_table, {"sensors": []}, ValueError, "one sensor or more; got none"),
    "a missing input": (
        lambda: long_table(push=torch.full((TASKS, SHOTS, POINTS), torch.nan)),
        {"inputs": ["push"]},
        ValueError,
        "a number in every row of column 'push'; got nan in row 0, and 23 more such cells",
    ),
    "latents that change": (
        lambda: long_table(mass=torch.arange(24.0).view(TASKS, SHOTS, POINTS)),
        {"true_latents": {"mass": ["mass"]}},
        ValueError,
        r"one value of column 'mass' for each task \(column 'task'\); got 1.0 in row 1, and 20 more",
    ),
    "no rows": (lambda: long_table().iloc[:0], {}, ValueError, "a table with rows; got an empty"),
    "a tensor": (
        lambda: torch.zeros(3),
        {},
        TypeError,
        "a pandas DataFrame, or the path of a CSV or parquet file; got Tensor. Convert",
    ),
    "a file that isn't there": (
        lambda: "nowhere.csv",
        {},
        FileNotFoundError,
        "a file that exists; got nowhere.csv",
    ),
    "a single time with measured starts": (
        lambda: long_table(torch.zeros(1), torch.randn(TASKS, SHOTS, 1, 2)),
        {},
        ValueError,
        "two times or more, the first of which is the start; got one. Pass initial=None",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_refused_with_its_row_and_column(case: str) -> None:
    make, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        read(make(), **options)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.xlsx"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"ends in .csv or .parquet; got data.xlsx. Read it your"):
        read(path)


def test_without_pandas_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = long_table()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        ImportError, match=r"the module pandas; .*pip install 'pyro_hybrid\[tables\]'"
    ):
        read(frame)


def test_without_pyarrow_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ImportError,
        match=r"the module pyarrow; .*pip install 'pyro_hybrid\[parquet\]', or save the table as CSV\.",
    ):
        read(path)
