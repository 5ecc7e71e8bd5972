"""Fixed steps of RK4: on the observation grid or with dense output, compiled on request, in bounded memory."""

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

from pyro_hybrid.dynamics.clocks import just_before
from pyro_hybrid.dynamics.hermite import interpolate_path
from pyro_hybrid.dynamics.modes import current_mode
from pyro_hybrid.dynamics.slopes import Slope, expand_batch_like, inside_transform
from pyro_hybrid.errors import fail, require
from pyro_hybrid.shapes import Times

__all__ = ["Path", "check_number_of_steps", "fixed_steps", "seconds_compiling"]

# Of more steps than two such segments, what a segment's gradient needs is recomputed rather than stored.
SEGMENT = 64

Step = Callable[[Slope, "Interval", Tensor, int], tuple[Tensor, Tensor]]
Walk = tuple[list[Tensor], list[Tensor]]  # states after each step, and slopes before it


class Path(NamedTuple):
    """States where steps begin and end, and those times, in the last axis of ``knots``."""

    states: list[Tensor]
    knots: Tensor


class Interval(NamedTuple):
    """The start of a step, the last number before its end, and its length."""

    start: Tensor
    end: Tensor
    length: Tensor


def check_number_of_steps(times: Times, substeps: int, step: float | None, max_steps: int) -> None:
    """Refuse more than ``max_steps`` steps; those from one output time to the next are always allowed."""
    num_intervals = times.shape[-1] - 1
    if step is None:
        number = float(num_intervals * substeps)
    else:
        number = float((times[..., -1] - times[..., 0]).max()) / step
    require(
        number <= max(max_steps, num_intervals),
        f"no more than max_steps = {max_steps} steps",
        f"{number:.3g}",
        "Take longer steps, or raise max_steps if you mean it.",
    )


def fixed_steps(
    slope: Slope,
    y: Tensor,
    times: Times,
    substeps: int,
    step: float | None,
    axis: int,
    code: CodeType | None,
) -> tuple[Tensor | list[Tensor], Path]:
    """Integrate; return states at the given times, and the path of all steps.

    Arguments:
        slope: of a stacked state.
        y: the initial state, its components in axis 0 or -1.
        times: ``(time,)``, ``(shot, time)`` or ``(task, shot, time)``.
        substeps: number of steps between two times.
        step: instead, the length of steps that need not end on the times.
        axis: where the components are.
        code: the code of the user's field, by which compiled steps are kept; None for eager ones.
    """
    knots = _knots(times, substeps, step)
    intervals = _intervals(knots, axis)
    advance: Step = _rk4_step
    if code is not None and not inside_transform():
        y = _as_later(slope, intervals[0].start, y, axis)
        # torch.compile has versions of their own for sizes of one
        single = tuple(size == 1 for size in y.shape)
        kind = (single, knots.dim(), y.dtype, y.requires_grad, torch.is_grad_enabled())
        advance = _compiled_step(code, kind)
    states, slopes = _walk(advance, slope, y, intervals, axis)
    path = Path([expand_batch_like(y, states[0], axis), *states], knots)
    if step is None:
        return path.states[:: substeps * current_mode().step_divisor], path
    slopes = [*slopes, slope(intervals[-1].end, states[-1])]
    return interpolate_path(path.states, slopes, knots, times, axis), path


def _knots(times: Times, substeps: int, step: float | None) -> Tensor:
    divisor = current_mode().step_divisor
    if step is None:
        number = substeps * divisor
        parts = torch.arange(number, dtype=times.dtype, device=times.device) / number
        inner = times[..., :-1, None] + torch.diff(times).unsqueeze(-1) * parts
        return torch.cat([inner.flatten(-2), times[..., -1:]], -1)
    first = times[..., :1]
    last = times[..., -1:]
    number = divisor * max(1, math.ceil(float((last - first).max()) / step - 1e-4))
    parts = torch.linspace(0.0, 1.0, number + 1, dtype=times.dtype, device=times.device)
    return first + (last - first) * parts


def _intervals(knots: Tensor, axis: int) -> list[Interval]:
    """Return the steps, with an axis more for the points of a grid where clocks differ."""
    clock = knots if knots.dim() == 1 or axis == 0 else knots.unsqueeze(-2)
    starts = clock[..., :-1]
    ends = clock[..., 1:]
    parts = (starts, just_before(ends, starts), torch.diff(clock))
    return [Interval(*values) for values in zip(*(x.unbind(-1) for x in parts), strict=True)]


