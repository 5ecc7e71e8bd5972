"""solve against closed forms, and its failures against what they should say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Note
from scripts import HANGING
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

import pyro_hybrid as ph
from pyro_hybrid.dynamics.failures import SolverError
from pyro_hybrid.dynamics.modes import (
    halve_steps,
    nan_on_failure,
    record_solutions,
    skip_integration,
)
from pyro_hybrid.dynamics.slopes import inside_transform
from pyro_hybrid.dynamics.solve import solve

METHODS = ["rk4", "dopri5", "dopri8"]
ADAPTIVE = METHODS[1:]
EXACT = {"rtol": 0.0, "atol": 1e-12}
# Differences over less than 1e-4 would see adaptive steps change.
GRADIENTS = {"eps": 1e-4, "atol": 1e-6, "rtol": 1e-6}

every_method = pytest.mark.parametrize("method", METHODS)
adaptive_methods = pytest.mark.parametrize("method", ADAPTIVE)


def grid(stop: float, points: int) -> Tensor:
    return torch.linspace(0.0, stop, points, dtype=torch.float64)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def ones(*shape: int) -> tuple[Tensor]:
    return (torch.ones(*shape, dtype=torch.float64),)


def oscillator(rate: Tensor | float) -> Callable[..., tuple[Tensor, Tensor]]:
    """y'' = -rate² y."""
    return lambda t, state: (state[1], -(rate**2) * state[0])


def oscillation(angle: Tensor, speed: Tensor, rate: Tensor, times: Tensor) -> Tensor:
    """What the oscillator does, (..., time, 2)."""
    angle, speed, rate = (x.unsqueeze(-1) for x in torch.broadcast_tensors(angle, speed, rate))
    cos, sin = torch.cos(rate * times), torch.sin(rate * times)
    return torch.stack([angle * cos + speed / rate * sin, speed * cos - angle * rate * sin], -1)


def start(tasks: int, shots: int) -> tuple[Tensor, Tensor]:
    return 1.0 + uniform(tasks, shots), uniform(tasks, shots)


# ------------------------------------------------------------------------------------------------------------ accuracy


def test_rk4_converges_with_order_four() -> None:
    times, y0 = grid(3.0, 7), start(2, 3)
    truth = oscillation(*y0, torch.tensor(2.0), times)
    errors = [
        float((solve(oscillator(2.0), y0, times, substeps=n) - truth).abs().max())
        for n in (4, 8, 16, 32)
    ]
    orders = torch.tensor(errors[:-1]).div(torch.tensor(errors[1:])).log2()
    assert_close(orders, torch.full((3,), 4.0), rtol=0.0, atol=0.1)


@every_method
def test_a_slope_that_is_a_cubic_of_time_is_integrated_exactly(method: str) -> None:
    times = torch.tensor([0.0, 0.3, 1.0, 1.1, 2.0], dtype=torch.float64)
    states = solve(
        lambda t, state: (4.0 * t**3, torch.ones_like(t)), start(1, 2), times, method=method
    )
    assert_close(
        states - states[..., :1, :], torch.stack([times**4, times], -1).expand(1, 2, 5, 2), **EXACT
    )


@adaptive_methods
@pytest.mark.parametrize("tolerance", [1e-4, 1e-7, 1e-10])
def test_adaptive_methods_keep_the_tolerance_at_output_times(method: str, tolerance: float) -> None:
    times, y0 = grid(15.0, 16), start(1, 2)
    states = solve(oscillator(1.0), y0, times, method=method, rtol=0.0, atol=tolerance)
    error = (states - oscillation(*y0, torch.tensor(1.0), times)).abs().amax((0, 1, 3))
    assert (
        error <= tolerance * (1.0 + times)
    ).all()  # an error of the tolerance for every unit of time


def test_output_times_are_landed_on_although_a_step_ends_on_one_by_itself() -> None:
    times = 0.5 * torch.arange(20, dtype=torch.float64)
    for k in range(8, 28):
        tolerance = 10.0 ** (4 * k / 79 - 10)
        states = solve(
            lambda t, y: (-y[0],), ones(1, 1), times, method="dopri8", rtol=0.0, atol=tolerance
        )
        # Asked to land on all times at once, torchdiffeq misses by 160 to 190 tolerances at some of these.
        assert (states.flatten() - torch.exp(-times)).abs().max() <= tolerance


@adaptive_methods
def test_a_fast_trajectory_is_the_same_alone_and_among_slow_ones(method: str) -> None:
    times, y0 = grid(2.0, 5), torch.ones(64, 1, dtype=torch.float64)
    rate = torch.full((64, 1), 0.1, dtype=torch.float64)
    rate[17] = 40.0
    together = solve(oscillator(rate), (y0, y0), times, method=method, rtol=1e-4, atol=1e-4)
    alone = solve(
        oscillator(rate[17:18]), (y0[17:18], y0[17:18]), times, method=method, rtol=1e-4, atol=1e-4
    )
    assert_close(
        together[17:18], alone, **EXACT
    )  # with torchdiffeq's own norm, of all errors together, it isn't


@adaptive_methods
def test_every_trajectory_of_a_batch_of_mixed_stiffness_keeps_the_tolerance(method: str) -> None:
    times, y0, tolerance = grid(2.0, 5), start(64, 1), 1e-6
    rate = torch.logspace(-1.0, 1.5, 64, dtype=torch.float64).unsqueeze(-1)
    states = solve(oscillator(rate), y0, times, method=method, rtol=tolerance, atol=tolerance)
    error = (states - oscillation(*y0, rate, times)).abs().amax((1, 2, 3))
    size = oscillation(*y0, rate, times).abs().amax((1, 2, 3))
    assert (error <= 3.0 * tolerance * (1.0 + size) * (1.0 + 2.0 * rate[:, 0])).all()


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
def test_each_of_64_trajectories_of_mixed_stiffness_is_the_same_alone_and_in_a_batch(
    method: str, tolerance: float, figure: Note
) -> None:
    times, (y0,) = grid(2.0, 5), (1.0 + uniform(64, 1),)
    rate = torch.logspace(-1.0, 2.5, 64, dtype=torch.float64).unsqueeze(-1)

    def relaxed(rows: slice) -> Tensor:
        def field(t: Tensor, y: tuple[Tensor]) -> tuple[Tensor]:
            return (-rate[rows] * (y[0] - torch.cos(t)),)

        return solve(
            field, (y0[rows],), times, method=method, substeps=100, rtol=tolerance, atol=tolerance
        )

    together = relaxed(slice(None))
    apart = torch.stack([(relaxed(slice(i, i + 1)) - together[i]).abs().max() for i in range(64)])
    assert together.isfinite().all() and apart.max() <= (
        0.0 if method == "rk4" else 10.0 * tolerance
    ), apart.max()
    worst = float(apart.max())
    figure("stiffness", **{"rk4": worst} if method == "rk4" else {"adaptive": worst / tolerance})


def test_a_frictionless_double_pendulum_keeps_its_energy(figure: Note) -> None:
    gravity, ratio = 6.0 + 8.0 * uniform(6, 1), 0.5 + 1.5 * uniform(6, 1)
    system = ph.systems.DoublePendulum()
    field = system.known(
        {"gravity": gravity, "ratio": ratio}, lambda *angles: (torch.zeros(()), torch.zeros(()))
    )
    y0 = (*(2.4 * uniform(2, 6, 2) - 1.2), *(uniform(2, 6, 2) - 0.5))
    states = solve(field, y0, grid(10.0, 41), method="dopri8", rtol=1e-9, atol=1e-9)

    t1, t2, w1, w2 = states.unbind(-1)
    g, m = gravity.unsqueeze(-1), ratio.unsqueeze(-1)
    kinetic = 0.5 * (1 + m) * w1**2 + 0.5 * m * w2**2 + m * w1 * w2 * torch.cos(t1 - t2)
    energy = kinetic - (1 + m) * g * t1.cos() - m * g * t2.cos()
    drift = (energy / energy[..., :1] - 1.0).abs().max()
    assert kinetic.std(-1).min() > 0.1 and drift < 1e-6  # they do move
    figure("energy", drift=float(drift))


# ----------------------------------------------------------------------------------------------------------- gradients


@every_method
def test_gradients_reach_captured_latents_and_initial_states(method: str) -> None:
    times = grid(1.5, 4)

    def states(angle: Tensor, speed: Tensor, rate: Tensor, damping: Tensor) -> Tensor:
        def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return state[1], torch.cos(t) - damping * state[1] - rate * state[0].sin()

        return solve(field, (angle, speed), times, method=method, rtol=1e-9, atol=1e-9)

    latents = [x.requires_grad_() for x in (*start(2, 3), 1.0 + uniform(2, 1), uniform(2, 1))]
    assert gradcheck(states, latents, **GRADIENTS)


@every_method
def test_gradients_reach_latents_of_fields_on_a_grid(method: str) -> None:
    def states(profile: Tensor, rate: Tensor) -> Tensor:
        def field(t: Tensor, y: Tensor) -> Tensor:
            return torch.nn.functional.pad(
                rate * (y[..., :-2] - 2.0 * y[..., 1:-1] + y[..., 2:]), (1, 1)
            )

        return solve(field, profile, grid(1.0, 3), method=method, rtol=1e-9, atol=1e-9)

    assert gradcheck(
        states, [uniform(2, 1, 4).requires_grad_(), uniform(2, 1, 1).requires_grad_()], **GRADIENTS
    )


@every_method
def test_the_gradient_in_a_frequency_is_the_closed_form_s(method: str) -> None:
    times, rate = grid(2.0, 9), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    states = solve(
        oscillator(rate), (one, zero), times, method=method, substeps=20, rtol=1e-9, atol=1e-9
    )
    for k in range(1, len(times)):
        (gradient,) = torch.autograd.grad(states[0, 0, k, 0], rate, retain_graph=True)
        assert_close(gradient, -times[k] * torch.sin(rate.detach() * times[k]), rtol=0.0, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- shapes


@every_method
def test_tuple_and_tensor_states_agree(method: str) -> None:
    times, y0 = grid(2.0, 6), start(3, 2)
    matrix = torch.tensor([[0.0, 1.0], [-4.0, -0.1]], dtype=torch.float64)
    as_tensor = solve(lambda t, y: y @ matrix.T, torch.stack(y0, -1), times, method=method)
    as_tuple = solve(lambda t, y: (y[1], -4.0 * y[0] - 0.1 * y[1]), y0, times, method=method)
    assert as_tensor.shape == (3, 2, 6, 2)
    assert_close(as_tuple, as_tensor, **EXACT)


@every_method
@pytest.mark.parametrize("particles", [(2,), (5,), (2, 3)])
def test_parameters_may_have_more_axes_than_the_initial_state(
    method: str, particles: tuple[int, ...]
) -> None:
    times, y0, rate = grid(1.0, 4), start(2, 3), 1.0 + uniform(*particles, 2, 1)
    states = solve(oscillator(rate), y0, times, method=method, substeps=20)
    assert states.shape == (*particles, 2, 3, 4, 2)
    assert_close(states, oscillation(*y0, rate, times), rtol=0.0, atol=1e-6)
    for index in (
        torch.cartesian_prod(*map(torch.arange, particles)).reshape(-1, len(particles)).tolist()
    ):
        alone = solve(oscillator(rate[tuple(index)]), y0, times, method=method, substeps=20)
        assert_close(states[tuple(index)], alone, rtol=0.0, atol=1e-14 if method == "rk4" else 1e-5)


@every_method
def test_parameters_of_a_field_on_a_grid_may_have_more_axes_than_its_state(method: str) -> None:
    times, profile, rate = grid(1.0, 4), uniform(2, 3, 5), uniform(4, 2, 1, 1)
    states = solve(lambda t, y: -rate * y, profile, times, method=method, substeps=20)
    assert states.shape == (4, 2, 3, 4, 5)
    truth = profile.unsqueeze(-2) * torch.exp(-rate.unsqueeze(-1) * times.unsqueeze(-1))
    assert_close(states, truth, rtol=0.0, atol=1e-6)


@every_method
def test_components_of_different_shapes_broadcast(method: str) -> None:
    times, angle, speed = grid(1.0, 4), uniform(3, 2), uniform(3, 1)
    states = solve(oscillator(1.0), (angle, speed), times, method=method)
    assert_close(
        states, solve(oscillator(1.0), (angle, speed.expand(3, 2)), times, method=method), **EXACT
    )


@every_method
def test_slopes_that_know_nothing_of_the_batch_hold_for_all_of_it(method: str) -> None:
    times, y0 = (
        grid(1.0, 3),
        start(2, 2),
    )  # as many components as shots: none may be taken for the other
    states = solve(
        lambda t, state: (torch.tensor(1.0), torch.tensor(-2.0)), y0, times, method=method
    )
    slope = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert_close(states, torch.stack(y0, -1).unsqueeze(-2) + times.unsqueeze(-1) * slope, **EXACT)


def test_float32_stays_float32() -> None:
    times, y0 = torch.linspace(0.0, 1.0, 3), (torch.ones(1, 1), torch.zeros(1, 1))
    for method in METHODS:
        states = solve(oscillator(1.0), y0, times, method=method)
        assert states.dtype == torch.float32
        assert_close(states[0, 0, :, 0], times.cos(), rtol=0.0, atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- clocks


def driven(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return state[1], torch.cos(3.0 * t) * state[0] - 0.1 * state[1]


@every_method
def test_shots_with_clocks_of_their_own_are_each_solved_as_if_alone(method: str) -> None:
    y0 = start(2, 3)
    clocks = grid(1.0, 5) + torch.tensor([[0.0], [0.25], [7.0]], dtype=torch.float64)
    options = {"method": method, "substeps": 3, "rtol": 1e-9, "atol": 1e-9}
    together = solve(driven, y0, clocks, **options)
    for shot in range(3):
        alone = solve(
            driven, (y0[0][:, shot : shot + 1], y0[1][:, shot : shot + 1]), clocks[shot], **options
        )
        assert_close(
            together[:, shot : shot + 1], alone, rtol=0.0, atol=1e-12 if method == "rk4" else 1e-7
        )
    assert (together[:, 0] - together[:, 2]).abs().max() > 0.05  # the clock matters


@every_method
def test_a_slope_of_time_alone_is_integrated_by_each_shot_s_clock(method: str) -> None:
    clocks = grid(1.0, 4) + torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    waves = (torch.sin(clocks) - torch.sin(clocks[:, :1])).expand(3, 2, 4)
    rest = torch.zeros(3, 2, 2, dtype=torch.float64)
    as_tuple = solve(
        lambda t, y: (torch.cos(t),), (rest[..., 0],), clocks, method=method, substeps=20
    )
    assert_close(as_tuple.squeeze(-1), waves, rtol=0.0, atol=1e-7)
    on_grid = solve(
        lambda t, y: torch.cos(t).expand_as(y), rest, clocks, method=method, substeps=20
    )
    assert_close(on_grid, as_tuple.expand(3, 2, 4, 2), **EXACT)


CLOCKS = {
    "by shot": torch.stack([grid(1.0, 5), grid(1.0, 5) ** 2 + 3.0, 0.2 * grid(1.0, 5) - 1.0]),
    "by task": torch.stack([grid(1.0, 5), grid(2.0, 5) ** 2 + 3.0]).unsqueeze(1),
    "by task, offsets only": (grid(1.0, 5) + torch.tensor([[0.0], [7.0]])).unsqueeze(1).double(),
    "by task and shot": grid(1.0, 5) ** torch.tensor([[[1.0], [2.0], [1.5]], [[0.7], [1.0], [3.0]]])
    + torch.tensor([[[0.0], [5.0], [1.0]], [[-3.0], [0.0], [2.0]]]),
}


@every_method
@pytest.mark.parametrize("case", CLOCKS)
def test_each_trajectory_is_solved_by_its_own_clock_as_if_alone(case: str, method: str) -> None:
    y0, clocks = start(2, 3), CLOCKS[case]
    options = {"method": method, "rtol": 1e-9, "atol": 1e-9}
    together = solve(driven, y0, clocks, **options)
    assert together.shape == (2, 3, 5, 2)
    for task in range(2):
        for shot in range(3):
            one = tuple(part[task : task + 1, shot : shot + 1] for part in y0)
            alone = solve(driven, one, clocks.expand(2, 3, 5)[task, shot], **options)
            assert_close(
                together[task : task + 1, shot : shot + 1],
                alone,
                rtol=0.0,
                atol=1e-12 if method == "rk4" else 1e-7,
            )


@every_method
@pytest.mark.parametrize("case", CLOCKS)
def test_a_field_on_a_grid_is_solved_by_the_clock_of_each_trajectory(
    case: str, method: str
) -> None:
    clocks = CLOCKS[case].expand(2, 3, 5)
    rest = torch.zeros(2, 3, 4, dtype=torch.float64)
    states = solve(
        lambda t, y: torch.cos(t).expand_as(y), rest, CLOCKS[case], method=method, substeps=20
    )
    waves = torch.sin(clocks) - torch.sin(clocks[..., :1])
    assert_close(states, waves.unsqueeze(-1).expand(2, 3, 5, 4), rtol=0.0, atol=1e-5)


@every_method
def test_clocks_by_task_hold_for_particles_of_latents(method: str) -> None:
    y0, rate = start(2, 3), 1.0 + uniform(4, 2, 1)
    clocks = CLOCKS["by task and shot"]
    states = solve(oscillator(rate), y0, clocks, method=method, substeps=20)
    truth = oscillation(*y0, rate, clocks - clocks[..., :1])
    assert_close(states, truth, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("case", CLOCKS)
@every_method
def test_the_time_of_a_failure_is_by_the_trajectory_s_own_clock(case: str, method: str) -> None:
    clocks = CLOCKS[case].expand(2, 3, 5)
    late = clocks[1, 2, 3]

    def field(t: Tensor, state: tuple[Tensor]) -> tuple[Tensor]:
        rows = torch.tensor([[0, 0, 0], [0, 0, 1]], dtype=torch.bool)
        return (torch.where(rows & (t > late), torch.nan, -state[0]),)

    with pytest.raises(SolverError) as caught:
        solve(field, ones(2, 3), CLOCKS[case], method=method)
    assert caught.value.index == (1, 2)
    assert float(late) < caught.value.time <= float(clocks[1, 2, 4])


# ------------------------------------------------------------------------------------------------------------ failures


def spoiled(task: int, after: float, value: float = torch.nan) -> Callable[..., tuple[Tensor]]:
    """y' = -y, but for one task, whose slope is ``value`` after some time."""

    def field(t: Tensor, state: tuple[Tensor]) -> tuple[Tensor]:
        rows = torch.arange(state[0].shape[-2]).unsqueeze(-1)
        return (torch.where((rows == task) & (t > after), value, -state[0]),)

    return field


