"""Steps of their own length, compiled steps and recomputed ones: all of them are RK4, and say the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample
from scripts import HANGING
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

import pyro_hybrid as ph
from pyro_hybrid.data.segments import to_segments
from pyro_hybrid.dynamics.failures import SolverError
from pyro_hybrid.dynamics.modes import halve_steps, nan_on_failure
from pyro_hybrid.dynamics.rk4 import SEGMENT
from pyro_hybrid.dynamics.solve import solve

ROUNDING = {"rtol": 0.0, "atol": 1e-13}


def grid(stop: float, points: int) -> Tensor:
    return torch.linspace(0.0, stop, points, dtype=torch.float64)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def start(tasks: int, shots: int) -> tuple[Tensor, Tensor]:
    return 1.0 + uniform(tasks, shots), uniform(tasks, shots)


def oscillator(rate: Tensor | float) -> Callable[..., tuple[Tensor, Tensor]]:
    """y'' = -rate² y."""
    return lambda t, state: (state[1], -(rate**2) * state[0])


def oscillation(angle: Tensor, speed: Tensor, rate: Tensor | float, times: Tensor) -> Tensor:
    """What the oscillator does, (..., time, 2)."""
    rate = torch.as_tensor(rate, dtype=times.dtype)
    angle, speed, rate = (x.unsqueeze(-1) for x in torch.broadcast_tensors(angle, speed, rate))
    cos, sin = torch.cos(rate * times), torch.sin(rate * times)
    return torch.stack([angle * cos + speed / rate * sin, speed * cos - angle * rate * sin], -1)


def driven(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return state[1], torch.cos(3.0 * t) * state[0] - 0.1 * state[1]


def driven_grid(t: Tensor, y: Tensor) -> Tensor:
    return torch.cos(3.0 * t) * y - 0.1 * y**2


class Counting:
    """A field that knows how often it was asked."""

    def __init__(self, field: Callable[..., Any]) -> None:
        self.field, self.calls = field, 0

    def __call__(self, t: Tensor, state: Any) -> Any:
        self.calls += 1
        return self.field(t, state)


# ------------------------------------------------------------------------------------------------- steps of a length


def errors(states: Tensor, truth: Tensor, ends: slice) -> tuple[float, float]:
    """At the ends of steps, and between them."""
    off, between = (
        (states - truth).abs().amax((0, 1, 3)),
        torch.ones(states.shape[2], dtype=torch.bool),
    )
    between[ends] = False
    return float(off[ends].max()), float(off[between].max())


def test_states_at_the_ends_of_steps_and_between_them_converge_with_order_four() -> None:
    times, y0 = grid(3.0, 193), start(2, 3)
    truth = oscillation(*y0, 2.0, times)
    found = [
        errors(solve(oscillator(2.0), y0, times, step=3.0 / n), truth, slice(0, None, 192 // n))
        for n in (12, 24, 48, 96)
    ]
    orders = torch.tensor(found[:-1]).div(torch.tensor(found[1:])).log2()
    assert_close(orders, torch.full((3, 2), 4.0), rtol=0.0, atol=0.25)


@pytest.mark.parametrize("step", [0.3, 0.7, 5.0])
def test_a_path_that_is_a_cubic_of_time_is_exact_at_all_times(step: float) -> None:
    times = torch.tensor([0.0, 0.11, 0.3, 1.0, 1.1, 1.93, 2.0], dtype=torch.float64)
    states = solve(lambda t, state: (3.0 * t**2, torch.ones_like(t)), start(1, 2), times, step=step)
    expected = torch.stack([times**3, times], -1).expand(1, 2, 7, 2)
    assert_close(states - states[..., :1, :], expected, **ROUNDING)


# Of a span of 2 and observations every 0.1.
LENGTHS = {
    "shorter than the spacing": (0.04, 50),
    "the spacing": (0.1, 20),
    "no divisor of it": (0.15, 14),
    "longer than it": (0.7, 3),
    "a divisor of the span": (0.5, 4),
    "the span": (2.0, 1),
    "longer than the span": (9.0, 1),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_steps_are_as_long_as_asked_for_or_a_little_less(case: str) -> None:
    step, number = LENGTHS[case]
    times, y0, field = grid(2.0, 21), start(2, 3), Counting(oscillator(1.5))
    states = solve(field, y0, times, step=step)
    assert field.calls == 4 * number + 1 and states.shape == (2, 3, 21, 2)
    on_ends = solve(oscillator(1.5), y0, grid(2.0, number + 1))
    assert_close(states[..., -1, :], on_ends[..., -1, :], **ROUNDING)
    size, h = 1.5 * states.abs().max(), 1.5 * 2.0 / number
    assert (states - oscillation(*y0, 1.5, times)).abs().max() < (0.1 * h**4 + 1e-13) * size


@pytest.mark.parametrize("substeps", [1, 3])
@pytest.mark.parametrize("field", [driven, driven_grid])
def test_steps_that_fit_the_observations_are_substeps(
    field: Callable[..., Any], substeps: int
) -> None:
    times, y0 = grid(3.0, 11), start(2, 3) if field is driven else uniform(2, 3, 4)
    fitting = solve(field, y0, times, step=0.3 / substeps)
    assert_close(fitting, solve(field, y0, times, substeps=substeps), **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clocks", [False, True], ids=["one clock", "a clock for each shot"])
@pytest.mark.parametrize("field", [driven, driven_grid])
def test_the_first_state_is_the_initial_one_to_the_last_bit(
    field: Callable[..., Any], clocks: bool, dtype: torch.dtype
) -> None:
    y0 = torch.randn(2, 3, 4, dtype=dtype)
    times = torch.tensor([0.1, 0.2, 0.7], dtype=dtype) + (
        torch.arange(3.0, dtype=dtype).unsqueeze(-1) if clocks else 0
    )
    states = solve(
        field, y0 if field is driven_grid else (y0[..., 0], y0[..., 1]), times, step=0.13
    )
    assert states.dtype == dtype
    assert torch.equal(states[:, :, 0], y0 if field is driven_grid else y0[..., :2])


@pytest.mark.parametrize("field", [driven, driven_grid])
def test_shots_whose_clocks_differ_by_an_offset_are_each_solved_as_if_alone(
    field: Callable[..., Any],
) -> None:
    y0 = start(2, 3) if field is driven else uniform(2, 3, 4)
    clocks = grid(1.0, 8) + torch.tensor([[0.0], [0.25], [7.0]], dtype=torch.float64)
    together = solve(field, y0, clocks, step=0.3)
    for shot in range(3):
        one = (
            tuple(part[:, shot : shot + 1] for part in y0)
            if isinstance(y0, tuple)
            else y0[:, shot : shot + 1]
        )
        assert_close(
            together[:, shot : shot + 1],
            solve(field, one, clocks[shot], step=0.3),
            rtol=0.0,
            atol=1e-12,
        )
    assert (together[:, 0] - together[:, 2]).abs().max() > 0.05  # the clock matters


def test_segments_of_measured_trajectories_have_clocks_that_differ_by_an_offset_in_float32_too() -> (
    None
):
    times = torch.linspace(0.0, 100.0, 1001)
    tasks = ph.Tasks.from_trajectories(times, torch.rand(2, 3, 1001, 2), num_support=1)
    shots = to_segments(tasks.episode().query, 37)
    start = shots.initial.unbind(-1)
    states = solve(oscillator(1.0), start, shots.times, step=0.2)
    truth = oscillation(*(part.double() for part in start), 1.0, 0.1 * torch.arange(38).double())
    assert_close(states.double(), truth, rtol=0.0, atol=1e-3)


CLOCKS = {
    "by shot": torch.stack([grid(1.0, 8), grid(1.0, 8) ** 2 + 3.0, 0.2 * grid(1.0, 8) - 1.0]),
    "by task": torch.stack([grid(1.0, 8), grid(2.0, 8) ** 2 + 3.0]).unsqueeze(1),
    "by task and shot": grid(1.0, 8) ** torch.tensor([[[1.0], [2.0], [1.5]], [[0.7], [1.0], [3.0]]])
    + torch.tensor([[[0.0], [5.0], [1.0]], [[-3.0], [0.0], [2.0]]]),
}


@pytest.mark.parametrize("unit", [1.0, 1e-7])
@pytest.mark.parametrize("case", CLOCKS)
def test_steps_of_a_length_are_taken_by_each_trajectory_s_own_clock(case: str, unit: float) -> None:
    y0, clocks = start(2, 3), CLOCKS[case]
    span = (clocks[..., -1] - clocks[..., 0]).max()

    def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(slope / unit for slope in driven(t / unit, state))

    together = solve(field, y0, unit * clocks, step=0.1 * unit)
    number = int(torch.ceil(span / 0.1 - 1e-4))
    for task in range(2):
        for shot in range(3):
            clock = clocks.expand(2, 3, 8)[task, shot]
            one = tuple(part[task : task + 1, shot : shot + 1] for part in y0)
            alone = solve(driven, one, clock, step=float(clock[-1] - clock[0]) / number)
            found = together[task : task + 1, shot : shot + 1]
            assert_close(found, alone, rtol=0.0, atol=1e-9 if unit != 1.0 else 1e-12)
    assert torch.equal(together[:, :, 0], torch.stack(y0, -1))


@pytest.mark.parametrize("case", CLOCKS)
def test_steps_of_a_length_of_a_field_on_a_grid_are_taken_by_each_clock(case: str) -> None:
    clocks, rest = CLOCKS[case].expand(2, 3, 8), torch.zeros(2, 3, 4, dtype=torch.float64)
    states = solve(lambda t, y: torch.cos(t).expand_as(y), rest, CLOCKS[case], step=0.05)
    waves = torch.sin(clocks) - torch.sin(clocks[..., :1])
    assert_close(states, waves.unsqueeze(-1).expand(2, 3, 8, 4), rtol=0.0, atol=1e-6)


def test_with_clocks_of_different_spacing_a_trajectory_is_good_up_to_its_failure() -> None:
    clocks = torch.stack([grid(2.0, 9), grid(4.0, 9)])
    with nan_on_failure():
        states = solve(spoiled, (torch.ones(5, 2, dtype=torch.float64),), clocks, step=0.02)
    assert_close(states[3, 0, :3, 0], torch.exp(-grid(2.0, 9)[:3]), rtol=0.0, atol=1e-6)
    assert states[3, 0, 3:].isnan().all() and states[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("particles", [(2,), (3,), (5, 3)])
@pytest.mark.parametrize("clocks", [False, True], ids=["one clock", "a clock for each shot"])
def test_batch_axes_of_what_the_field_captured_are_the_states_own(
    particles: tuple[int, ...], clocks: bool
) -> None:
    times, y0, rate = grid(1.0, 4), start(2, 3), 1.0 + uniform(*particles, 2, 1)
    clock = times + torch.arange(3).unsqueeze(-1) if clocks else times
    states = solve(oscillator(rate), y0, clock, step=0.02)
    assert states.shape == (*particles, 2, 3, 4, 2)
    assert_close(states, oscillation(*y0, rate, times), rtol=0.0, atol=1e-6)
    assert torch.equal(states[..., 0, :], torch.stack(y0, -1).expand(*particles, 2, 3, 2))


def test_batch_axes_of_what_a_field_on_a_grid_captured_are_the_states_own() -> None:
    times, profile, rate = grid(1.0, 4), uniform(2, 3, 5), uniform(4, 2, 1, 1)
    states = solve(lambda t, y: -rate * y, profile, times, step=0.03)
    assert states.shape == (4, 2, 3, 4, 5)
    truth = profile.unsqueeze(-2) * torch.exp(-rate.unsqueeze(-1) * times.unsqueeze(-1))
    assert_close(states, truth, rtol=0.0, atol=1e-6)


KNOW_NOTHING = {
    "constants in a tuple": lambda t, state: (torch.tensor(1.0), torch.tensor(-2.0)),
    "a constant on a grid": lambda t, y: torch.tensor([1.0, -2.0], dtype=torch.float64),
}


@pytest.mark.parametrize("field", [*KNOW_NOTHING.values()], ids=[*KNOW_NOTHING])
def test_slopes_that_know_nothing_of_the_batch_hold_for_all_of_it(
    field: Callable[..., Any],
) -> None:
    times, y0, slope = (
        grid(1.0, 6),
        uniform(3, 2, 2),
        torch.tensor([1.0, -2.0], dtype=torch.float64),
    )
    initial = y0 if isinstance(field(times[0], y0), Tensor) else y0.unbind(-1)
    assert_close(solve(field, initial, times), y0.unsqueeze(-2) + times.unsqueeze(-1) * slope)
    assert_close(
        solve(field, initial, times, step=0.3), y0.unsqueeze(-2) + times.unsqueeze(-1) * slope
    )


# ----------------------------------------------------------------------------------------------------------- gradients


def pendulum(
    t: Tensor, angle: Tensor, speed: Tensor, rate: Tensor, damping: Tensor
) -> tuple[Tensor, Tensor]:
    return speed, torch.cos(t) - damping * speed - rate * angle.sin()


@pytest.mark.parametrize("clocks", [False, True], ids=["one clock", "a clock for each shot"])
def test_gradients_through_steps_of_a_length_reach_captured_tensors_and_initial_states(
    clocks: bool,
) -> None:
    times = torch.tensor([0.0, 0.2, 0.35, 1.0], dtype=torch.float64)
    times = times + torch.arange(3).unsqueeze(-1) if clocks else times

    def states(angle: Tensor, speed: Tensor, rate: Tensor, damping: Tensor) -> Tensor:
        return solve(lambda t, y: pendulum(t, *y, rate, damping), (angle, speed), times, step=0.3)

    inputs = [x.requires_grad_() for x in (*start(2, 3), 1.0 + uniform(2, 1), uniform(2, 1))]
    assert gradcheck(states, inputs, atol=1e-7, rtol=1e-6)


def test_gradients_through_steps_of_a_length_reach_what_a_field_on_a_grid_captured() -> None:
    def states(profile: Tensor, rate: Tensor) -> Tensor:
        return solve(lambda t, y: -rate * y.roll(1, -1) * y, profile, grid(1.0, 5), step=0.3)

    assert gradcheck(
        states, [uniform(2, 2, 4).requires_grad_(), uniform(3, 2, 1, 1).requires_grad_()]
    )


def loop(
    field: Callable[..., tuple[Tensor, Tensor]], initial: tuple[Tensor, ...], knots: Tensor
) -> Tensor:
    """RK4 as it is in the books."""
    y, path = torch.stack(initial), [torch.stack(initial)]
    for t, h in zip(knots[:-1], knots.diff(), strict=True):
        k1 = torch.stack(field(t, y.unbind()))
        k2 = torch.stack(field(t + h / 2, (y + h / 2 * k1).unbind()))
        k3 = torch.stack(field(t + h / 2, (y + h / 2 * k2).unbind()))
        k4 = torch.stack(field(t + h, (y + h * k3).unbind()))
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        path.append(y)
    return torch.stack(path, -1).movedim(0, -1)


def gradients(states: Tensor, of: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(0.5, 1.5, states.numel(), dtype=states.dtype).view(states.shape)
    return [*torch.autograd.grad((weights * states.square()).sum(), of)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("form", ["substeps", "step"])
@pytest.mark.parametrize("number", [3, 40])
def test_values_and_gradients_are_those_of_the_plain_loop(
    number: int, form: str, dtype: Any, tolerance: float
) -> None:
    times, knots = grid(2.0, 5).to(dtype), grid(2.0, 4 * number + 1).to(dtype)
    inputs = [
        x.to(dtype).requires_grad_() for x in (*start(2, 3), 1.0 + uniform(2, 1), uniform(2, 1))
    ]

    def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pendulum(t, *state, *inputs[2:])

    options = {"substeps": number} if form == "substeps" else {"step": 0.5 / number}
    states, truth = (
        solve(field, (*inputs[:2],), times, **options),
        loop(field, (*inputs[:2],), knots)[:, :, ::number],
    )
    for found, expected in zip(
        [states, *gradients(states, inputs)], [truth, *gradients(truth, inputs)], strict=True
    ):
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("steps", [2 * SEGMENT + 1, 3 * SEGMENT])
def test_a_last_segment_of_any_length_is_recomputed_right(steps: int) -> None:
    rate, one = (
        torch.tensor(0.7, dtype=torch.float64, requires_grad=True),
        torch.ones(1, 1, dtype=torch.float64),
    )
    states = solve(lambda t, y: (-rate * y[0],), (one,), grid(1.0, 2), substeps=steps)
    (gradient,) = torch.autograd.grad(states[0, 0, -1, 0], rate)
    assert_close(gradient, -torch.exp(-rate.detach()), rtol=1e-8, atol=0.0)


# -------------------------------------------------------------------------------------------------------------- memory


def kept(steps: int, options: dict[str, Any]) -> int:
    """Bytes that autograd keeps for the backward pass."""
    total, rate = 0, torch.rand(20, 1, dtype=torch.float64, requires_grad=True)

    def pack(x: Tensor) -> Tensor:
        nonlocal total
        total += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        states = solve(oscillator(rate), start(20, 5), grid(1.0, 3), **options)
    assert states.requires_grad
    return total


@pytest.mark.parametrize("form", ["substeps", "step"])
def test_what_is_kept_for_the_gradient_stops_growing(form: str) -> None:
    sizes = {
        n: kept(n, {"substeps": n // 2} if form == "substeps" else {"step": 1.0 / n})
        for n in (64, 128, 800)
    }
    assert sizes[128] > 1.8 * sizes[64] and sizes[800] < 3.0 * sizes[128]


@pytest.mark.parametrize(
    ("steps", "grad", "again"), [(128, True, 0), (192, True, 1), (192, False, 0)]
)
def test_only_long_paths_with_a_gradient_are_computed_twice(
    steps: int, grad: bool, again: int
) -> None:
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    field = Counting(oscillator(rate))
    with torch.set_grad_enabled(grad):
        states = solve(field, start(1, 1), grid(1.0, 2), substeps=steps)
    assert field.calls == 4 * steps
    if grad:
        states.sum().backward()
    assert field.calls == 4 * steps * (1 + again)


@pytest.mark.parametrize("steps", [100, 200])
def test_random_numbers_in_a_field_are_the_same_when_they_are_recomputed(steps: int) -> None:
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def end() -> Tensor:
        torch.manual_seed(0)
        one = torch.ones(1, 1, dtype=torch.float64)
        states = solve(
            lambda t, y: (-rate * torch.rand(()) * y[0],), (one,), grid(1.0, 2), substeps=steps
        )
        return states[0, 0, -1, 0]

    state = end()
    (gradient,) = torch.autograd.grad(state, rate)
    assert_close(
        gradient, state.detach().log() * state.detach() / rate.detach(), rtol=1e-3, atol=0.0
    )  # nearly linear


class Lazy(ph.HybridModel):
    """Draws its latent where the field first asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = PyroSample(dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
        self.factor = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, steps: int) -> tuple[Tensor, Tensor]:
        one = torch.ones(1, 1, dtype=torch.float64)
        states = solve(
            lambda t, y: (-self.rate * self.factor * y[0],), (one,), grid(1.0, 2), substeps=steps
        )
        return states[0, 0, -1, 0], self.rate


