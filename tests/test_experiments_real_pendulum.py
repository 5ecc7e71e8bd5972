"""The experiment on the real double pendulum, on made-up runs; and the system that it is as, against closed forms."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from experiments import real_learned
from experiments import real_pendulum as real
from experiments.run import Choice, carry_out
from matplotlib.figure import Figure
from torch import Tensor
from torch.testing import assert_close

import pyro_hybrid as ph
from pyro_hybrid.systems import RecordedDoublePendulum, Recordings
from pyro_hybrid.systems.compound_pendulum import RODS, compound, open_loop, point_mass

TRUE = torch.tensor([0.077, 0.104, 69.0, 7.15, 0.03, 0.009], dtype=torch.float64)
ONE = torch.ones((), dtype=torch.float64)


@functools.cache
def made_up(runs: int = 4, seconds: float = 14.0) -> Recordings:
    """Compound pendulums let go from different angles, with the noise of smoothed recordings."""
    torch.manual_seed(1)
    times = torch.arange(round(400 * seconds), dtype=torch.float64) / 400.0
    start = (
        *(1.5 * torch.randn(2, runs, dtype=torch.float64)),
        *torch.zeros(2, runs, dtype=torch.float64),
    )
    states = ph.solve(compound(TRUE, ONE), start, times)
    return Recordings(dict(enumerate(states + 1e-3 * torch.randn_like(states))))


def state(number: int = 50) -> tuple[Tensor, ...]:
    """Random states of a task."""
    random = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(4, 1, number, generator=random, dtype=torch.float64) * torch.tensor(3.0)
    )


def constantly(*values: Any) -> Any:
    """A force that is always the same, in the system's units."""
    return lambda *felt: tuple(
        value / unit for value, unit in zip(values, RecordedDoublePendulum.UNITS, strict=True)
    )


# ---- the system ----------------------------------------------------------------------------------


def test_without_a_force_it_is_two_point_masses() -> None:
    share, gravity = 0.2, torch.tensor([[70.0]], dtype=torch.float64)
    slopes = RecordedDoublePendulum(share).known(
        {"gravity": gravity}, constantly(0.0, 0.0, 0.0, 0.0)
    )(ONE, state())
    expected = point_mass(torch.tensor([70.0, share], dtype=torch.float64), ONE)(ONE, state())
    for slope, other in zip(slopes, expected, strict=True):
        assert_close(slope, other)


def test_damping_rates_are_the_compound_pendulums_friction() -> None:
    share, gravity = 0.2, torch.tensor([[70.0]], dtype=torch.float64)
    beta, alpha = share * RODS, share * RODS**2
    parameters = torch.tensor(
        [alpha, beta, 70.0, 70.0 * beta, 0.3, 0.4 * alpha], dtype=torch.float64
    )
    slopes = RecordedDoublePendulum(share).known(
        {"gravity": gravity}, constantly(0.0, 0.0, 0.3, 0.4)
    )(ONE, state())
    for slope, other in zip(slopes, compound(parameters, ONE)(ONE, state()), strict=True):
        assert_close(slope, other)


def test_torques_are_in_units_of_gravity_and_of_the_lower_arms_inertia() -> None:
    system, still = RecordedDoublePendulum(0.2), tuple(torch.zeros(4, 1, 1, dtype=torch.float64))
    beta, alpha = 0.2 * RODS, 0.2 * RODS**2
    slopes = system.known({"gravity": 70.0 * ONE}, constantly(0.5, 0.25, 0.0, 0.0))(ONE, still)
    assert_close(slopes[2] + beta * slopes[3], torch.full_like(slopes[2], 0.5 * 70.0))
    assert_close(
        beta * slopes[2] + alpha * slopes[3], torch.full_like(slopes[2], alpha * 0.25 * 70.0)
    )


def test_what_is_felt_is_the_same_by_any_clock_and_backwards_in_time() -> None:
    system, (upper, lower, speed1, speed2) = RecordedDoublePendulum(), state()
    felt = system.felt(70.0 * ONE, (upper, lower, speed1, speed2))
    faster = system.felt(70.0 * 1.3**2 * ONE, (upper, lower, 1.3 * speed1, 1.3 * speed2))
    backwards = system.felt(70.0 * ONE, (upper, lower, -speed1, -speed2))
    assert len(felt) == len(system.inputs)
    for one, other, third in zip(felt, faster, backwards, strict=True):
        assert_close(one, other)
        assert_close(one, third)


def test_nobody_can_simulate_it() -> None:
    with pytest.raises(
        NotImplementedError, match=r"can be simulated; got a real pendulum\. Make tasks with"
    ):
        RecordedDoublePendulum().simulate(2, 2, seed=0)
    with pytest.raises(
        NotImplementedError, match=r"torques are known; got a real pendulum\. Judge the latents by"
    ):
        RecordedDoublePendulum().truth(torch.ones(1, 1))


# ---- judging -------------------------------------------------------------------------------------


def test_the_stretch_of_a_window_is_where_it_begins() -> None:
    settings = real_learned.FAST
    time = torch.arange(5600, dtype=torch.float64) / 400.0
    told = Recordings(
        {
            run: torch.stack(
                [time / 10.0, 0.0 * time + 0.1 * run, 0.0 * time + 0.1, 0.0 * time], -1
            )
            for run in (2, 5)
        }
    )
    start = real_learned.cut_tasks(
        told, settings.judged, 4 + settings.queries, 3, points=101
    ).values[:, :, 0]
    expected = (start[..., 1] * 10.0).round() * 1000 + (start[..., 0] * 10.0 / real.STRETCH).floor()
    assert torch.equal(real.stretches(told, settings, 3), expected.long())