def _walk(advance: Step, slope: Slope, y: Tensor, intervals: list[Interval], axis: int) -> Walk:
    """Take all steps; if they are many and have a gradient, segment by segment in the memory of one."""
    states: list[Tensor] = []
    slopes: list[Tensor] = []
    recompute = len(intervals) > 2 * SEGMENT and torch.is_grad_enabled() and not inside_transform()
    if recompute:
        for start in range(0, len(intervals), SEGMENT):
            segment = _Segment(advance, slope, intervals[start : start + SEGMENT], axis)
            more = checkpoint(segment, y, use_reentrant=False, determinism_check="none")
            states += more[0]
            slopes += more[1]
            y = states[-1]
        return states, slopes
    for interval in intervals:
        y, k = advance(slope, interval, y, axis)
        states.append(y)
        slopes.append(k)
    return states, slopes


class _Segment:
    """Steps that are taken again for their gradient, and then must end where they ended before."""

    def __init__(self, advance: Step, slope: Slope, intervals: list[Interval], axis: int) -> None:
        self.advance = advance
        self.slope = slope
        self.intervals = intervals
        self.axis = axis
        self.before: Tensor | None = None

    def __call__(self, y: Tensor) -> Walk:
        states, slopes = _walk(self.advance, self.slope, y, self.intervals[:-1], self.axis)
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
        last = _walk(self.advance, self.slope, now, self.intervals[-1:], self.axis)
        return states + last[0], slopes + last[1]


def _rk4_step(slope: Slope, interval: Interval, y: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return the state after a step, and the slope before it."""
    t, end, h = interval
    half = 0.5 * h
    middle = t + half
    k1 = slope(t, y)
    if k1.dim() > y.dim():
        y = expand_batch_like(y, k1, axis)
    k2 = slope(middle, torch.addcmul(y, k1, half))
    k3 = slope(middle, torch.addcmul(y, k2, half))
    k4 = slope(end, torch.addcmul(y, k3, h))
    return torch.addcmul(y, torch.add(k1 + k4, k2 + k3, alpha=2.0), h / 6.0), k1


def _as_later(slope: Slope, t: Tensor, y: Tensor, axis: int) -> Tensor:
    """Give the first state the batch axes and gradient of all later ones: one compilation then serves them all."""
    k = slope(t, y)
    y = expand_batch_like(y, k, axis).contiguous()
    return y.detach().requires_grad_() if k.requires_grad and not y.requires_grad else y


_compiled: WeakKeyDictionary[CodeType, dict[Hashable, _Compiled]] = WeakKeyDictionary()


def _compiled_step(code: CodeType, kind: Hashable) -> Step:
    """Return a compiled step for each field and each kind of use: torch.compile limits versions by code."""
    steps = _compiled.setdefault(code, {})
    if kind not in steps:
        steps[kind] = _Compiled()
    return steps[kind]


class _Compiled:
    """A step that is compiled at its first call, for all batch sizes; if that fails, it warns and stays eager."""

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
        self, slope: Slope, interval: Interval, y: Tensor, axis: int
    ) -> tuple[Tensor, Tensor]:
        if self.step is None:
            return _rk4_step(slope, interval, y, axis)
        try:
            return self._on(y.device.type)(slope, interval, y, axis)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            result = _rk4_step(slope, interval, y, axis)
            self.step = None
            _warn_of_no_compiler(error)
            return result

    def _on(self, device: str) -> Step:
        if device not in self.compiled:
            options: dict[str, Any] | None = {"cpp_wrapper": True} if device == "cpu" else None
            compiled: Any = torch.compile(self.step, fullgraph=True, options=options)
            self.compiled[device] = compiled
        return self.compiled[device]


def _warn_of_no_compiler(error: Exception) -> None:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    warnings.warn(
        f"solve(..., compile=True) goes on without compiling. torch.compile says: {reason!r}. A C++ "
        "compiler must be installed (on a CPU), and the field must consist of torch operations, "
        "without branches on values.",
        RuntimeWarning,
        stacklevel=3,
    )


def seconds_compiling() -> float:
    """Return the time that this process has spent in torch.compile."""
    if not _compiled:
        return 0.0
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]