def test_latents_that_are_attributes_have_the_right_gradient() -> None:
    model = Lazy()
    state, rate = model(100)
    (gradient,) = torch.autograd.grad(state, model.factor)
    assert_close(gradient, -rate * torch.exp(-rate), rtol=1e-6, atol=0.0)


def test_latents_that_would_be_drawn_anew_when_steps_are_recomputed_are_refused() -> None:
    model = Lazy()
    state, _ = model(200)
    with pytest.raises(
        RuntimeError, match="the same slope when it is called again.*before the field is defined"
    ):
        torch.autograd.grad(state, model.factor)


# ----------------------------------------------------------------------------------------------------------- half steps


@pytest.mark.parametrize("options", [{"substeps": 4}, {"step": 0.13}], ids=str)
def test_halved_steps_have_a_sixteenth_of_the_error(options: dict[str, Any]) -> None:
    times, y0, field = grid(3.0, 7), start(2, 3), Counting(oscillator(2.0))

    def error() -> float:
        return float(
            (solve(field, y0, times, **options) - oscillation(*y0, 2.0, times)).abs().max()
        )

    once, asked = error(), field.calls
    with halve_steps():
        assert 15.0 < once / error() < 17.0
        assert field.calls - asked == pytest.approx(2 * asked, abs=1)
        with halve_steps():
            assert 14.0**2 < once / error() < 18.0**2
    with pytest.raises(KeyError), halve_steps():
        raise KeyError
    assert error() == once  # outside, everything is as it was