def test_the_runs_to_learn_from_and_to_judge_on_are_those_of_the_page_whatever_else_is_there() -> (
    None
):
    recordings = Recordings({run: torch.full((100, 4), float(run)) for run in range(21)})
    learn, judge = real.split_runs(recordings)
    assert learn.runs == tuple(range(10)) and judge.runs == (10, 11, 12, 13)
    assert all(float(learn.states[run][0, 0]) == run for run in learn.runs)
    page = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert "Learned on\nruns 0 to 9, judged on windows of runs 10 to 13" in page


def test_a_run_that_is_missing_is_named() -> None:
    recordings = Recordings({run: torch.zeros(100, 4) for run in range(13)})
    with pytest.raises(ValueError, match=r"got none of runs \[13\]\. Put their files"):
        real.split_runs(recordings)


def test_intervals_of_the_ratio_hold_what_they_should() -> None:
    random = torch.Generator().manual_seed(1)
    theirs = torch.rand(300, 2, generator=random, dtype=torch.float64) + 1.0
    places = torch.arange(300)
    low, high = real.intervals(0.5 * theirs, theirs, places, 100)
    assert_close(low, torch.full_like(low, 0.5))
    assert_close(high, low)
    ours = theirs * (1.0 + 0.2 * torch.randn(300, 2, generator=random, dtype=torch.float64))
    low, high = real.intervals(ours, theirs, places, 100)
    ratio = ours.median(0).values / theirs.median(0).values
    assert bool(((low < ratio) & (ratio < high)).all()) and bool((high - low < 0.2).all())
    few_low, few_high = real.intervals(ours, theirs, places % 6, 100)
    assert bool((high - low > 0.0).all()) and bool((few_high - few_low > 0.0).all())


def test_windows_counted_twice_make_no_interval_narrower() -> None:
    random = torch.Generator().manual_seed(2)
    ours, theirs = torch.rand(2, 60, 1, generator=random, dtype=torch.float64) + 1.0
    once, many = (
        real.intervals(ours.repeat(k, 1), theirs.repeat(k, 1), torch.arange(60).repeat(k), 200)
        for k in (1, 9)
    )
    assert float(many[1] - many[0]) > 0.8 * float(once[1] - once[0])


SHARE = float(TRUE[1]) / RODS
DAMPED = float(TRUE[4]), float(TRUE[5]) / (SHARE * RODS**2)


class Told(torch.nn.Module):
    """A prior that knows the clock without looking."""

    def __init__(self, clock: Tensor) -> None:
        super().__init__()
        self.clock = clock

    def belief(self, support: ph.Shots, program: object) -> Any:
        """Return a belief whose distributions have the true means."""
        distributions = {
            "gravity": SimpleNamespace(mean=float(TRUE[2]) * self.clock.square()),
            "unknown": SimpleNamespace(mean=self.clock),
        }
        return SimpleNamespace(distributions=lambda: distributions)


class Knowing(ph.models.MetaHybridVAE):
    """The hybrid program with point masses' inertia and the true friction for a neural term."""

    def force(self, unknown: Tensor) -> Any:
        return constantly(0.0, 0.0, *(rate * unknown[..., None, 0] for rate in DAMPED))


def test_a_model_that_knows_everything_errs_as_the_truth_does() -> None:
    windows = real_learned.cut_tasks(made_up(), 3, 8, 0, points=101)
    assert windows.true_latents is not None
    model = Knowing(RecordedDoublePendulum(SHARE))
    model.prior = Told(windows.true_latents["scale"])  # type: ignore[assignment]
    states, latents = real.predict_windows(model, windows)
    parameters = torch.stack(
        [SHARE * RODS**2 * ONE, TRUE[1], TRUE[2], TRUE[1] * TRUE[2], TRUE[4], TRUE[5]]
    )
    ours = real.errors(states, windows)
    theirs = real.errors(
        open_loop(compound, parameters, windows)[0][:, real_learned.SUPPORT :], windows
    )
    assert_close(ours[:, :3], theirs[:, :3], rtol=0.01, atol=1e-4)
    assert_close(
        real.damping(model, latents, windows), windows.true_latents["scale"] * torch.tensor(DAMPED)
    )


def test_what_diverged_counts_as_infinitely_wrong() -> None:
    windows = real_learned.cut_tasks(made_up(), 1, 6, 0, points=101)
    states = torch.full((1, 2, 101, 4), torch.nan)
    assert bool(real.errors(states, windows).isinf().all())


# ---- as a stranger runs it -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_fast_run_ends_in_a_table_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "ibm_double_pendulum", lambda folder: made_up(runs=21))
    (one,) = found = carry_out(real, Choice((0,), True, tmp_path))
    assert one["learned from runs"] == list(range(10))
    assert one["judged on runs"] == [10, 11, 12, 13]
    assert (
        one["query_windows"] == real_learned.FAST.judged * real_learned.FAST.queries
        and len(one["ratio"]) == 5
    )
    assert one["log_gravity_strong"] > 0.9
    text = real.table(found)
    assert "hybrid / compound, seed 0" in text and "nan" not in text
    drawn = real.figure([one, one])
    assert isinstance(drawn, Figure) and len(drawn.axes) == 3
    drawn.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
