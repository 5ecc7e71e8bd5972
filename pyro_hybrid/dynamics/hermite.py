"""Cubic Hermite interpolation between the steps of a path, with an error of the same order as RK4's."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hybrid.dynamics.clocks import have_equal_spacing
from pyro_hybrid.dynamics.slopes import all_finite
from pyro_hybrid.shapes import Times

__all__ = ["interpolate_path"]


def interpolate_path(
    states: list[Tensor], slopes: list[Tensor], knots: Tensor, times: Times, axis: int
) -> Tensor:
    """Interpolate states at given times, time first.

    Arguments:
        states, slopes: at each knot, in the solver's form.
        knots: where steps begin and end, equally spaced for each clock, ``(..., knot)``.
        times: where states are wanted, ``(..., time)``, within the knots.
        axis: where the components are: 0, or -1 for fields on a grid.
    """
    nodes = torch.stack([*states, *slopes])
    if times.dim() == 1:
        return _one_product(nodes, knots, times)
    if have_equal_spacing(times):
        return _one_product(nodes, _elapsed(knots), _elapsed(times))
    return _each_its_own(nodes, knots, times, axis)


def _elapsed(clocks: Tensor) -> Tensor:
    """Return the time since the start by clocks that differ by an offset only."""
    return (clocks - clocks[..., :1]).flatten(0, -2)[0]


def _one_product(nodes: Tensor, knots: Tensor, times: Tensor) -> Tensor:
    """Interpolate with one clock for all trajectories, by one product of matrices."""
    number = len(knots)
    index = torch.searchsorted(knots, times, right=True).sub(1).clamp(0, number - 2)
    before, after, slope_before, slope_after = _weights(knots, times, index)
    rows = torch.arange(len(times), device=times.device)
    weights = times.new_zeros(len(times), 2 * number)
    weights[rows, index] = before
    weights[rows, index + 1] = after
    weights[rows, number + index] = slope_before
    weights[rows, number + index + 1] = slope_after
    flat = nodes.flatten(1)
    result = weights @ flat
    if not all_finite(result):  # zero times NaN is NaN, which must not travel back in time
        lost = (weights != 0.0).to(flat.dtype) @ (~torch.isfinite(flat)).to(flat.dtype) > 0.0
        result = (weights @ flat.nan_to_num(0.0, 0.0, 0.0)).masked_fill(lost, torch.nan)
    return result.view(len(times), *nodes.shape[1:])


def _each_its_own(nodes: Tensor, knots: Tensor, times: Tensor, axis: int) -> Tensor:
    """Interpolate with a clock for each shot, or for each shot of each task, whose spacing differs."""
    number = knots.shape[-1]
    index = torch.searchsorted(knots.contiguous(), times.contiguous(), right=True)
    index = index.sub(1).clamp(0, number - 2)
    row = _time_first(index, nodes, axis)
    shape = (len(row), *nodes.shape[1:])
    rows = (row, row + 1, number + row, number + row + 1)
    total = torch.zeros((), dtype=nodes.dtype, device=nodes.device)
    for weight, at in zip(_weights(knots, times, index), rows, strict=True):
        weight = _time_first(weight, nodes, axis)
        values = nodes.gather(0, at.expand(shape))
        total = total + torch.where(weight == 0.0, 0.0, weight * values)
    return total


def _time_first(values: Tensor, nodes: Tensor, axis: int) -> Tensor:
    """Bring (..., time) to (time, ...), with the axes of the nodes that it lacks."""
    values = values.movedim(-1, 0)
    if axis == -1:
        values = values.unsqueeze(-1)
    return values.reshape(len(values), *[1] * (nodes.dim() - values.dim()), *values.shape[1:])


def _weights(knots: Tensor, times: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights of the states before and after each time, and of the slopes there."""
    h = knots[..., 1:2] - knots[..., :1]
    x = (times - knots.gather(-1, index)) / h
    before = (1 + 2 * x) * (1 - x) ** 2
    after = x * x * (3 - 2 * x)
    return before, after, h * x * (1 - x) ** 2, h * x * x * (x - 1)
