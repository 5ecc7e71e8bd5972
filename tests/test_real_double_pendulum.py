"""The real double pendulum: files, angles, clocks and splits on made-up runs; the yardstick also on the real ones."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import pyro_hybrid as ph
from pyro_hybrid.systems import DoublePendulum, Recordings, ibm_double_pendulum
from pyro_hybrid.systems import real_double_pendulum as real
from pyro_hybrid.systems.compound_pendulum import (
    compound,
    fitted,
    median_errors,
    open_loop,
    point_mass,
)

ROOT = Path(__file__).parents[1]
DATA = Path(
    os.environ.get("PYRO_HYBRID_DATA") or ROOT.parent / "shared" / "data" / "ibm_double_pendulum"
)
needs_data = pytest.mark.skipif(
    not (DATA / "0.csv").exists(), reason="needs IBM's recordings: set PYRO_HYBRID_DATA"
)
TRUE = torch.tensor([0.077, 0.104, 69.0, 7.15, 0.03, 0.009], dtype=torch.float64)
ONE = torch.ones((), dtype=torch.float64)


@functools.cache
def made_up(runs: int, seconds: float = 5.0, parameters: Tensor = TRUE) -> Recordings:
    """Exact states of compound pendulums let go from different angles."""
    torch.manual_seed(1)
    times = torch.arange(round(400 * seconds), dtype=torch.float64) / 400.0
    start = (
        *(1.5 * torch.randn(2, runs, dtype=torch.float64)),
        *torch.zeros(2, runs, dtype=torch.float64),
    )
    states = ph.solve(compound(parameters, ONE), start, times)
    return Recordings(dict(enumerate(states)))


def filmed(states: Tensor, arms: tuple[float, float] = (589.0, 450.5)) -> str:
    """What the camera would have written of a run: (y, x) of the three markers, y down, in whole fifths of a pixel."""
    red = torch.tensor([1200.0, 1190.0], dtype=torch.float64).expand(len(states), 2)
    arm = [
        length * torch.stack([angle.cos(), angle.sin()], -1)
        for length, angle in zip(arms, states.T, strict=False)
    ]
    rows = torch.cat([red, red + arm[0], red + arm[0] + arm[1]], -1).round().long()
    return "\n".join(",".join(map(str, row)) for row in rows.tolist()) + "\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two made-up runs, known by their checksums."""
    monkeypatch.delenv("PYRO_HYBRID_DATA", raising=False)
    for run, arms in ((0, (602.0, 461.0)), (5, (589.0, 450.5))):
        text = filmed(made_up(2).states[run // 5], arms).encode()
        (tmp_path / f"{run}.csv").write_bytes(text)
        monkeypatch.setitem(real.SHA256, run, hashlib.sha256(text).hexdigest())
    return tmp_path


# ---- files ---------------------------------------------------------------------------------------


def test_all_runs_have_checksums() -> None:
    assert sorted(real.SHA256) == list(range(21))
    assert (
        all(len(bytes.fromhex(one)) == 32 for one in real.SHA256.values())
        and len(set(real.SHA256.values())) == 21
    )


def test_runs_are_loaded_from_a_folder_or_from_the_one_that_the_environment_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings = ibm_double_pendulum(folder)
    assert recordings.runs == (0, 5)
    for run in (0, 5):
        error = recordings.states[run] - made_up(2).states[run // 5]
        turns = 2.0 * torch.pi * torch.round(error[0, :2] / (2.0 * torch.pi))
        assert (error[:, :2] - turns).abs().max() < 5e-3 and error[20:-20, 2:].std() < 0.2
    monkeypatch.setenv("PYRO_HYBRID_DATA", str(folder))
    assert torch.equal(ibm_double_pendulum().states[5], recordings.states[5])


def test_another_file_is_refused_by_its_name(folder: Path) -> None:
    with (folder / "5.csv").open("a") as file:
        file.write("1,2,3,4,5,6\n")
    with pytest.raises(
        ValueError, match=r"5\.csv with sha256 \w{64}; got \w{64}\. Fetch the file again"
    ):
        ibm_double_pendulum(folder)


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            FileNotFoundError, match="0.csv to 20.csv; got none of them in .* set PYRO_HYBRID_DATA"
        ):
            ibm_double_pendulum(place)


def archive(folder: Path, runs: dict[int, bytes]) -> Path:
    """As published, and with what isn't asked for."""
    path = folder / "archive.tar.gz"
    contents = {
        f"double-pendulum-chaotic/original/dpc_dataset_csv/{run}.csv": text
        for run, text in runs.items()
    }
    contents |= {
        "other/0.csv": b"no",
        "dpc_dataset_csv/../../../escaped.csv": b"no",
        "dpc_dataset_csv/99.csv": b"no",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, text in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return path


def test_runs_are_downloaded_and_nothing_else_is_unpacked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, cache = [], folder / "cache"
    cache.mkdir()
    path = archive(cache, {run: (folder / f"{run}.csv").read_bytes() for run in (0, 5)})
    retrieve = lambda *place, **options: asked.append((place, options)) or str(path)  # noqa: E731
    monkeypatch.setitem(
        sys.modules, "pooch", SimpleNamespace(retrieve=retrieve, os_cache=lambda name: cache / name)
    )
    assert ibm_double_pendulum().runs == (0, 5)
    assert asked == [((real.URL,), {"known_hash": real.ARCHIVE, "path": cache / "pyro_hybrid"})]
    assert sorted(p.name for p in (cache / "ibm_double_pendulum").iterdir()) == ["0.csv", "5.csv"]
    assert not list(folder.rglob("escaped.csv"))


def test_without_pooch_or_network_one_is_told_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(
        ImportError,
        match=r"expected the module pooch; got .*'pyro_hybrid\[data\]', or pass folder=",
    ):
        ibm_double_pendulum()

    def retrieve(*place: object, **options: object) -> str:
        raise OSError("no such host")

    monkeypatch.setitem(
        sys.modules, "pooch", SimpleNamespace(retrieve=retrieve, os_cache=lambda name: folder)
    )
    with pytest.raises(
        ConnectionError, match="recordings from https://.*; got no such host. Fetch them elsewhere"
    ):
        ibm_double_pendulum()


# ---- angles --------------------------------------------------------------------------------------


def test_zero_is_hanging_down_and_both_angles_turn_the_same_way() -> None:
    rows = torch.tensor(
        [[0, 0, 589, 0, 1039, 0], [0, 0, 0, 589, -450, 589], [10, 20, 30, 20, 50, 20]]
    )
    half = torch.pi / 2.0
    expected = torch.tensor([[0.0, 0.0], [half, torch.pi], [0.0, 0.0]], dtype=torch.float64)
    for row, angle in zip(rows, expected, strict=True):
        assert_close(real.angles(row[None])[0], angle)
    with pytest.raises(
        ValueError, match=r"rows of six numbers; got \(3, 5\)\. Give \(y, x\) of the red"
    ):
        real.angles(rows[:, :5])


def test_whole_turns_are_counted_whatever_the_camera_s_scale() -> None:
    turn = torch.linspace(0.0, 20.0, 400, dtype=torch.float64)
    rows = [
        np.loadtxt(
            io.StringIO(filmed(torch.stack([turn, -2.0 * turn], -1), arms)),
            delimiter=",",
            dtype=int,
        )
        for arms in ((589.0, 450.5), (602.0, 461.0))
    ]
    for pixels in rows:
        assert_close(
            real.angles(torch.from_numpy(pixels)),
            torch.stack([turn, -2.0 * turn], -1),
            rtol=0.0,
            atol=4e-3,
        )


def test_the_smoother_is_exact_for_polynomials_and_its_speeds_are_as_good_as_said() -> None:
    t = torch.arange(200, dtype=torch.float64) / 400.0
    angle = torch.stack([t**5 - 2.0 * t**2, 3.0 * t], -1)
    speed = torch.stack([5.0 * t**4 - 4.0 * t, torch.full_like(t, 3.0)], -1)
    assert_close(real.smoothed(angle), torch.cat([angle, speed], -1), rtol=0.0, atol=1e-8)
    noise = real.smoothed(1.2e-3 * torch.randn(20_000, 2, dtype=torch.float64))[20:-20, 2:]
    assert 0.06 < noise.std() < 0.1
    with pytest.raises(ValueError, match="21 frames or more; got 20. Record for longer"):
        real.smoothed(angle[:20])


# ---- tasks ---------------------------------------------------------------------------------------


def test_a_clock_that_runs_s_times_as_fast_shows_a_pendulum_of_s_squared_gravity_and_s_friction() -> (
    None
):
    tasks = made_up(3).tasks(8, 6, seed=0, points=40)
    scale = tasks.true_latents["scale"]
    assert 0.7 <= scale.min() < 0.85 and 1.2 < scale.max() <= 1.4
    assert_close(tasks.true_latents["gravity"], scale**2)
    states, angles = open_loop(compound, TRUE, tasks)
    measured = tasks.states
    assert_close(states[..., :2], angles, rtol=0.0, atol=5e-3)  # float32 starts of a chaotic motion
    assert_close(states.float(), measured, rtol=2e-3, atol=2e-2)
    wrong = dict(tasks.true_latents) | {"scale": torch.ones(8, 1)}
    lost, _ = open_loop(compound, TRUE, replace(tasks, true_latents=wrong))
    assert (lost[..., :2] - angles).square().mean().sqrt() > 0.1
    without = TRUE * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    assert (open_loop(compound, without, tasks)[0][..., :2] - angles).abs().max() > 0.02


def test_tasks_are_what_they_say_and_the_seed_s() -> None:
    recordings = made_up(3)
    one, same, other = (
        recordings.tasks(4, 6, seed=seed, points=30, step=0.02) for seed in (0, 0, 1)
    )
    assert (
        one.values.shape == (4, 6, 30, 2)
        and one.values.dtype == torch.float32
        and one.states.shape[-1] == 4
    )
    assert one.num_support == 3 and torch.equal(one.states[..., :2], one.values)
    assert one.values[:, :, 0].abs().max() <= torch.pi + 1e-5
    assert torch.equal(one.values, same.values) and not torch.equal(one.values, other.values)
    assert recordings.tasks(2, 4, seed=0, num_support=3).num_support == 3


def clocks(runs: int, frames: int) -> Recordings:
    """Runs in which the angles tell run and time."""
    time = torch.arange(frames, dtype=torch.float64) / 400.0
    flat = torch.zeros_like(time)
    return Recordings(
        {
            run: torch.stack([time / 10.0, flat + 0.1 * run, flat + 0.1, flat], -1)
            for run in range(runs)
        }
    )


def test_no_window_of_a_run_is_on_both_sides_of_a_split() -> None:
    learn, judge = clocks(6, 2400).split([1, 4])
    assert learn.runs == (0, 2, 3, 5) and judge.runs == (1, 4)
    for part in (learn, judge):
        seen = (part.tasks(20, 8, seed=0).values[..., 1] / 0.1).round().unique()
        assert seen.tolist() == list(part.runs)


def test_windows_of_a_task_share_no_frame() -> None:
    tasks = clocks(3, 2000).tasks(10, 12, seed=0, step=0.01, points=41)
    for values, scale in zip(tasks.values, tasks.true_latents["scale"], strict=True):
        begin, run = values[:, 0, 0] * 10.0, values[:, 0, 1]
        apart = (
            (begin[:, None] - begin).abs() + 1e3 * (run[:, None] - run).abs() + 1e3 * torch.eye(12)
        )
        assert apart.min() > 0.4 * float(scale) + 20.0 / 400.0
        assert values[..., 0].max() * 10.0 <= 1999.0 / 400.0 + 1e-4


@pytest.mark.parametrize("held_out", [[], [0, 1, 2], [2, 7]])
def test_a_split_leaves_runs_to_both_sides(held_out: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"some of the runs \(0, 1, 2\) to hold out, and not all; got \["
    ):
        clocks(3, 100).split(held_out)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"shots": 1}, "at least one task of two shots; got 2 of 1"),
        (
            {"shots": 90},
            "room for 90 windows of .* s in the runs .*; got room for .*Ask for fewer shots",
        ),
        ({"points": 1}, "a positive step and two points or more; got 0.01 and 1"),
        ({"step": 0.0}, "a positive step and two points or more; got 0.0 and 50"),
        (
            {"scale": (1.4, 0.7)},
            "the smaller first; got .1.4, 0.7.. Pass .1.0, 1.0. for the pendulum as it is",
        ),
        ({"points": 900}, "room for 4 windows of"),
    ],
)
def test_tasks_that_cannot_be_made_are_refused_with_words(
    asked: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        clocks(3, 2000).tasks(**{"tasks": 2, "shots": 4, "seed": 0} | asked)


# ---- the yardstick -------------------------------------------------------------------------------


def test_the_compound_pendulum_of_point_masses_is_the_double_pendulum() -> None:
    system, z = DoublePendulum(), {"gravity": torch.tensor([[9.0]]), "ratio": torch.tensor([[0.7]])}
    z = {key: value.double() for key, value in z.items()} | {
        "unknown": torch.tensor([[0.3, 0.2]]).double()
    }
    share = 0.7 / 1.7
    parameters = torch.tensor(
        [share, share, 9.0, 9.0 * share, 0.3 / 1.7, 0.2 / 1.7], dtype=torch.float64
    )
    state = tuple(torch.randn(4, 1, 50, dtype=torch.float64))
    for slope, expected in zip(
        compound(parameters, ONE)(ONE, state), system.full(z)(ONE, state), strict=True
    ):
        assert_close(slope, expected)


def energy(states: Tensor, parameters: Tensor) -> Tensor:
    """Above that of hanging still."""
    (q1, q2, w1, w2), (a, b, p1, p2, _, _) = states.unbind(-1), parameters
    kinetic = 0.5 * (w1**2 + a * w2**2) + b * (q1 - q2).cos() * w1 * w2
    return kinetic + p1 * (1.0 - q1.cos()) + p2 * (1.0 - q2.cos())


def test_friction_takes_energy_and_without_it_none_is_lost() -> None:
    frictionless = TRUE * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    kept, lost = (energy(made_up(4, 2.0, p).states[2], p) for p in (frictionless, TRUE))
    assert (kept / kept[0] - 1.0).abs().max() < 1e-4
    assert (lost.diff() < 1e-4 * lost[0]).all() and lost[-1] < 0.95 * lost[0]


def test_parameters_are_recovered_from_windows_by_other_clocks() -> None:
    tasks = made_up(4).tasks(3, 20, seed=0, step=0.01, points=21)
    assert_close(fitted(compound, tasks, (0.2,)), TRUE, rtol=0.02, atol=0.0)


def test_the_point_mass_model_is_fitted_too() -> None:
    truth = torch.tensor([80.0, 0.3], dtype=torch.float64)
    lever = truth[1] * 450.5 / 589.0
    whole = torch.stack(
        [lever * 450.5 / 589.0, lever, truth[0], lever * truth[0], 0.0 * lever, 0.0 * lever]
    )
    tasks = made_up(4, parameters=whole).tasks(1, 40, seed=0, step=0.01, points=11)
    assert_close(fitted(point_mass, tasks, (0.1,)), truth, rtol=1e-3, atol=0.0)


def test_errors_are_medians_over_windows_at_their_horizon() -> None:
    times = torch.tensor([3.0, 3.1, 3.2], dtype=torch.float64)
    predicted, observed = torch.zeros(2, 3, 3, 4), torch.zeros(2, 3, 3, 2)
    observed[..., 1, 0] = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 5.0]])
    observed[..., 2, :] = 0.5
    predicted[:, :2, 2] = torch.nan
    found = median_errors(predicted, observed, times, (0.1, 0.2))
    assert_close(found[0], torch.tensor(3.0 / 2.0**0.5)) and found[1] == torch.inf
    with pytest.raises(
        ValueError, match=r"observations at the horizons \(0\.05, 0\.1\); got times up to 0\.2"
    ):
        median_errors(predicted, observed, times, (0.05, 0.1))


