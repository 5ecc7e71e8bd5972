"""solve: integrate ordinary differential equations, differentiably."""

from __future__ import annotations

import math
from types import CodeType

import torch
from torch import Tensor

from pyro_hybrid.dynamics.adaptive import Tolerance, adaptive_steps
from pyro_hybrid.dynamics.clocks import check_times
from pyro_hybrid.dynamics.failures import SolverError
from pyro_hybrid.dynamics.modes import Solution, current_mode
from pyro_hybrid.dynamics.rk4 import Path, check_number_of_steps, fixed_steps
from pyro_hybrid.dynamics.slopes import Field, all_finite, inside_transform, slope_of
from pyro_hybrid.errors import fail, require, require_floating
from pyro_hybrid.shapes import State, Times

__all__ = ["solve"]


def solve(
    field: Field,
    initial: State,
    times: Times,
    *,
    method: str = "rk4",
    substeps: int = 1,
    step: float | None = None,
    compile: bool = False,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    max_steps: int = 10_000,
) -> Tensor:
    r"""Integrate :math:`\dot y = f(t, y)` from ``initial`` through ``times``, differentiably.

    One trajectory never disturbs another: fixed steps are the same for all of them, and the adaptive methods measure
    the error of each and step by the worst. Gradients reach every tensor that the field captured. Their memory stops
    growing at 128 fixed steps; beyond, segments of 64 are computed twice instead. Known inputs u(t) enter a field by
    :func:`~pyro_hybrid.interpolate`.

    Arguments:
        field: ``field(t, state)`` returns the state's slope, in the state's own form.
        initial: a tuple of tensors, one a component, each ``(..., task, shot)``, which broadcast with whatever the
            field captured; or one tensor ``(..., task, shot, component)``, for fields on a grid.
        times: increasing output times, the first belonging to ``initial``: ``(time,)``; ``(shot, time)`` where each
            shot has its own clock; ``(task, shot, time)`` where each shot of each task has. Restart states (multiple
            shooting) are shots with clocks of their own.
        method: ``"rk4"``, of fixed step, or torchdiffeq's ``"dopri5"`` and ``"dopri8"``, which land on output times.
            The transforms of ``torch.func``, such as ``vmap``, work with ``"rk4"`` only.
        substeps: number of steps of rk4 between two output times.
        step: instead, the length of rk4's steps, or a little less, wherever the output times are; it interpolates
            between its steps (cubic Hermite). This takes fewer field evaluations where data are dense;
            :func:`~pyro_hybrid.step_error` measures the error.
        compile: compile rk4's step with ``torch.compile``: some ten seconds for each field and kind of use (training,
            whole or on segments; inference), then steps up to twice as fast. Without a compiler: a warning, and eager.
        rtol, atol: tolerances of the adaptive methods.
        max_steps: the most steps: an adaptive method gives up after them with a :class:`SolverError`, and more steps of
            rk4 are refused before the first, unless output times ask for them.

    Returns:
        States at all times, ``(..., time, component)``.
    """
    _check_method(method, compile, step)
    _check_tolerance(rtol, atol)
    _check_steps(substeps, step, max_steps)
    _check_states(initial, times)
    stacked, axis = _stack(initial)
    mode = current_mode()
    path: Tensor | list[Tensor]
    if not mode.integrate:
        path = [stacked] * times.shape[-1]
    elif method == "rk4":
        check_number_of_steps(times, substeps, step, max_steps)
        code = _code_of(field) if compile else None
        path, steps = fixed_steps(slope_of(field, axis), stacked, times, substeps, step, axis, code)
        last = path if isinstance(path, Tensor) else path[-1]
        if mode.raise_failures and all_finite(last) is False:
            _explain(steps, axis)
    else:
        tolerance = Tolerance(rtol, atol, max_steps)
        path = adaptive_steps(slope_of(field, axis), stacked, times, method, tolerance, axis)
    states = _by_component(path, axis)
    if mode.solutions is not None:
        mode.solutions.append(Solution(times, states))
    return states