@every_method
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_slope_that_is_no_number_is_reported_with_task_time_and_steps(
    method: str, value: float
) -> None:
    message = r"stopped being finite in task 3 .* at t = .* after \d+ steps\. Shorten"
    with pytest.raises(SolverError, match=message) as caught:
        solve(spoiled(3, 0.5, value), ones(5, 2), grid(2.0, 21), method=method)
    error = caught.value
    assert error.task == 3 and error.index == (3, 0)
    assert 0.5 < error.time < 1.0 and error.steps > 0 and "finite" in error.cause


@every_method
def test_a_state_that_blows_up_is_reported_where_it_does(method: str) -> None:
    y0 = 0.1 + torch.zeros(2, 3, dtype=torch.float64)
    y0[1, 2] = 2.0  # y' = y²: infinite at 1 / y0
    with pytest.raises(SolverError) as caught:
        solve(lambda t, y: (y[0] ** 2,), (y0,), grid(2.0, 21), method=method, substeps=20)
    assert caught.value.task == 1 and caught.value.index == (1, 2)
    assert caught.value.time == pytest.approx(0.5, abs=0.2 if method == "rk4" else 1e-3)


@every_method
def test_the_time_of_a_failure_is_by_the_shot_s_own_clock(method: str) -> None:
    clocks = grid(1.0, 11) + torch.tensor([[0.0], [4.0]], dtype=torch.float64)
    with pytest.raises(SolverError) as caught:
        solve(spoiled(0, 4.5), ones(1, 2), clocks, method=method)
    assert caught.value.index == (0, 1) and 4.5 < caught.value.time < 5.0


