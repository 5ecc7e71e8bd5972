"""solve: the one door to integrators, and the only importer of torchdiffeq."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import CodeType

import torch
import torchdiffeq
from pyro.ops.integrator import register_exception_handler
from torch import Tensor

from pyro_hybrid.dynamics.modes import inside
from pyro_hybrid.dynamics.rk4 import Path, Slope, fixed_steps, grown
from pyro_hybrid.errors import fail, require, require_floating
from pyro_hybrid.shapes import State, Times

__all__ = ["Field", "SolverError", "nan_on_failure", "solve", "skip_integration"]

Field = Callable[[Tensor, State], State]

_raise_failures: ContextVar[bool] = ContextVar("raise_failures", default=True)
_still: ContextVar[bool] = ContextVar("still", default=False)


class SolverError(RuntimeError):
    """An integration that failed: ``cause`` says why, ``index`` where in the batch, ``time`` and ``steps`` when."""

    def __init__(
        self, cause: str, index: tuple[int, ...] = (), time: float = math.nan, steps: int = 0
    ) -> None:
        self.cause, self.index, self.time, self.steps = cause, index, time, steps
        self.task = index[-2] if len(index) > 1 else (index[0] if index else 0)
        super().__init__(  # Pyro raises it again with the whole message as the cause, and shapes after it
            cause
            if math.isnan(time)
            else f"{cause} in task {self.task} (batch index {index}) at t = {time:.4g} after {steps} steps. "
            "Shorten the segments, add substeps, or bound the neural term's output."
        )
        # To NUTS and HMC a diverging trajectory is a proposal to reject, not the end of the run.
        register_exception_handler(
            "pyro_hybrid", lambda e: isinstance(e, SolverError), warn_on_overwrite=False
        )


def nan_on_failure() -> AbstractContextManager[None]:
    """Inside, a diverging trajectory comes back as NaN or Inf instead of raising; others are untouched."""
    return inside(_raise_failures, False)


def skip_integration() -> AbstractContextManager[None]:
    """Inside, solve integrates nothing: states keep their initial value. For learning what sites a program has."""
    return inside(_still, True)


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

    One trajectory never disturbs another: fixed steps are taken row by row, and the adaptive methods measure the
    error per trajectory and step by the worst. Gradients reach every tensor that the field captured. The memory that
    they need stops growing at 128 fixed steps; beyond, segments of 64 are computed twice instead.

    Arguments:
        field: ``field(t, state)`` returns the state's slope, in the state's own form.
        initial: a tuple of tensors, one a component, each ``(..., task, shot)``, which broadcast with whatever the
            field captured; or one tensor ``(..., task, shot, component)``, for fields on a grid.
        times: increasing output times, the first belonging to ``initial``: ``(time,)``, or ``(shot, time)`` where each
            shot has its own clock. Restart states (multiple shooting) are shots with clocks of their own.
        method: ``"rk4"``, of fixed step, or torchdiffeq's ``"dopri5"`` and ``"dopri8"``, which land on output times.
        substeps: steps of rk4 between two output times.
        step: instead, the length of rk4's steps, or a little less, wherever the output times are; between its steps it
            interpolates (cubic Hermite). Fewer field evaluations where data are dense:
            :func:`~pyro_hybrid.step_error` says what they cost.
        compile: compile rk4's step with ``torch.compile``: some ten seconds for each field and kind of use (training,
            whole or on segments; inference), then steps up to twice as fast. Without a compiler: a warning, and eager.
        rtol, atol: tolerances of the adaptive methods.
        max_steps: after so many steps an adaptive method gives up with a :class:`SolverError`.

    Returns:
        States at all times, ``(..., time, component)``.
    """
    _check(initial, times, method, substeps, step, compile, max_steps)
    if isinstance(initial, tuple):
        stacked, axis = torch.stack(torch.broadcast_tensors(*initial)), 0
    else:
        stacked, axis = initial, -1
    slope = _checked(field, axis)
    if _still.get():
        path: Tensor | list[Tensor] = [stacked] * times.shape[-1]
    elif method == "rk4":
        path, walked = fixed_steps(
            slope, stacked, times, substeps, step, axis, _code(field) if compile else None
        )
        if (
            _raise_failures.get()
            and not torch.isfinite(path if isinstance(path, Tensor) else path[-1]).all()
        ):
            _explain(walked, axis)
    else:
        path = _adaptive(slope, stacked, times, method, rtol, atol, max_steps, axis)
    if isinstance(path, list):
        states = torch.stack(path, -1 if axis == 0 else -2)
        return states.movedim(0, -1) if axis == 0 else states
    return path.permute(*range(2, path.dim()), 0, 1) if axis == 0 else path.movedim(0, -2)


