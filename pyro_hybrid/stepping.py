"""Fixed steps of RK4: on the observation grid or with dense output, compiled where asked for, in bounded memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._checks import require
from ._settings import inside
from ._types import Times

__all__ = ["Path", "Slope", "fixed_steps", "grown", "seconds_compiling", "steps_halved"]

Slope = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Slope, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

SEGMENT = 64  # with more steps than two such segments, what a segment's gradient needs is recomputed, not stored
_finer: ContextVar[int] = ContextVar("finer", default=1)


def steps_halved() -> AbstractContextManager[None]:
    """Inside, fixed steps are half as long: what changes is their error, but for a sixteenth."""
    return inside(_finer, 2 * _finer.get())


class Path(NamedTuple):
    """States where steps begin and end, with those places in time, the last axis of ``knots``."""

    states: list[Tensor]
    knots: Tensor


def fixed_steps(slope: Slope, y: Tensor, times: Times, substeps: int, step: float | None, axis: int,
                code: CodeType | None) -> tuple[Tensor | list[Tensor], Path]:
    """States at the given times, and the path that was walked.

    Arguments:
        slope: of a stacked state.
        y: the initial state, its components in axis 0 or -1.
        times: ``(time,)`` or ``(shot, time)``.
        substeps: steps between two times; of ``step`` the length of steps that don't care about the times.
        axis: where the components are.
        code: the code of the user's field, by which compiled steps are kept; None for eager ones.
    """
    knots = _knots(times, substeps, step)
    clock = knots if times.dim() == 1 or axis == 0 else knots.unsqueeze(-2)
    lengths = torch.diff(clock)
    advance = _rk4_step if code is None else _compiled_step(code)
    if code is not None:
        y = _as_later(slope, clock[..., 0], y, axis)
    pieces = [*zip(clock.unbind(-1), lengths.unbind(-1), strict=False)]
    states, slopes = _walk(advance, slope, y, pieces, axis)
    path = Path([grown(y, states[0], axis), *states], knots)
    if step is None:
        return path.states[:: substeps * _finer.get()], path
    return _between(path, [*slopes, slope(clock[..., -1], states[-1])], times), path


def _knots(times: Times, substeps: int, step: float | None) -> Tensor:
    if step is None:
        number = substeps * _finer.get()
        parts = torch.arange(number, dtype=times.dtype, device=times.device) / number
        inner = times[..., :-1, None] + torch.diff(times).unsqueeze(-1) * parts
        return torch.cat([inner.flatten(-2), times[..., -1:]], -1)
    first, last = times[..., :1], times[..., -1:]
    number = _finer.get() * max(1, math.ceil(float((last - first).max()) / step - 1e-4))
    return first + (last - first) * torch.linspace(0.0, 1.0, number + 1, dtype=times.dtype, device=times.device)


def _walk(advance: Step, slope: Slope, y: Tensor, pieces: list[tuple[Tensor, Tensor]], axis: int,
          ) -> tuple[list[Tensor], list[Tensor]]:
    """All steps; where they are many and have a gradient, segment by segment in memory of one."""
    if len(pieces) > 2 * SEGMENT and torch.is_grad_enabled():
        states, slopes = [], []
        for start in range(0, len(pieces), SEGMENT):
            more = checkpoint(_walk, advance, slope, y, pieces[start : start + SEGMENT], axis, use_reentrant=False,
                              preserve_rng_state=False)
            y = more[0][-1]
            states += more[0]
            slopes += more[1]
        return states, slopes
    states, slopes = [], []
    for t, h in pieces:
        y, k = advance(slope, t, h, y, axis)
        states.append(y)
        slopes.append(k)
    return states, slopes


def _rk4_step(slope: Slope, t: Tensor, h: Tensor, y: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The state after a step, and the slope before it."""
    half = 0.5 * h
    k1 = slope(t, y)
    if k1.dim() > y.dim():
        y = grown(y, k1, axis)
    k2 = slope(t + half, torch.addcmul(y, k1, half))
    k3 = slope(t + half, torch.addcmul(y, k2, half))
    k4 = slope(t + h, torch.addcmul(y, k3, h))
    return torch.addcmul(y, torch.add(k1 + k4, k2 + k3, alpha=2.0), h / 6.0), k1