@every_method
def test_a_failure_among_particles_names_the_task(method: str) -> None:
    rate = torch.ones(4, 3, 1, dtype=torch.float64)
    rate[2, 1] = torch.nan
    with pytest.raises(SolverError) as caught:
        solve(lambda t, y: (-rate * y[0],), ones(3, 2), grid(1.0, 3), method=method)
    assert caught.value.index == (2, 1, 0) and caught.value.task == 1


@adaptive_methods
def test_a_tolerance_out_of_reach_ends_with_a_reason(method: str) -> None:
    with pytest.raises(SolverError, match="tolerance out of reach"):
        solve(oscillator(1.0), start(1, 1), grid(1.0, 3), method=method, rtol=0.0, atol=1e-300)


@adaptive_methods
def test_the_step_cap_names_the_task_that_needs_the_steps(method: str) -> None:
    rate = torch.tensor([[1.0], [2.0], [1e4], [3.0]], dtype=torch.float64)
    with pytest.raises(SolverError, match="more than max_steps = 50 steps needed") as caught:
        solve(oscillator(rate), start(4, 1), grid(1.0, 3), method=method, max_steps=50)
    assert caught.value.task == 2 and caught.value.steps == 51 and 0.0 < caught.value.time < 1.0


@adaptive_methods
def test_the_step_cap_is_for_the_whole_solve_not_for_an_interval(method: str) -> None:
    solve(oscillator(1.0), start(1, 1), grid(1.0, 31), method=method, max_steps=40)
    with pytest.raises(SolverError, match="max_steps = 20"):
        solve(oscillator(1.0), start(1, 1), grid(1.0, 31), method=method, max_steps=20)