def _checked(field: Field, axis: int) -> Slope:
    """The field on one tensor, a tuple's components stacked first: one operation then serves them all."""

    def slope(t: Tensor, state: Tensor) -> Tensor:
        slopes = field(t, state)
        if not isinstance(slopes, Tensor) or slopes.shape[-1:] != state.shape[-1:]:
            fail(
                f"the field to return a tensor (..., {state.shape[-1]})",
                _form(slopes),
                "Return one slope for each component, in the last axis.",
                TypeError,
            )
        return slopes.expand(torch.broadcast_shapes(slopes.shape, state.shape))

    def stacked(t: Tensor, state: Tensor) -> Tensor:
        parts = state.unbind(0)
        slopes = field(t, parts)
        if not isinstance(slopes, tuple) or len(slopes) != len(parts):
            fail(
                f"the field to return a tuple of {len(parts)} slopes",
                _form(slopes),
                "Return one slope for each component of the state, in the same order.",
                TypeError,
            )
        if any(part.shape != parts[0].shape for part in slopes):
            slopes = torch.broadcast_tensors(*slopes, parts[0])[:-1]
        return torch.stack(slopes)

    return stacked if axis == 0 else slope


def _form(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple) else "")


def _explain(walked: Path, axis: int) -> None:
    for k, y in enumerate(walked.states):
        bad = ~torch.isfinite(y).all(axis)
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            knots = walked.knots
            clock = knots if knots.dim() == 1 else knots.expand(bad.shape[-1], -1)[index[-1]]
            raise SolverError("the state stopped being finite", index, float(clock[k]), k)
    raise SolverError(
        "the slope at the last time isn't finite", (), float(walked.knots.flatten()[-1]), k
    )


def _code(field: Field) -> CodeType:
    """What a field's compiled steps are kept by."""
    return getattr(field, "__code__", getattr(type(field).__call__, "__code__", solve.__code__))


def _adaptive(
    slope: Slope,
    y: Tensor,
    times: Times,
    method: str,
    rtol: float,
    atol: float,
    max_steps: int,
    axis: int,
) -> list[Tensor]:
    """torchdiffeq, from one output time to the next.

    Interpolating to output times misses the tolerance by 7 (dopri5) to 1000 times (dopri8), and asked to land on all of
    them at once torchdiffeq forgets the rest as soon as a step happens to end on one.
    """
    offset, clock = _common_clock(times, axis)
    y = grown(y, slope(clock[0] + offset, y), axis)
    watch, path = _Watch(slope, offset, max_steps, axis), []
    options: dict[str, object] = {"norm": watch.norm}
    for k in range(1, len(clock)):
        path.append(watch.shown(y))
        while not watch.lost.all():
            options["step_t"], interval = clock[k : k + 1], clock[k - 1 : k + 1]
            try:
                y = torchdiffeq.odeint(
                    watch, y, interval, rtol=rtol, atol=atol, method=method, options=options
                )[1]
                break
            except SolverError:
                if _raise_failures.get():
                    raise
                y = y.masked_fill(watch.lost.unsqueeze(axis), 0.0)
        options["first_step"] = watch.step
    return [*path, watch.shown(y)]


_SHRANK = "the step size shrank to nothing (a blow-up, or a tolerance out of reach)"


