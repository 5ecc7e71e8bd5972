"""Fixed steps of RK4: on the observation grid or with dense output, compiled where asked for, in bounded memory."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Hashable
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_hybrid.dynamics.modes import current_mode
from pyro_hybrid.errors import fail, require
from pyro_hybrid.shapes import Times

__all__ = ["Path", "Slope", "fixed_steps", "grown", "seconds_compiling"]

Slope = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Slope, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
Walk = tuple[list[Tensor], list[Tensor]]

SEGMENT = 64  # with more steps than two such segments, what a segment's gradient needs is recomputed, not stored


class Path(NamedTuple):
    """States where steps begin and end, with those places in time, the last axis of ``knots``."""

    states: list[Tensor]
    knots: Tensor


def fixed_steps(
    slope: Slope,
    y: Tensor,
    times: Times,
    substeps: int,
    step: float | None,
    axis: int,
    code: CodeType | None,
) -> tuple[Tensor | list[Tensor], Path]:
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
    advance: Step = _rk4_step
    if code is not None:
        y = _as_later(slope, clock[..., 0], y, axis)
        single = tuple(
            size == 1 for size in y.shape
        )  # torch.compile has versions of their own for sizes of one
        advance = _compiled_step(
            code, (single, clock.dim(), y.dtype, y.requires_grad, torch.is_grad_enabled())
        )
    pieces = [*zip(clock.unbind(-1), lengths.unbind(-1), strict=False)]
    states, slopes = _walk(advance, slope, y, pieces, axis)
    path = Path([grown(y, states[0], axis), *states], knots)
    if step is None:
        return path.states[:: substeps * current_mode().step_divisor], path
    return _between(path, [*slopes, slope(clock[..., -1], states[-1])], times), path


def _knots(times: Times, substeps: int, step: float | None) -> Tensor:
    if step is None:
        number = substeps * current_mode().step_divisor
        parts = torch.arange(number, dtype=times.dtype, device=times.device) / number
        inner = times[..., :-1, None] + torch.diff(times).unsqueeze(-1) * parts
        return torch.cat([inner.flatten(-2), times[..., -1:]], -1)
    first, last = times[..., :1], times[..., -1:]
    number = current_mode().step_divisor * max(
        1, math.ceil(float((last - first).max()) / step - 1e-4)
    )
    return first + (last - first) * torch.linspace(
        0.0, 1.0, number + 1, dtype=times.dtype, device=times.device
    )


def _walk(
    advance: Step, slope: Slope, y: Tensor, pieces: list[tuple[Tensor, Tensor]], axis: int
) -> Walk:
    """All steps; where they are many and have a gradient, segment by segment in memory of one."""
    states: list[Tensor] = []
    slopes: list[Tensor] = []
    if len(pieces) > 2 * SEGMENT and torch.is_grad_enabled():
        for start in range(0, len(pieces), SEGMENT):
            segment = _Segment(advance, slope, pieces[start : start + SEGMENT], axis)
            more = checkpoint(segment, y, use_reentrant=False, determinism_check="none")
            states, slopes, y = states + more[0], slopes + more[1], more[0][-1]
        return states, slopes
    for t, h in pieces:
        y, k = advance(slope, t, h, y, axis)
        states.append(y)
        slopes.append(k)
    return states, slopes


class _Segment:
    """Steps that are taken again for their gradient, and then must lead where they led before."""

    def __init__(
        self, advance: Step, slope: Slope, pieces: list[tuple[Tensor, Tensor]], axis: int
    ) -> None:
        self.advance, self.slope, self.pieces, self.axis = advance, slope, pieces, axis
        self.before: Tensor | None = None

    def __call__(self, y: Tensor) -> Walk:
        states, slopes = _walk(self.advance, self.slope, y, self.pieces[:-1], self.axis)
        now = (states or [y])[-1]
        if self.before is None:
            self.before = now.detach()
        elif not torch.allclose(now.detach(), self.before, rtol=1e-3, atol=1e-5, equal_nan=True):
            fail(
                "a field that gives the same slope when it is called again",
                "another one when its gradient was taken",
                "Draw random numbers, and read sampled attributes, before the field is defined.",
                RuntimeError,
            )
        last = _walk(self.advance, self.slope, now, self.pieces[-1:], self.axis)
        return states + last[0], slopes + last[1]


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
        require(
            bool((at - at[:1]).abs().max() <= 16 * torch.finfo(at.dtype).eps * times.abs().max()),
            "clocks that differ by an offset only (with step=)",
            "clocks of different spacing",
            "Leave step=None and use substeps, or solve the shots one by one.",
        )
        knots, at = knots[0], at[0]
    h = knots[1] - knots[0]
    index = torch.searchsorted(knots, at, right=True).sub(1).clamp(0, len(knots) - 2)
    x, rows = (at - knots[index]) / h, torch.arange(len(at), device=at.device)
    weights = at.new_zeros(2, len(at), len(knots))
    weights[0, rows, index], weights[0, rows, index + 1] = (
        (1 + 2 * x) * (1 - x) ** 2,
        x * x * (3 - 2 * x),
    )
    weights[1, rows, index], weights[1, rows, index + 1] = h * x * (1 - x) ** 2, h * x * x * (x - 1)
    nodes = torch.stack([*path.states, *slopes])
    mixed, flat = torch.cat([weights[0], weights[1]], -1), nodes.flatten(1)
    between = mixed @ flat
    if not torch.isfinite(
        between
    ).all():  # zero times NaN is NaN, which must not travel back in time
        lost = (mixed != 0.0).to(flat.dtype) @ (~torch.isfinite(flat)).to(flat.dtype) > 0.0
        between = (mixed @ flat.nan_to_num(0.0, 0.0, 0.0)).masked_fill(lost, torch.nan)
    return between.unflatten(1, nodes.shape[1:])


def _as_later(slope: Slope, t: Tensor, y: Tensor, axis: int) -> Tensor:
    """The first state as all later ones will be, in batch axes and in having a gradient: one compilation serves all."""
    k = slope(t, y)
    y = grown(y, k, axis).contiguous()
    return y.detach().requires_grad_() if k.requires_grad and not y.requires_grad else y


_compiled: WeakKeyDictionary[CodeType, dict[Hashable, _Compiled]] = WeakKeyDictionary()


def _compiled_step(code: CodeType, kind: Hashable) -> Step:
    """A compiled step for each field that was written and each kind of use: torch.compile limits versions by code."""
    steps = _compiled.setdefault(code, {})
    if kind not in steps:
        steps[kind] = _Compiled()
    return steps[kind]


class _Compiled:
    """A step that is compiled at its first call, then for all batch sizes; if it can't be, it warns and stays eager."""

    def __init__(self) -> None:
        step = inspect.unwrap(_rk4_step)
        own: Any = FunctionType(
            step.__code__.replace(),
            step.__globals__,
            step.__name__,
            step.__defaults__,
            step.__closure__,
        )
        self.step: Step | None = own
        self.compiled: dict[str, Step] = {}

    def __call__(
        self, slope: Slope, t: Tensor, h: Tensor, y: Tensor, axis: int
    ) -> tuple[Tensor, Tensor]:
        if self.step is None:
            return _rk4_step(slope, t, h, y, axis)
        try:
            return self._on(y.device.type)(slope, t, h, y, axis)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            result, self.step = _rk4_step(slope, t, h, y, axis), None
            reason = next(
                (line.strip() for line in str(error).splitlines() if line.strip()),
                type(error).__name__,
            )
            warnings.warn(
                f"solve(..., compile=True) goes on without compiling. torch.compile says: {reason!r}. A C++ "
                "compiler must be installed (on a CPU), and the field must consist of torch operations, "
                "without branches on values.",
                RuntimeWarning,
                stacklevel=2,
            )
            return result

    def _on(self, device: str) -> Step:
        if device not in self.compiled:
            options: dict[str, Any] | None = {"cpp_wrapper": True} if device == "cpu" else None
            compiled: Any = torch.compile(self.step, fullgraph=True, options=options)
            self.compiled[device] = compiled
        return self.compiled[device]


def seconds_compiling() -> float:
    """Time that this process has spent in torch.compile."""
    if not _compiled:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]