@every_method
def test_as_values_failures_leave_the_other_trajectories_alone(method: str) -> None:
    times, y0 = grid(2.0, 5), ones(4, 2)
    with nan_on_failure():
        states = solve(spoiled(2, 0.7), y0, times, method=method, substeps=20)
    good = [0, 1, 3]
    assert_close(states[good].squeeze(-1), torch.exp(-times).expand(3, 2, 5), rtol=0.0, atol=1e-6)
    assert states[2, :, 2:].isnan().all() and not states[2, :, :2].isnan().any()
    with pytest.raises(SolverError):
        solve(spoiled(2, 0.7), y0, times, method=method)


@every_method
def test_as_values_a_blow_up_is_one_trajectory_s_own_business(method: str) -> None:
    y0 = torch.tensor([[0.1, 4.0], [0.2, 0.3]], dtype=torch.float64)
    times = grid(1.0, 5)
    with nan_on_failure():
        states = solve(lambda t, y: (y[0] ** 2,), (y0,), times, method=method, substeps=20).squeeze(
            -1
        )
    truth = 1.0 / (1.0 / y0.unsqueeze(-1) - times)
    rows, shots = [0, 1, 1], [0, 0, 1]
    assert_close(states[rows, shots], truth[rows, shots], rtol=0.0, atol=1e-6)
    assert not states[0, 1, -1].isfinite() and states[0, 1, 0] == 4.0