class _Watch:
    """A slope that ends, with a reason, what torchdiffeq would end by an assert or, under ``python -O``, never.

    Trajectories that were ``lost`` stand still from there on.
    """

    def __init__(self, slope: Slope, offset: Tensor, max_steps: int, axis: int) -> None:
        self.slope, self.offset, self.max_steps, self.axis = slope, offset, max_steps, axis
        self.steps, self.errors = 0, torch.zeros(())
        self.step: Tensor | None = None
        self.lost = torch.zeros((), dtype=torch.bool, device=offset.device)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        slope = self.slope(t + self.offset, y).masked_fill(self.lost.unsqueeze(self.axis), 0.0)
        bad = ~torch.isfinite(slope + y).all(self.axis)
        if bad.any():
            self.give_up(
                "the state or its slope stopped being finite" if t.isfinite() else _SHRANK,
                t,
                bad.float(),
            )
        return slope

    def norm(self, error: Tensor) -> Tensor:
        """Root mean square over components, the worst of all trajectories: none hides behind the others."""
        self.errors = error.detach().square().mean(self.axis)
        return self.errors.max().sqrt()

    def callback_step(self, t: Tensor, y: Tensor, step: Tensor) -> None:
        """What torchdiffeq calls before every step that it tries."""
        self.steps, self.step = self.steps + 1, step.detach()
        errors = self.errors.nan_to_num(torch.inf, torch.inf)
        if self.steps > self.max_steps:
            self.give_up(
                f"more than max_steps = {self.max_steps} steps needed", t, errors, everyone=True
            )
        if not t + step > t:
            self.give_up(_SHRANK, t, errors)

    def give_up(self, cause: str, t: Tensor, badness: Tensor, everyone: bool = False) -> None:
        index = tuple(int(i) for i in torch.unravel_index(badness.argmax(), badness.shape))
        self.lost = self.lost | everyone | (badness == badness.max())
        offset = self.offset.flatten()[index[-1] if self.offset.numel() > 1 else 0]
        raise SolverError(cause, index, float(t + offset), self.steps)

    def shown(self, y: Tensor) -> Tensor:
        """The state, with NaN for the lost."""
        return y.masked_fill(self.lost.unsqueeze(self.axis), torch.nan)


def _common_clock(times: Times, axis: int) -> tuple[Tensor, Tensor]:
    if times.dim() == 1:
        return times.new_zeros(()), times
    offset, clock = times[..., 0], times - times[..., :1]
    require(
        bool(
            (clock - clock[:1]).abs().max() <= 16 * torch.finfo(times.dtype).eps * times.abs().max()
        ),
        "clocks that differ by an offset only (adaptive methods)",
        "clocks of different spacing",
        'Use method="rk4", or solve the shots one by one.',
    )
    return (offset if axis == 0 else offset.unsqueeze(-1)), clock[0]


def _check(
    initial: State,
    times: Times,
    method: str,
    substeps: int,
    step: float | None,
    compile: bool,
    max_steps: int,
) -> None:
    require(
        method in ("rk4", "dopri5", "dopri8"),
        'method "rk4", "dopri5" or "dopri8"',
        repr(method),
        'Take "rk4" for training and "dopri8" for reference solutions.',
    )
    require(
        substeps >= 1 and max_steps >= 1,
        "substeps and max_steps of 1 or more",
        f"{substeps} and {max_steps}",
        "Pass positive integers.",
    )
    require(
        step is None or step > 0.0 and substeps == 1,
        "a positive step, without substeps",
        f"step={step} and substeps={substeps}",
        "Pass one of the two.",
    )
    require(
        method == "rk4" or step is None and not compile,
        "step and compile with method='rk4' only",
        f"method={method!r}",
        "The adaptive methods choose their own steps, by rtol and atol.",
    )
    parts = initial if isinstance(initial, tuple) else (initial,)
    if not parts or any(p.numel() == 0 for p in parts):
        fail("a state with at least one row", "an empty one", "Check for empty batches.")
    for name, value in (("times", times), *(("initial", p) for p in parts)):
        require_floating(name, value)
        require(
            value.dtype == times.dtype,
            f"initial in {times.dtype}, as the times",
            value.dtype,
            "Convert one.",
            TypeError,
        )
    shape = torch.broadcast_shapes(*(p.shape for p in parts))
    shots = shape[-1:] if isinstance(initial, tuple) else shape[-2:-1]
    require(
        times.dim() == 1 or times.dim() == 2 and times.shape[0] in (1, *shots),
        f"times of shape (time,) or (shot, time) for {tuple(shots)} shots",
        tuple(times.shape),
        "Give all shots one clock, or each its own.",
    )
    require(
        times.shape[-1] >= 2 and bool((torch.diff(times) > 0).all()),
        "two or more strictly increasing times",
        times.tolist()
        if times.numel() < 9
        else f"{tuple(times.shape)} with a smallest step of "
        f"{float(torch.diff(times).min()) if times.shape[-1] > 1 else 'none'}",
        "Sort the times and drop duplicates.",
    )
