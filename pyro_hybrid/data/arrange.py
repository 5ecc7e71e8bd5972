"""Arrange raw trajectories before they become tasks: cut long ones, and find the states that were measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_hybrid.data.validate import check_initial, require_measured
from pyro_hybrid.errors import require

__all__ = ["cut_times", "measured_states"]


def cut_times(value: Any, pieces: int, dim: int) -> Any:
    """Cut the axis of times into pieces, which count as shots; None stays None."""
    if value is None:
        return None
    length = value.shape[dim] // pieces
    whole = value.narrow(dim, 0, length * pieces)
    return whole.unflatten(dim, (pieces, length)).flatten(dim - 1, dim)


def measured_states(
    times: Tensor,
    values: Tensor,
    observed: Tensor,
    initial: Tensor | str | None,
) -> Tensor | None:
    """Check measured states, of the first time or of all times, and fill their gaps."""
    if initial is None:
        return None
    if isinstance(initial, str):
        require(
            initial == "sensors",
            "initial='sensors', a tensor or None",
            repr(initial),
            "Pass 'sensors' if the sensors are the state's components.",
        )
        require(
            values.shape[2] > 1,
            "two times or more, the first of which is the start",
            "one",
            "Pass initial=None for data that don't move.",
        )
        states = values.where(observed, torch.nan)
    else:
        check_initial(initial, values)
        states = initial
    if states.dim() == 4 and not bool(observed.all()):
        states = _fill_gaps(times, states)
    require_measured("initial", states)
    return states


def _fill_gaps(times: Tensor, states: Tensor) -> Tensor:
    """Interpolate missing states linearly in time, because segments may have to start there."""
    clocks = times.expand(*states.shape[:2], -1).unsqueeze(-1).expand_as(states)
    last = times.shape[-1] - 1
    is_known = torch.isfinite(states)
    index = torch.arange(last + 1, device=times.device).view(-1, 1)
    before = index.where(is_known, -1).cummax(2).values
    after = index.where(is_known, last + 1).flip(2).cummin(2).values.flip(2)
    start = before.where(before >= 0, after).clamp(max=last)
    end = after.where(after <= last, before).clamp(min=0)
    known = states.where(is_known, 0.0)
    start_time = clocks.gather(2, start)
    gap = clocks.gather(2, end) - start_time
    share = (clocks - start_time) / gap.where(gap > 0.0, 1.0)
    share = share.where(gap > 0.0, 0.0)
    return torch.lerp(known.gather(2, start), known.gather(2, end), share)