@adaptive_methods
def test_as_values_everything_is_lost_when_the_steps_run_out(method: str) -> None:
    with nan_on_failure():
        states = solve(oscillator(1e4), start(3, 1), grid(1.0, 4), method=method, max_steps=50)
    assert states[..., 1:, :].isnan().all() and states[..., 0, :].isfinite().all()


@every_method
def test_as_values_a_bad_initial_state_is_lost_alone(method: str) -> None:
    y0, times = ones(3, 1), grid(1.0, 4)
    y0[0][1] = torch.nan
    with nan_on_failure():
        states = solve(lambda t, y: (-y[0],), y0, times, method=method, substeps=20)
    assert states[1].isnan().all()
    assert_close(states[[0, 2]].squeeze(), torch.exp(-times).expand(2, 4), rtol=0.0, atol=1e-6)


def test_skip_integration_asks_the_field_nothing() -> None:
    y0 = start(2, 3)
    with skip_integration():
        states = solve(lambda t, y: pytest.fail("asked"), y0, grid(1.0, 4))
    assert_close(states, torch.stack(y0, -1).unsqueeze(-2).expand(2, 3, 4, 2))


def test_solutions_inside_are_recorded_whoever_called_the_solver() -> None:
    y0, times = start(2, 3), grid(1.0, 4)
    with record_solutions() as solutions:
        first = solve(oscillator(1.0), y0, times)
        second = solve(lambda t, y: -y, torch.stack(y0, -1), times, step=0.3)
    solve(oscillator(1.0), y0, times)
    assert len(solutions) == 2 and solutions[0].states is first and solutions[1].states is second
    assert solutions[0].times is times