def test_what_cannot_be_fitted_is_refused_with_words() -> None:
    tasks = DoublePendulum().simulate(2, 2, seed=0)
    with pytest.raises(
        ValueError,
        match="tasks with the scale of their clocks in true_latents; got .*Make them with",
    ):
        fitted(compound, tasks)
    with pytest.raises(
        ValueError, match="compound or point_mass; got .*Fit another model with scipy"
    ):
        fitted(lambda parameters, scale: compound(TRUE, scale), tasks)


# ---- the real one --------------------------------------------------------------------------------


@needs_data
def test_the_real_runs_are_those_published_and_lose_their_energy_as_they_should() -> None:
    recordings = ibm_double_pendulum(DATA)
    assert set(recordings.runs) >= set(range(14))
    for states in recordings.states.values():
        assert states.dtype == torch.float64 and 16_000 < len(states) < 20_000
        left = energy(states, TRUE).unfold(0, 800, 800).mean(-1)  # of every two seconds
        assert 10.0 < left[0] / left[-1] < 150.0 and (left.diff() < 0.02 * left[0]).all()


@needs_data
@pytest.mark.parametrize("part", ["in-sample", "held out"])
def test_the_committed_numbers_are_what_the_committed_parameters_give(part: str) -> None:
    written = json.loads((ROOT / "docs" / "results" / "real_double_pendulum.json").read_text())
    everything, row = ibm_double_pendulum(DATA), written[part]
    recordings = Recordings({run: everything.states[run] for run in row["judged on runs"]})
    tasks = recordings.tasks(1, row["windows"], 1, step=0.0025, points=401, scale=(1.0, 1.0))
    for model in (compound, point_mass):
        parameters = torch.tensor(row[model.__name__]["parameters"], dtype=torch.float64)
        errors = median_errors(
            *open_loop(model, parameters, tasks), tasks.times, written["horizons"]
        )
        assert_close(
            errors, torch.tensor(row[model.__name__]["errors"]).double(), rtol=0.05, atol=0.0
        )
    published = torch.tensor([0.003, 0.007, 0.014, 0.041, 0.129])
    assert (torch.tensor(row["compound"]["errors"]) < 2.0 * published).all()
