"""Adaptive methods: torchdiffeq, from one output time to the next, with the error of each trajectory by itself.

This is the only importer of torchdiffeq. Interpolating to output times misses the tolerance by 7 (dopri5) to 1000
times (dopri8), and asked to land on all of them at once torchdiffeq forgets the rest as soon as a step happens to end
on one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hybrid.dynamics.clocks import have_equal_spacing, just_before
from pyro_hybrid.dynamics.failures import SolverError
from pyro_hybrid.dynamics.modes import current_mode
from pyro_hybrid.dynamics.slopes import Slope, expand_batch_like
from pyro_hybrid.shapes import Times

__all__ = ["Tolerance", "adaptive_steps"]


class Tolerance(NamedTuple):
    """Relative and absolute tolerance, and the number of steps after which a method gives up."""

    rtol: float
    atol: float
    max_steps: int


def adaptive_steps(
    slope: Slope, y: Tensor, times: Times, method: str, tolerance: Tolerance, axis: int
) -> list[Tensor]:
    """Return states at all times, in the solver's form."""
    import torchdiffeq  # here, since it imports much of scipy

    clock = _Clock(times, axis)
    watch = _Watch(slope, clock, tolerance.max_steps, axis)
    y = expand_batch_like(y, slope(clock.at(clock.begin(1)[0]), y), axis)
    path = []
    options: dict[str, object] = {"norm": watch.norm}
    for k in range(1, times.shape[-1]):
        path.append(watch.shown(y))
        interval = clock.begin(k)
        while not watch.lost.all():
            options["step_t"] = interval[1:]
            try:
                y = torchdiffeq.odeint(
                    watch,
                    y,
                    interval,
                    rtol=tolerance.rtol,
                    atol=tolerance.atol,
                    method=method,
                    options=options,
                )[1]
                break
            except SolverError:
                if current_mode().raise_failures:
                    raise
                y = y.masked_fill(watch.lost.unsqueeze(axis), 0.0)
        options["first_step"] = watch.step
    return [*path, watch.shown(y)]


class _Clock:
    """Times of all trajectories, from the one that torchdiffeq counts.

    Clocks that differ by an offset are counted from their starts. If their spacing differs, each interval between two
    output times is counted from 0 to 1.
    """

    def __init__(self, times: Times, axis: int) -> None:
        self.times = times
        self.has_grid_axis = axis == -1 and times.dim() > 1
        self.equal = have_equal_spacing(times)
        self.length: Tensor | None = None
        if times.dim() == 1:
            self.start = times.new_zeros(())
            self.elapsed = times
        else:
            self.start = self._for_states(times[..., 0])
            self.elapsed = (times - times[..., :1]).flatten(0, -2)[0]

    def begin(self, k: int) -> Tensor:
        """Begin the interval that ends at output time k; return what torchdiffeq counts from and to."""
        start = self._for_states(self.times[..., k - 1])
        end = self._for_states(self.times[..., k])
        self.last = just_before(end, start)
        if self.equal:
            return self.elapsed[k - 1 : k + 1]
        self.start = start
        self.length = end - start
        return torch.stack([self.times.new_zeros(()), self.times.new_ones(())])

    def at(self, t: Tensor) -> Tensor:
        """Return the time of each trajectory; at the end of an interval, the last number before it."""
        now = t + self.start if self.length is None else self.start + self.length * t
        return torch.minimum(now, self.last)

    def scaled(self, slope: Tensor) -> Tensor:
        """Return a slope by the time that torchdiffeq counts."""
        return slope if self.length is None else slope * self.length

    def time_of(self, index: tuple[int, ...], t: Tensor) -> float:
        """Return the time of one trajectory, by its index in the batch."""
        times = self.at(t.detach())
        if self.has_grid_axis:
            times = times.squeeze(-1)
        place = index[len(index) - times.dim() :]
        own = tuple(min(i, size - 1) for i, size in zip(place, times.shape, strict=True))
        return float(times[own])

    def _for_states(self, values: Tensor) -> Tensor:
        return values.unsqueeze(-1) if self.has_grid_axis else values


_SHRANK = "the step size shrank to nothing (a blow-up, or a tolerance out of reach)"


class _Watch:
    """A slope that ends, with a reason, what torchdiffeq would end by an assert or, under ``python -O``, never.

    Trajectories that were ``lost`` keep their state from there on.
    """

    def __init__(self, slope: Slope, clock: _Clock, max_steps: int, axis: int) -> None:
        self.slope = slope
        self.clock = clock
        self.max_steps = max_steps
        self.axis = axis
        self.steps = 0
        self.errors = torch.zeros(())
        self.step: Tensor | None = None
        self.lost = torch.zeros((), dtype=torch.bool, device=clock.times.device)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        slope = self.clock.scaled(self.slope(self.clock.at(t), y))
        slope = slope.masked_fill(self.lost.unsqueeze(self.axis), 0.0)
        bad = ~torch.isfinite(slope + y).all(self.axis)
        if bad.any():
            cause = "the state or its slope stopped being finite" if t.isfinite() else _SHRANK
            self.give_up(cause, t, bad.float())
        return slope

    def norm(self, error: Tensor) -> Tensor:
        """Return the root mean square over components of the worst trajectory: none is averaged with the others."""
        self.errors = error.detach().square().mean(self.axis)
        return self.errors.max().sqrt()

    def callback_step(self, t: Tensor, y: Tensor, step: Tensor) -> None:
        """Count the step that torchdiffeq is about to try."""
        self.steps += 1
        self.step = step.detach()
        errors = self.errors.nan_to_num(torch.inf, torch.inf)
        if self.steps > self.max_steps:
            cause = f"more than max_steps = {self.max_steps} steps needed"
            self.give_up(cause, t, errors, everyone=True)
        if not t + step > t:
            self.give_up(_SHRANK, t, errors)

    def give_up(self, cause: str, t: Tensor, badness: Tensor, everyone: bool = False) -> None:
        """Raise, and take the worst trajectory for lost, or everyone."""
        index = tuple(int(i) for i in torch.unravel_index(badness.argmax(), badness.shape))
        self.lost = self.lost | everyone | (badness == badness.max())
        raise SolverError(cause, index, self.clock.time_of(index, t), self.steps)

    def shown(self, y: Tensor) -> Tensor:
        """Return the state, with NaN for the lost."""
        return y.masked_fill(self.lost.unsqueeze(self.axis), torch.nan)