# --------------------------------------------------------------------------------------------------- number of steps


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"step": 1e-7}, "1e\\+07"),
        ({"step": 1e-320}, "inf"),
        ({"substeps": 10**7}, "3e\\+07"),
        ({"step": 0.1, "max_steps": 9}, "10"),
    ],
)
def test_more_fixed_steps_than_max_steps_are_refused_before_the_first(
    options: dict[str, Any], number: str
) -> None:
    message = f"no more than max_steps = .* steps; got {number}. Take longer steps, or raise"
    with pytest.raises(ValueError, match=message):
        solve(lambda t, y: pytest.fail("asked"), start(1, 1), grid(1.0, 4), **options)


def test_steps_between_output_times_are_never_too_many() -> None:
    states = solve(lambda t, y: (-y[0],), ones(1, 1), grid(1.0, 30), max_steps=5)
    assert_close(states.flatten(), torch.exp(-grid(1.0, 30)), rtol=0.0, atol=1e-6)


def test_halved_steps_are_not_counted() -> None:
    with halve_steps():
        solve(lambda t, y: (-y[0],), ones(1, 1), grid(1.0, 3), step=0.25, max_steps=4)


# ------------------------------------------------------------------------------------------------------- torch.func

FIXED = {
    "output times": {},
    "substeps": {"substeps": 3},
    "many substeps": {"substeps": 100},
    "steps of a length": {"step": 0.3},
    "many steps of a length": {"step": 0.005},
}


@pytest.mark.parametrize("clock", ["one", "by shot"])
@pytest.mark.parametrize("case", FIXED)
def test_fixed_steps_work_under_every_transform(case: str, clock: str) -> None:
    times, y0, rates = grid(1.0, 5), start(2, 3), 1.0 + uniform(4)
    times = times if clock == "one" else CLOCKS["by shot"]

    def states(rate: Tensor) -> Tensor:
        return solve(oscillator(rate), y0, times, **FIXED[case])

    together = torch.vmap(states)(rates)
    alone = torch.stack([states(rate) for rate in rates])
    assert_close(together, alone, rtol=0.0, atol=1e-12)
    step = 1e-6
    differences = (states(rates[0] + step) - states(rates[0] - step)) / (2.0 * step)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert_close(transform(states)(rates[0]), differences, rtol=1e-5, atol=1e-7)
    by_rate = torch.vmap(torch.func.grad(lambda rate: states(rate).sum()))(rates)
    assert_close(by_rate[0], differences.sum(), rtol=1e-5, atol=1e-7)


def test_a_gradient_through_vmap_is_that_of_each_alone() -> None:
    rates = (1.0 + uniform(4)).requires_grad_()
    y0, times = start(2, 3), grid(1.0, 3)

    def total(rate: Tensor) -> Tensor:
        return solve(oscillator(rate), y0, times, step=0.004).square().sum()

    (together,) = torch.autograd.grad(torch.vmap(total)(rates).sum(), rates)
    (alone,) = torch.autograd.grad(torch.stack([total(rate) for rate in rates]).sum(), rates)
    assert_close(together, alone, rtol=1e-10, atol=0.0)