def _stack(initial: State) -> tuple[Tensor, int]:
    """Return a state as one tensor, and the axis of its components."""
    if isinstance(initial, tuple):
        return torch.stack(torch.broadcast_tensors(*initial)), 0
    return initial, -1


def _by_component(path: Tensor | list[Tensor], axis: int) -> Tensor:
    """Bring states, time first and components in this axis, to (..., time, component)."""
    if isinstance(path, list):
        states = torch.stack(path, -1 if axis == 0 else -2)
        return states.movedim(0, -1) if axis == 0 else states
    return path.permute(*range(2, path.dim()), 0, 1) if axis == 0 else path.movedim(0, -2)


def _explain(path: Path, axis: int) -> None:
    """Raise an error that names the first trajectory to fail, and when."""
    knots = path.knots
    for k, y in enumerate(path.states):
        bad = ~torch.isfinite(y).all(axis)
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            num_axes = knots.dim() - 1
            own = index[len(index) - num_axes :]
            clock = knots.expand(*bad.shape[bad.dim() - num_axes :], -1)[own]
            raise SolverError("the state stopped being finite", index, float(clock[k]), k)
    end = float(knots.flatten()[-1])
    raise SolverError("the slope at the last time isn't finite", (), end, len(path.states) - 1)


def _code_of(field: Field) -> CodeType:
    """Return the code of a field, by which its compiled steps are kept."""
    return getattr(field, "__code__", getattr(type(field).__call__, "__code__", solve.__code__))


def _check_method(method: str, compile: bool, step: float | None) -> None:
    require(
        method in ("rk4", "dopri5", "dopri8"),
        'method "rk4", "dopri5" or "dopri8"',
        repr(method),
        'Take "rk4" for training and "dopri8" for reference solutions.',
    )
    require(
        method == "rk4" or step is None and not compile,
        "step and compile with method='rk4' only",
        f"method={method!r}",
        "The adaptive methods choose their own steps, by rtol and atol.",
    )
    require(
        method == "rk4" or not inside_transform(),
        "method='rk4' under vmap and other transforms of torch.func",
        f"method={method!r}",
        "Adaptive methods choose steps by values, which transforms hide. Pass method='rk4' with step= or substeps=, "
        "or take a loop instead of vmap.",
        NotImplementedError,
    )


def _check_tolerance(rtol: float, atol: float) -> None:
    require(
        rtol >= 0.0 and atol >= 0.0 and 0.0 < rtol + atol < math.inf,
        "rtol and atol of 0 or more, not both 0",
        f"rtol={rtol} and atol={atol}",
        "Take the defaults, or 1e-9 for reference solutions.",
    )


def _check_steps(substeps: int, step: float | None, max_steps: int) -> None:
    for name, value in (("substeps", substeps), ("max_steps", max_steps)):
        require(
            isinstance(value, int) and value >= 1,
            f"{name}, an integer of 1 or more",
            repr(value),
            "It is a number of steps.",
        )
    require(
        step is None or 0.0 < step < math.inf and substeps == 1,
        "a positive and finite step, without substeps",
        f"step={step} and substeps={substeps}",
        "Pass one of the two.",
    )


def _check_states(initial: State, times: Times) -> None:
    parts = initial if isinstance(initial, tuple) else (initial,)
    if not parts or any(part.numel() == 0 for part in parts):
        fail("a state with at least one row", "an empty one", "Check for empty batches.")
    for name, value in (("times", times), *(("initial", part) for part in parts)):
        require_floating(name, value)
        require(
            value.dtype == times.dtype,
            f"initial in {times.dtype}, as the times",
            value.dtype,
            "Convert one.",
            TypeError,
        )
    shape = torch.broadcast_shapes(*(part.shape for part in parts))
    check_times(times, tuple(shape if isinstance(initial, tuple) else shape[:-1]))
