"""solve: the one door to integrators, and the only importer of torchdiffeq."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
import torchdiffeq
from torch import Tensor

from ._checks import fail, require
from ._types import State, Times

__all__ = ["Field", "SolverError", "failures_as_values", "solve", "standing_still"]

Field = Callable[[Tensor, State], State]

_ADAPTIVE = ("dopri5", "dopri8")
_raise_failures: ContextVar[bool] = ContextVar("raise_failures", default=True)
_still: ContextVar[bool] = ContextVar("still", default=False)


class SolverError(RuntimeError):
    """An integration that failed: ``cause`` says why, ``index`` where in the batch, ``time`` and ``steps`` when."""

    def __init__(self, cause: str, index: tuple[int, ...], time: float, steps: int) -> None:
        self.cause, self.index, self.time, self.steps = cause, index, time, steps
        self.task = index[-2] if len(index) > 1 else (index[0] if index else 0)
        super().__init__(
            f"{cause} in task {self.task} (batch index {index}) at t = {time:.4g} after {steps} steps. "
            "Shorten the segments, add substeps, or bound the neural term's output."
        )


@contextlib.contextmanager
def failures_as_values() -> Iterator[None]:
    """Inside, a diverging trajectory comes back as NaN or Inf instead of raising; others are untouched."""
    token = _raise_failures.set(False)
    try:
        yield
    finally:
        _raise_failures.reset(token)


@contextlib.contextmanager
def standing_still() -> Iterator[None]:
    """Inside, solve integrates nothing: states keep their initial value. For learning what sites a program has."""
    token = _still.set(True)
    try:
        yield
    finally:
        _still.reset(token)


def solve(field: Field, initial: State, times: Times, *, method: str = "rk4", substeps: int = 1,
          rtol: float = 1e-6, atol: float = 1e-8, max_steps: int = 10_000) -> Tensor:
    r"""Integrate :math:`\dot y = f(t, y)` from ``initial`` through ``times``, differentiably.

    One trajectory never disturbs another: fixed steps are taken row by row, and the adaptive methods measure the
    error per trajectory and step by the worst. Gradients reach every tensor that the field captured.

    Arguments:
        field: ``field(t, state)`` returns the state's slope, in the state's own form.
        initial: a tuple of tensors, one a component, each ``(..., task, shot)``, which broadcast with whatever the
            field captured; or one tensor ``(..., task, shot, component)``, for fields on a grid.
        times: increasing output times, the first belonging to ``initial``: ``(time,)``, or ``(shot, time)`` where each
            shot has its own clock. Restart states (multiple shooting) are shots with clocks of their own.
        method: ``"rk4"``, of fixed step, or torchdiffeq's ``"dopri5"`` and ``"dopri8"``, which land on every output time.
        substeps: steps of rk4 between two output times.
        rtol, atol: tolerances of the adaptive methods.
        max_steps: after so many steps an adaptive method gives up with a :class:`SolverError`.

    Returns:
        States at all times, ``(..., time, component)``.
    """
    _check(initial, times, method, substeps)
    if isinstance(initial, tuple):
        stacked, slope, axis = torch.stack(torch.broadcast_tensors(*initial)), _stacked(field), 0
    else:
        stacked, slope, axis = initial, field, -1
    if _still.get():
        path = [stacked] * times.shape[-1]
    elif method == "rk4":
        path = _rk4(slope, stacked, times, substeps, axis)
    else:
        path = _adaptive(slope, stacked, times, method, rtol, atol, max_steps, axis)
    states = torch.stack(path, -1 if axis == 0 else -2)
    return states.movedim(0, -1) if axis == 0 else states


def _stacked(field: Field) -> Callable[[Tensor, Tensor], Tensor]:
    """The field on components stacked first: one tensor operation then serves them all."""

    def slope(t: Tensor, state: Tensor) -> Tensor:
        slopes = field(t, state.unbind(0))
        require(isinstance(slopes, tuple) and len(slopes) == len(state),
                f"the field to return a tuple of {len(state)} slopes", type(slopes).__name__,
                "Return one slope for each component of the state, in the same order.", TypeError)
        return torch.stack(torch.broadcast_tensors(*slopes))

    return slope


def _rk4(slope: Callable[[Tensor, Tensor], Tensor], y: Tensor, times: Times, substeps: int, axis: int) -> list[Tensor]:
    clock = times if times.dim() == 1 or axis == 0 else times.unsqueeze(-2)
    steps = torch.diff(clock) / substeps
    path = [y]
    for k in range(clock.shape[-1] - 1):
        h = steps[..., k]
        for j in range(substeps):
            y = _rk4_step(slope, clock[..., k] + j * h, h, y)
        path.append(y)
    if path[0].shape != y.shape:
        path[0] = path[0].expand_as(y)
    if _raise_failures.get() and not torch.isfinite(y).all():
        _explain(path, times, substeps, axis)
    return path


def _rk4_step(slope: Callable[[Tensor, Tensor], Tensor], t: Tensor, h: Tensor, y: Tensor) -> Tensor:
    half = 0.5 * h
    k1 = slope(t, y)
    k2 = slope(t + half, torch.addcmul(y, k1, half))
    k3 = slope(t + half, torch.addcmul(y, k2, half))
    k4 = slope(t + h, torch.addcmul(y, k3, h))
    return torch.addcmul(y, torch.add(k1 + k4, k2 + k3, alpha=2.0), h / 6.0)


def _explain(path: list[Tensor], times: Times, substeps: int, axis: int) -> None:
    for k, y in enumerate(path):
        bad = ~torch.isfinite(y).all(axis)
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            clock = times if times.dim() == 1 else times[index[-1]]
            raise SolverError("the state stopped being finite", index, float(clock[k]), k * substeps)


def _adaptive(slope: Callable[[Tensor, Tensor], Tensor], y: Tensor, times: Times, method: str, rtol: float, atol: float,
              max_steps: int, axis: int) -> list[Tensor]:
    """torchdiffeq with its error norm taken per trajectory, its asserts backed by checks of our own."""
    offset, clock = _common_clock(times, axis)
    watch = _Watch(slope, offset, max_steps, {"dopri5": 6, "dopri8": 13}[method], axis)
    y = y.expand_as(watch(clock[0], y))

    def worst_trajectory(error: Tensor) -> Tensor:
        return error.square().mean(axis).sqrt().max()

    # Landing on the output times: interpolating to them misses the tolerance by 7 (dopri5) to 1000 times (dopri8).
    options = {"norm": worst_trajectory, "step_t": clock[1:]}
    try:
        states = torchdiffeq.odeint(watch, y, clock, rtol=rtol, atol=atol, method=method, options=options)
    except AssertionError as error:
        watch.give_up(f"{method} gave up ({error})")
    return list(states.unbind(0))


class _Watch:
    """A slope that counts its evaluations and refuses what would make an adaptive method loop for ever."""

    def __init__(self, slope: Callable[[Tensor, Tensor], Tensor], offset: Tensor, max_steps: int, stages: int,
                 axis: int) -> None:
        self.slope, self.offset, self.max_steps, self.stages, self.axis = slope, offset, max_steps, stages, axis
        self.calls, self.time, self.last = 0, torch.zeros(()), torch.zeros(1, 1)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls, self.time, self.last = self.calls + 1, t, self.slope(t + self.offset, y)
        if not torch.isfinite(self.last).all():
            self.give_up("the slope stopped being finite")
        if self.calls > self.max_steps * self.stages:
            self.give_up(f"more than max_steps = {self.max_steps} steps needed")
        return self.last

    def give_up(self, cause: str) -> None:
        size = self.last.detach().nan_to_num(torch.inf, torch.inf, torch.inf).abs().amax(self.axis)
        index = tuple(int(i) for i in torch.unravel_index(size.argmax(), size.shape))
        raise SolverError(cause, index, float(self.time), self.calls // self.stages) from None


def _common_clock(times: Times, axis: int) -> tuple[Tensor, Tensor]:
    if times.dim() == 1:
        return torch.zeros((), dtype=times.dtype, device=times.device), times
    offset, clock = times[..., 0], times - times[..., :1]
    require(bool(torch.allclose(clock, clock[:1].expand_as(clock), atol=1e-6)),
            "clocks that differ by an offset only (adaptive methods)", "clocks of different spacing",
            'Use method="rk4", or solve the shots one by one.')
    return (offset if axis == 0 else offset.unsqueeze(-1)), clock[0]


def _check(initial: State, times: Times, method: str, substeps: int) -> None:
    require(method == "rk4" or method in _ADAPTIVE, 'method "rk4", "dopri5" or "dopri8"', repr(method),
            'Take "rk4" for training and "dopri8" for reference solutions.')
    require(substeps >= 1, "substeps of 1 or more", substeps, "Pass a positive integer.")
    parts = initial if isinstance(initial, tuple) else (initial,)
    if not parts or any(p.numel() == 0 for p in parts):
        fail("a state with at least one row", "an empty one", "Check for empty batches.")
    require(times.shape[-1] >= 2 and bool((torch.diff(times) > 0).all()), "two or more strictly increasing times",
            times.tolist() if times.numel() < 9 else f"{tuple(times.shape)} with a smallest step of "
            f"{float(torch.diff(times).min()) if times.shape[-1] > 1 else 'none'}",
            "Sort the times and drop duplicates.")