def test_under_vmap_a_trajectory_that_diverges_is_nan_and_others_are_not() -> None:
    y0 = torch.tensor([[0.1, 4.0]], dtype=torch.float64)
    states = torch.vmap(
        lambda rate: solve(lambda t, y: (rate * y[0] ** 2,), (y0,), grid(1.0, 5), step=0.02)
    )(torch.tensor([0.5, 1.0], dtype=torch.float64))
    assert states[:, 0, 0].isfinite().all() and not states[:, 0, 1, -1].isfinite().any()
    assert states[:, 0, 1, 0].tolist() == [[4.0], [4.0]]


@adaptive_methods
def test_adaptive_methods_say_what_to_do_under_transforms(method: str) -> None:
    y0 = start(1, 1)

    def states(rate: Tensor) -> Tensor:
        return solve(oscillator(rate), y0, grid(1.0, 3), method=method)

    message = (
        f"method='rk4' under vmap and other transforms of torch.func; got method='{method}'. "
        "Adaptive methods choose steps by values.*Pass method='rk4' with step= or substeps="
    )
    for transform in (torch.vmap, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match=message):
            transform(states)(torch.ones((2,) if transform is torch.vmap else ()))


def test_the_private_name_by_which_transforms_are_known_is_still_there() -> None:
    assert not inside_transform()
    assert torch.vmap(lambda x: x + float(inside_transform()))(torch.zeros(2)).tolist() == [
        1.0,
        1.0,
    ]
    assert float(torch.func.grad(lambda x: x * float(inside_transform()))(torch.tensor(0.0))) == 1.0


def nan_after_a_while(t: Tensor, y: tuple[Tensor]) -> tuple[Tensor]:
    return (torch.where(t > 0.5, torch.nan, -y[0]),)


def blow_up(t: Tensor, y: tuple[Tensor]) -> tuple[Tensor]:
    return (1e3 * y[0] ** 2,)


def decay(t: Tensor, y: tuple[Tensor]) -> tuple[Tensor]:
    return (-y[0],)


def stiff(t: Tensor, y: tuple[Tensor]) -> tuple[Tensor]:
    return (-1e6 * (y[0] - t.cos()),)


def fast(t: Tensor, y: tuple[Tensor]) -> tuple[Tensor]:
    return (1e6 * torch.cos(1e6 * t),)


# What would hang torchdiffeq without its asserts: field, options, what must be said, and by which methods.
STUCK: dict[str, tuple[Callable[..., tuple[Tensor]], dict[str, Any], str, list[str]]] = {
    "NaN": (
        nan_after_a_while,
        {},
        "SolverError: the state or its slope stopped being finite",
        ADAPTIVE,
    ),
    "NaN, fixed steps": (
        nan_after_a_while,
        {},
        "SolverError: the state stopped being finite",
        ["rk4"],
    ),
    "blow-up": (blow_up, {"substeps": 20}, "in task 0", METHODS),
    "tolerance out of reach": (
        decay,
        {"rtol": 0.0, "atol": 1e-300},
        "tolerance out of reach",
        ADAPTIVE,
    ),
    "stiff": (stiff, {"max_steps": 30}, "more than max_steps = 30 steps needed", ADAPTIVE),
    "fast": (fast, {"max_steps": 1000}, "more than max_steps = 1000 steps needed", ADAPTIVE),
}
REFUSED: dict[str, dict[str, Any]] = {
    "at least one row": {"initial": ones(0, 1)},
    "strictly increasing times": {"times": grid(2.0, 5).flip(0)},
}


def counting(field: Callable[..., tuple[Tensor]]) -> tuple[Callable[..., tuple[Tensor]], list[int]]:
    """Wrap a field so that its evaluations are counted."""
    evaluations = [0]

    def counted(*arguments: Tensor) -> tuple[Tensor]:
        evaluations[0] += 1
        return field(*arguments)

    return counted, evaluations


def failures() -> dict[str, tuple[str, str, int]]:
    """List for every case and method the expected words, the message, and the number of evaluations of the field."""
    cases = {
        f"{name}, {method}": (message, field, {"method": method, **options})
        for name, (field, options, message, methods) in STUCK.items()
        for method in methods
    }
    cases |= {
        f"{message}, {method}": (message, decay, {"method": method, **options})
        for message, options in REFUSED.items()
        for method in METHODS
    }
    said = {}
    for name, (message, field, options) in cases.items():
        counted, evaluations = counting(field)
        try:
            solve(counted, **{"initial": ones(3, 1), "times": grid(2.0, 5), **options})
            came = "nothing"
        except (SolverError, ValueError) as error:
            came = f"{type(error).__name__}: {error}"
        said[name] = message, came, evaluations[0]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["-O"]], ids=["python", "python -O"])
