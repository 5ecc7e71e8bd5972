"""Clocks: times that all trajectories share, or that each shot, or each shot of each task, has of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hybrid.errors import require
from pyro_hybrid.shapes import Times

__all__ = ["check_times", "have_equal_spacing", "just_before"]

ROUNDING = 16  # times the largest time's last digit: how far clocks of equal spacing may differ


def check_times(times: Times, batch: tuple[int, ...]) -> None:
    """Require two or more increasing times, of a shape that fits the state's (task, shot)."""
    leading = tuple(times.shape[:-1])
    fits = len(leading) <= 2 and len(leading) <= len(batch)
    for size, expected in zip(reversed(leading), reversed(batch), strict=False):
        fits = fits and size in (1, expected)
    require(
        fits,
        f"times of shape (time,), (shot, time) or (task, shot, time) for (task, shot) = {batch[-2:]}",
        tuple(times.shape),
        "Give all trajectories one clock, or each shot its own, or each shot of each task.",
    )
    increasing = times.shape[-1] >= 2 and bool((torch.diff(times) > 0).all())
    require(
        increasing,
        "two or more strictly increasing times",
        _describe(times),
        "Sort the times and drop duplicates.",
    )


def _describe(times: Tensor) -> object:
    if times.numel() < 9:
        return times.tolist()
    smallest = float(torch.diff(times).min()) if times.shape[-1] > 1 else "none"
    return f"{tuple(times.shape)} with a smallest step of {smallest}"


def have_equal_spacing(times: Times) -> bool:
    """Tell whether clocks differ by an offset only, up to rounding."""
    if times.dim() == 1:
        return True
    elapsed = (times - times[..., :1]).flatten(0, -2)
    tolerance = ROUNDING * torch.finfo(times.dtype).eps * times.abs().max()
    return bool((elapsed - elapsed[:1]).abs().max() <= tolerance)


def just_before(ends: Tensor, starts: Tensor) -> Tensor:
    """Return the last numbers before the ends: where a force jumps at an end, its value until then counts."""
    last = torch.nextafter(ends.detach(), starts.detach())
    return ends + (last - ends.detach())