# ------------------------------------------------------------------------------------------------------------ failures

BAD = {
    "a step of nothing": (
        {"step": 0.0},
        "a positive and finite step, without substeps; got step=0.0 and substeps=1. Pass one",
    ),
    "a step backwards": (
        {"step": -0.1},
        r"a positive and finite step, without substeps; got step=-0.1",
    ),
    "a step that is no number": (
        {"step": torch.nan},
        r"a positive and finite step, without substeps; got step=nan",
    ),
    "a step without end": ({"step": torch.inf}, "a positive and finite step.*got step=inf"),
    "step and substeps": (
        {"step": 0.1, "substeps": 2},
        r"without substeps; got step=0.1 and substeps=2. Pass one of",
    ),
    "step with dopri5": (
        {"step": 0.1, "method": "dopri5"},
        "step and compile with method='rk4' only; got method='dopri5'. The adaptive methods choose",
    ),
    "compile with dopri8": (
        {"compile": True, "method": "dopri8"},
        "with method='rk4' only; got method='dopri8'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_steps_that_make_no_sense_are_refused_with_words(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        solve(driven, start(1, 1), grid(1.0, 3), **options)


def spoiled(t: Tensor, state: tuple[Tensor]) -> tuple[Tensor]:
    """y' = -y, but no number in task 3 after 0.5."""
    rows = torch.arange(state[0].shape[-2]).unsqueeze(-1)
    return (torch.where((rows == 3) & (t > 0.5), torch.nan, -state[0]),)


# Steps of 0.4, of which the second asks for a slope at 0.6; with clocks, the shot that starts at 0.2 is lost first.
@pytest.mark.parametrize(
    ("offsets", "index", "time", "steps"), [(None, (3, 0), 0.8, 2), ([-5.0, 0.2], (3, 1), 0.6, 1)]
)
@pytest.mark.parametrize("halved", [False, True])
def test_a_failure_names_the_end_of_the_step_and_the_number_of_steps(
    offsets: list[float] | None, index: tuple[int, int], time: float, steps: int, halved: bool
) -> None:
    times = grid(2.0, 41) + (
        0.0 if offsets is None else torch.tensor(offsets, dtype=torch.float64).unsqueeze(-1)
    )
    halvings = halve_steps() if halved else torch.enable_grad()
    with halvings, pytest.raises(SolverError, match=r"in task 3 .* after \d+ steps") as caught:
        solve(spoiled, (torch.ones(5, 2, dtype=torch.float64),), times, step=0.4)
    error = caught.value
    assert error.index == index
    if halved:  # steps of 0.2
        time, steps = (0.6, 3) if offsets is None else (0.6, 2)
    assert error.time == pytest.approx(time) and error.steps == steps


def test_as_values_failures_leave_the_other_trajectories_alone() -> None:
    times = grid(2.0, 9)
    with nan_on_failure():
        states = solve(spoiled, (torch.ones(5, 2, dtype=torch.float64),), times, step=0.02)
    good = [0, 1, 2, 4]
    assert_close(states[good].squeeze(-1), torch.exp(-times).expand(4, 2, 9), rtol=0.0, atol=1e-6)
    assert states[3, :, 3:].isnan().all()


def test_as_values_a_trajectory_is_good_up_to_its_failure() -> None:
    with nan_on_failure():
        states = solve(spoiled, (torch.ones(5, 2, dtype=torch.float64),), grid(2.0, 9), step=0.02)
    assert_close(states[3, 0, :3, 0], torch.exp(-grid(2.0, 9)[:3]), rtol=0.0, atol=1e-6)


def test_a_last_slope_that_is_no_number_is_a_failure_too() -> None:
    # t³/3: the slopes of the one step are asked for at y = 0, 0, 0 and 0.25, that at its end at y = 0.33.
    with pytest.raises(SolverError):
        states = solve(
            lambda t, y: (torch.where(y[0] > 0.3, torch.nan, t**2),),
            (uniform(1, 1) * 0.0,),
            grid(1.0, 3),
            step=1.0,
        )
        assert states.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- compiled

# In processes of their own: as users run it, without the checks of shapes that pytest puts around every function.
COMPILING = """
import json, sys, warnings
from contextlib import nullcontext
import torch
from torch import Tensor
import pyro_hybrid as ph
from pyro_hybrid.data.segments import to_segments
from pyro_hybrid.dynamics import rk4 as stepping
from pyro_hybrid.dynamics.failures import SolverError

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
times, clocks = torch.linspace(0.0, 1.0, 5), torch.linspace(0.0, 1.0, 5) + torch.tensor([[0.0], [2.0]])
really, graphs = torch.compile, 0

def backend(graph, inputs):
    global graphs
    graphs += 1
    return graph.forward

def traced(function, *, options=None, **others):
    return really(function, backend=backend, **others)

def swing(rate):
    return lambda t, y: (y[1], torch.cos(t) - rate * y[0].sin())

def other(rate):
    return lambda t, y: (y[1], torch.sin(t) - rate * y[0])

def warmth(rate):
    pad = torch.nn.functional.pad
    return lambda t, y: rate.unsqueeze(-1) * pad(y[..., 2:] - 2 * y[..., 1:-1] + y[..., :-2], (1, 1))

def branch(rate):
    return lambda t, y: (y[1], -rate * y[0] if float(t) > 0.5 else -rate * y[0].sin())

def branch_on_states(rate):
    return lambda t, y: (y[1], -rate * y[0] if y[0].max() > 0.5 else -rate * y[0].sin())

def item(rate):
    return lambda t, y: (y[1], -rate * t.item() * y[0])

def printing(rate):
    return lambda t, y: (y[1], print(end="") or -rate * y[0])

def run(form, rate, initial, times, context=nullcontext, **options):
    rate, *initial = (x.clone().requires_grad_(x.requires_grad) for x in (rate, *initial))
    with context():
        states = ph.solve(form(rate), tuple(initial) if len(initial) > 1 else initial[0], times, **options)
    of = [x for x in (rate, *initial) if x.requires_grad]
    return [states.detach(), *(torch.autograd.grad(states.square().sum(), of) if states.requires_grad else [])]

def compare(form=swing, tasks=3, shots=2, batch=(), times=times, grad=True, initial_grad=False, dtype=torch.float64,
            **options):
    "Largest difference, relative, between compiled and eager values, and gradients; number of graphs; warnings."
    before = graphs
    rate = torch.rand(*batch, tasks, 1, dtype=dtype).requires_grad_(grad)
    shape, parts = ((tasks, shots, 6), 1) if form is warmth else ((tasks, shots), 2)
    initial = [torch.rand(shape, dtype=dtype).requires_grad_(initial_grad) for _ in range(parts)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", ".torch.jit.", DeprecationWarning)  # torch itself, on its way to inductor
        found = run(form, rate, initial, times.to(dtype), compile=True, **options)
    expected = run(form, rate, initial, times.to(dtype), **options)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
    return {"off": max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected)),
            "gradients": len(found) - 1, "graphs": graphs - before,
            "warnings": [[w.category.__name__, str(w.message)] for w in caught]}

def afresh(**options):
    stepping._compiled.clear()
    torch._dynamo.reset()
    return compare(**options)
"""

TRACED = (
    COMPILING
    + """
out = {"seconds": [stepping.seconds_compiling()]}
out["no compiler"] = [compare(), compare()]  # with inductor, whose compiler can't be found
stepping._compiled.clear()
torch.compile = traced
out["batches"] = [compare(tasks=n) for n in (3, 5, 8, 13)]
out["another field"] = [compare(form=other, tasks=n) for n in (3, 5, 8, 13)]
out["back to the first"] = [compare(tasks=n) for n in (4, 6)]
out["initial states with a gradient"] = [compare(tasks=5, initial_grad=True)]
out["steps of a length"] = [compare(tasks=5, step=0.07)]
out["recomputed steps"] = [compare(tasks=5, substeps=50)]
out["a clock for each shot"] = [afresh(times=clocks), compare(times=clocks, step=0.13)]
out["on a grid"] = [afresh(form=warmth), compare(form=warmth, times=clocks),
                    compare(form=warmth, step=0.13, batch=(7,))]
out["particles"] = [afresh(batch=(7,)), compare(batch=(4,), tasks=5, step=0.13)]
out["without gradients"] = [afresh(context=torch.no_grad), compare(grad=False), compare(grad=False, initial_grad=True)]
out["inference mode"] = [afresh(grad=False, context=torch.inference_mode)]
out["float32"] = [afresh(dtype=torch.float32)]
for form in (branch, branch_on_states, printing, item):
    out[form.__name__] = [compare(form=form), compare(form=form)]
silent = {"grad": False, "context": torch.no_grad}
sizes = [{}, {"tasks": 5}, {"shots": 5}, {"shots": 1}, {"tasks": 1}, {"tasks": 1, "shots": 1}]
out["many uses"] = [afresh(**silent), *(compare(**silent, **size) for size in sizes), compare(**silent, times=clocks),
                    compare(**silent, batch=(7,)), compare(**silent, batch=(7,), shots=1), compare()]
out["seconds"].append(stepping.seconds_compiling())
words = {}
for name, field in {"too few": lambda t, y: (y[1],), "blows up": lambda t, y: (y[0] ** 2, y[1])}.items():
    try:
        ph.solve(field, (torch.full((2, 1), 4.0), torch.ones(2, 1)), times, compile=True, substeps=50)
    except (TypeError, SolverError) as error:
        words[name] = [type(error).__name__, str(error)]
out["words"] = words
print(json.dumps(out))
"""
)

COMPILED = (
    COMPILING
    + """
out = {"batches": [compare(tasks=n) for n in (3, 5, 8, 13)], "steps of a length": [compare(tasks=5, step=0.07)],
       "initial states with a gradient": [compare(tasks=5, initial_grad=True)],
       "recomputed steps": [compare(tasks=5, substeps=50)]}
from torch._dynamo.utils import counters
out["graphs"], out["seconds"] = counters["stats"]["unique_graphs"], stepping.seconds_compiling()
print(json.dumps(out))
"""
)


def script(source: str, **environment: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=HANGING,
        cwd=Path(__file__).parent.parent,
        env=os.environ | environment,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """With torch.compile's first half, which needs no C++ compiler: it isn't found."""
    cache = str(tmp_path_factory.mktemp("inductor"))
    yield script(TRACED, CXX="/nonexistent/g++", TORCHINDUCTOR_CACHE_DIR=cache)


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, Any]]:
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    yield script(COMPILED)


def agree(runs: list[dict[str, Any]], tolerance: float = 1e-12) -> bool:
    return all(run["off"] <= tolerance for run in runs)


def warned(runs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [warning for run in runs for warning in run["warnings"]]


USES = {  # and how many gradients there are to compare
    "batches": [1] * 4,
    "another field": [1] * 4,
    "back to the first": [1] * 2,
    "initial states with a gradient": [3],
    "steps of a length": [1],
    "recomputed steps": [1],
    "a clock for each shot": [1, 1],
    "on a grid": [1] * 3,
    "particles": [1] * 2,
    "without gradients": [0, 0, 2],
    "inference mode": [0],
    "float32": [1],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", USES)
def test_traced_steps_give_the_values_and_gradients_of_eager_ones(
    traced: dict[str, Any], case: str
) -> None:
    assert agree(traced[case], 1e-5 if case == "float32" else 1e-12) and not warned(traced[case])
    assert [run["gradients"] for run in traced[case]] == USES[case]


def test_one_compilation_serves_all_sizes_of_a_batch_and_none_another_field(
    traced: dict[str, Any],
) -> None:
    for case in ("batches", "another field"):  # the first size of all is taken for a constant
        first, second, *later = (run["graphs"] for run in traced[case])
        assert first == 1 and second <= 1 and not any(later)
    for case in (
        "back to the first",
        "initial states with a gradient",
        "steps of a length",
        "recomputed steps",
    ):
        assert not any(run["graphs"] for run in traced[case])


REASONS = {
    "branch": "data-dependent",
    "branch_on_states": "data-dependent",
    "printing": "builtin",
    "no compiler": r"no working c\+\+ compiler",
}


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_be_compiled_is_said_once_and_solved_all_the_same(
    traced: dict[str, Any], case: str
) -> None:
    first, second = traced[case]
    ((category, message),) = first["warnings"]
    assert category == "RuntimeWarning" and not second["warnings"] and agree([first, second])
    words = rf"solve\(..., compile=True\) goes on without compiling. .*{REASONS[case]}.* C\+\+ compiler must be"
    assert re.match(words, message, re.IGNORECASE)


def test_numbers_taken_out_of_tensors_are_compiled_or_not_but_right(traced: dict[str, Any]) -> None:
    assert agree(traced["item"]) and len(warned(traced["item"])) <= 1


def test_many_uses_of_one_field_are_no_reason_to_stop_compiling(traced: dict[str, Any]) -> None:
    assert agree(traced["many uses"], 1e-5)
    assert not warned(traced["many uses"])


def test_mistakes_and_failures_have_the_same_words_when_compiled(traced: dict[str, Any]) -> None:
    kind, words = traced["words"]["too few"]
    assert kind == "TypeError" and "a tuple of 2 slopes; got a tuple of 1" in words
    kind, words = traced["words"]["blows up"]
    assert kind == "SolverError" and "the state stopped being finite in task 0" in words


def test_the_time_spent_compiling_is_known(traced: dict[str, Any]) -> None:
    nothing, something = traced["seconds"]
    assert nothing == 0.0 and something > 0.0


@pytest.mark.slow
def test_compiled_steps_give_the_values_and_gradients_of_eager_ones(
    compiled: dict[str, Any],
) -> None:
    for case in (
        "batches",
        "steps of a length",
        "initial states with a gradient",
        "recomputed steps",
    ):
        assert agree(compiled[case]) and not warned(compiled[case])
        assert [run["gradients"] for run in compiled[case]] == USES[case]
    assert compiled["graphs"] <= 2 and compiled["seconds"] > 0.0