def test_no_failure_hangs_the_solver_with_or_without_asserts(
    flags: list[str], figure: Note
) -> None:
    code = f"assert {not flags}; import json, test_dynamics; print(json.dumps(test_dynamics.failures()))"
    run = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        timeout=HANGING,
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert len(said) == 18
    for name, (expected, came, evaluations) in said.items():
        assert expected in came, f"{name}: {came}"
        assert came.startswith("SolverError") or name.split(",")[0] in REFUSED, f"{name}: {came}"
        assert evaluations < 20_000, (
            f"{name} took {evaluations} evaluations"
        )  # 13 a step, and 1000 steps
        if came.startswith("SolverError"):
            figure("stuck solver", errors=1, evaluations=float(evaluations))


# ----------------------------------------------------------------------------------------------------------- bad input

STATES, TIMES = ones(2, 3), grid(1.0, 4)
BAD = {
    "an unknown method": (
        {"method": "euler"},
        ValueError,
        '"rk4", "dopri5" or "dopri8"; got \'euler\'',
    ),
    "no substeps": ({"substeps": 0}, ValueError, "substeps, an integer of 1 or more; got 0"),
    "no steps": ({"max_steps": 0}, ValueError, "max_steps, an integer of 1 or more; got 0"),
    "a negative tolerance": (
        {"rtol": -1.0},
        ValueError,
        "rtol and atol of 0 or more, not both 0; got rtol=-1.0 and atol=1e-08",
    ),
    "a negative absolute tolerance": ({"atol": -1.0}, ValueError, "rtol and atol of 0 or more"),
    "no tolerance": ({"atol": 0.0, "rtol": 0.0}, ValueError, "rtol and atol of 0 or more"),
    "a tolerance that is no number": ({"atol": torch.nan}, ValueError, "rtol and atol of 0"),
    "a tolerance without end": ({"rtol": torch.inf}, ValueError, "rtol and atol of 0"),
    "no components": (
        {"initial": ()},
        ValueError,
        "at least one row; got an empty one. Check for empty batches",
    ),
    "an empty batch": ({"initial": ones(0, 3)}, ValueError, "at least one row; got an empty one"),
    "an empty grid": (
        {"initial": ones(2, 3, 0)[0]},
        ValueError,
        "at least one row; got an empty one",
    ),
    "integer states": (
        {"initial": (STATES[0].long(),)},
        TypeError,
        "initial in float32 or float64; got torch.int64",
    ),
    "mixed dtypes": (
        {"initial": (STATES[0].float(),)},
        TypeError,
        "initial in torch.float64, as the times; got torch.float32",
    ),
    "one time": ({"times": TIMES[:1]}, ValueError, "two or more strictly increasing times"),
    "unsorted times": (
        {"times": TIMES.flip(0)},
        ValueError,
        "strictly increasing times; got .* Sort the times",
    ),
    "duplicate times": ({"times": TIMES[[0, 1, 1, 2]]}, ValueError, "strictly increasing times"),
    "many duplicate times": (
        {"times": 0.0 * grid(1.0, 20)},
        ValueError,
        r"\(20,\) with a smallest step of 0.0",
    ),
    "no number as a time": ({"times": TIMES / 0.0}, ValueError, "strictly increasing times"),
    "clocks of other shots": (
        {"times": TIMES.expand(2, 4)},
        ValueError,
        r"for \(task, shot\) = \(2, 3\); got \(2, 4\). Give all trajectories one clock",
    ),
    "clocks of other tasks": (
        {"times": TIMES.expand(3, 3, 4)},
        ValueError,
        r"\(shot, time\) or \(task, shot, time\) for \(task, shot\) = \(2, 3\); got \(3, 3, 4\)",
    ),
    "clocks of particles": (
        {"times": TIMES.expand(5, 2, 3, 4)},
        ValueError,
        r"times of shape \(time,\), \(shot, time\) or \(task, shot, time\)",
    ),
    "a slope too few": (
        {"initial": STATES * 2},
        TypeError,
        "a tuple of 2 slopes; got a tuple of 1",
    ),
    "a slope without its tuple": (
        {"field": lambda t, y: -y[0]},
        TypeError,
        r"tuple of 1 slopes; got a tensor of shape \(2, 3\)",
    ),
    "a list of slopes": (
        {"field": lambda t, y: [-y[0]]},
        TypeError,
        "a tuple of 1 slopes; got a list",
    ),
    "a tuple on a grid": (
        {"initial": ones(2, 3, 5)[0]},
        TypeError,
        r"a tensor \(..., 5\); got a tuple of 1",
    ),
    "another grid": (
        {"initial": ones(2, 3, 5)[0], "field": lambda t, y: y[..., 1:]},
        TypeError,
        r"a tensor \(..., 5\); got a tensor of shape \(2, 3, 4\)",
    ),
}


@every_method
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_words(case: str, method: str) -> None:
    change, error, message = BAD[case]
    options = {
        "field": lambda t, y: (-y[0],),
        "initial": STATES,
        "times": TIMES,
        "method": method,
    } | change
    with pytest.raises(error, match=message):
        solve(**options)
