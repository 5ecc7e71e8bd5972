"""interpolate: known inputs u(t), measured at some times, as a function for a field."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_hybrid.errors import fail, require, require_finite, require_floating
from pyro_hybrid.shapes import Times

__all__ = ["interpolate"]


def interpolate(
    times: Times,
    values: Tensor,
    kind: str = "linear",
    *,
    grid: bool = False,
) -> Callable[[Tensor], Tensor]:
    r"""Make a function u(t) of known inputs, to be called in a field.

    Between two times, linear inputs lie on the line between their values, and constant ones keep the earlier value
    (zero-order hold):

    .. math:: u(t) = u_i + \frac{t - t_i}{t_{i+1} - t_i} (u_{i+1} - u_i) \quad \text{or} \quad u_i,
              \qquad t_i \le t < t_{i+1}

    Before the first time and from the last one on, u(t) is the first and the last value. For
    :func:`~pyro_hybrid.solve`, constant inputs that jump at output times, or where substeps end, cost no accuracy: a
    step sees the value that holds until its end. Inputs that jump within a step make an error of first order.

    Arguments:
        times: increasing, of the inputs: ``(time,)``, ``(shot, time)`` or ``(task, shot, time)``.
        values: ``(..., time, input)``, such as ``(task, shot, time, input)``, or ``(time, input)`` for all trajectories.
        kind: ``"linear"`` or ``"constant"``.
        grid: whether the field is one on a grid. Inputs then have an axis more, of size 1, for its points.

    Returns:
        A function of the time that a field is called with, to inputs ``(..., input)``: ``(task, shot, input)`` for
        values by task and shot. ``u(t)[..., 0]`` is the first input, in the form of a state's component.

    >>> u = interpolate(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([[0.0], [2.0], [6.0]]))
    >>> [float(u(torch.tensor(t))) for t in (-1.0, 0.5, 2.0, 9.0)]
    [0.0, 1.0, 4.0, 6.0]
    """
    _check(times, values, kind)
    if grid:
        values = values.unsqueeze(-3) if values.dim() > 2 else values
        times = times.unsqueeze(-2) if times.dim() > 1 else times

    def constant(t: Tensor) -> Tensor:
        """Return the inputs that hold at a time, or at the time of each trajectory."""
        return _take(values, _index(times, t))

    def linear(t: Tensor) -> Tensor:
        """Return the inputs on the line at a time, or at the time of each trajectory."""
        index = _index(times, t).clamp(max=times.shape[-1] - 2)
        start = _take(times.unsqueeze(-1), index).squeeze(-1)
        end = _take(times.unsqueeze(-1), index + 1).squeeze(-1)
        weight = ((t - start) / (end - start)).clamp(0.0, 1.0).unsqueeze(-1)
        return torch.lerp(_take(values, index), _take(values, index + 1), weight)

    return constant if kind == "constant" else linear


def _index(times: Tensor, t: Tensor) -> Tensor:
    """Return the place of the last time that is not after t; 0 before the first."""
    if times.dim() == 1:
        index = torch.searchsorted(times, t.contiguous(), right=True)
    else:
        batch = torch.broadcast_shapes(times.shape[:-1], t.shape)
        knots = times.expand(*batch, -1).contiguous()
        index = torch.searchsorted(knots, t.expand(batch).unsqueeze(-1).contiguous(), right=True)
        index = index.squeeze(-1)
    return index.sub(1).clamp(min=0)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Take (..., input) of values (..., time, input), at an index for all trajectories or for each."""
    if index.dim() == 0:
        return values.index_select(-2, index.view(1)).squeeze(-2)
    batch = torch.broadcast_shapes(values.shape[:-2], index.shape)
    place = index.expand(batch)[..., None, None].expand(*batch, 1, values.shape[-1])
    return values.expand(*batch, *values.shape[-2:]).gather(-2, place).squeeze(-2)


def _check(times: Tensor, values: Tensor, kind: str) -> None:
    for name, value in (("times", times), ("values", values)):
        require_floating(name, value)
        require_finite(name, value)
    require(
        values.dtype == times.dtype,
        f"values in {times.dtype}, as the times",
        values.dtype,
        "Convert one.",
        TypeError,
    )
    require(
        kind in ("linear", "constant"),
        'kind "linear" or "constant"',
        repr(kind),
        "Take constant for inputs that are held between their times.",
    )
    if not 1 <= times.dim() <= 3 or values.dim() < 2 or values.shape[-2] != times.shape[-1]:
        fail(
            "times (..., time) and values (..., time, input) of as many times",
            f"{tuple(times.shape)} and {tuple(values.shape)}",
            "Give each input an axis: values.unsqueeze(-1) for one.",
        )
    require(
        times.shape[-1] >= 2 and bool((torch.diff(times) > 0).all()),
        "two or more strictly increasing times",
        f"times of shape {tuple(times.shape)} that are not",
        "Sort the times and drop duplicates.",
    )
    try:
        torch.broadcast_shapes(times.shape[:-1], values.shape[:-2])
    except RuntimeError:
        fail(
            "times of the trajectories of values",
            f"{tuple(times.shape)} and {tuple(values.shape)}",
            "Give one clock, or (shot, time), or (task, shot, time).",
        )