def grown(y: Tensor, like: Tensor, axis: int) -> Tensor:
    """The state with the batch axes that it lacks and the field's captured tensors have, such as particles."""
    if axis == 0:
        y = y.reshape(len(y), *[1] * (like.dim() - y.dim()), *y.shape[1:])
    return y.expand(torch.broadcast_shapes(y.shape, like.shape))


def _between(path: Path, slopes: list[Tensor], times: Times) -> Tensor:
    """Cubic Hermite interpolation, whose error is of the same order as RK4's: one product of matrices, time first."""
    knots, at = path.knots, times
    if times.dim() == 2:
        knots, at = (x - x[:, :1] for x in (knots, times))
        require(bool((at - at[:1]).abs().max() <= 16 * torch.finfo(at.dtype).eps * times.abs().max()),
                "clocks that differ by an offset only (with step=)", "clocks of different spacing",
                "Leave step=None and use substeps, or solve the shots one by one.")
        knots, at = knots[0], at[0]
    h = knots[1] - knots[0]
    index = torch.searchsorted(knots, at, right=True).sub(1).clamp(0, len(knots) - 2)
    x, rows = (at - knots[index]) / h, torch.arange(len(at), device=at.device)
    weights = at.new_zeros(2, len(at), len(knots))
    weights[0, rows, index], weights[0, rows, index + 1] = (1 + 2 * x) * (1 - x) ** 2, x * x * (3 - 2 * x)
    weights[1, rows, index], weights[1, rows, index + 1] = h * x * (1 - x) ** 2, h * x * x * (x - 1)
    nodes = torch.stack([*path.states, *slopes])
    return (torch.cat([weights[0], weights[1]], -1) @ nodes.flatten(1)).unflatten(1, nodes.shape[1:])


def _as_later(slope: Slope, t: Tensor, y: Tensor, axis: int) -> Tensor:
    """The first state as all later ones will be, in batch axes and in having a gradient: one compilation serves all."""
    k = slope(t, y)
    y = grown(y, k, axis).contiguous()
    return y.detach().requires_grad_() if k.requires_grad and not y.requires_grad else y


_compiled: WeakKeyDictionary[CodeType, Step] = WeakKeyDictionary()


def _compiled_step(code: CodeType) -> Step:
    """One compiled step for each field that was written: torch.compile limits its recompilations by code."""
    if code not in _compiled:
        _compiled[code] = _Compiled(FunctionType(_rk4_step.__code__.replace(), globals(), "_rk4_step"))
    return _compiled[code]


class _Compiled:
    """A step that is compiled at its first call, for all batch sizes; if it can't be, it warns and stays eager."""

    def __init__(self, step: Any) -> None:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # not on import: it takes seconds

        self.failures, self.failed = (TorchDynamoException, FailOnRecompileLimitHit), False
        self.cpu = torch.compile(step, fullgraph=True, dynamic=None, options={"cpp_wrapper": True})
        self.other = torch.compile(step, fullgraph=True, dynamic=None)

    def __call__(self, slope: Slope, t: Tensor, h: Tensor, y: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        if not self.failed:
            try:
                return (self.cpu if y.device.type == "cpu" else self.other)(slope, t, h, y, axis)
            except self.failures as error:
                self.failed = True
                reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                warnings.warn(f"solve(..., compile=True) goes on without compiling: {reason.strip()} On a CPU a C++ "
                              "compiler must be installed, and the field must consist of torch operations, without "
                              "branches on values.", RuntimeWarning, stacklevel=2)
        return _rk4_step(slope, t, h, y, axis)


def seconds_compiling() -> float:
    """Time that this process has spent in torch.compile."""
    if not _compiled:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]
