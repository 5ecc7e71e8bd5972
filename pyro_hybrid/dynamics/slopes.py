"""Slopes: a user's field as a function of one tensor, checked, and what torch.func's transforms allow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_hybrid.errors import fail
from pyro_hybrid.shapes import State

__all__ = ["Field", "Slope", "all_finite", "expand_batch_like", "inside_transform", "slope_of"]

Field = Callable[[Tensor, State], State]
Slope = Callable[[Tensor, Tensor], Tensor]


def slope_of(field: Field, axis: int) -> Slope:
    """Make a field a function of one tensor with components in this axis, and check what it returns.

    The components of a tuple are stacked in axis 0: one operation then serves them all. Fields on a grid have their
    points in axis -1.
    """
    return _of_tuples(field) if axis == 0 else _of_tensors(field)


def _of_tensors(field: Field) -> Slope:
    def slope(t: Tensor, state: Tensor) -> Tensor:
        slopes = field(t, state)
        if not isinstance(slopes, Tensor) or slopes.shape[-1:] != state.shape[-1:]:
            fail(
                f"the field to return a tensor (..., {state.shape[-1]})",
                _describe(slopes),
                "Return one slope for each component, in the last axis.",
                TypeError,
            )
        return slopes.expand(torch.broadcast_shapes(slopes.shape, state.shape))

    return slope


def _of_tuples(field: Field) -> Slope:
    def slope(t: Tensor, state: Tensor) -> Tensor:
        parts = state.unbind(0)
        slopes = field(t, parts)
        if not isinstance(slopes, tuple) or len(slopes) != len(parts):
            fail(
                f"the field to return a tuple of {len(parts)} slopes",
                _describe(slopes),
                "Return one slope for each component of the state, in the same order.",
                TypeError,
            )
        if any(part.shape != parts[0].shape for part in slopes):
            slopes = torch.broadcast_tensors(*slopes, parts[0])[:-1]
        return torch.stack(slopes)

    return slope


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"a {type(value).__name__}"


def expand_batch_like(y: Tensor, like: Tensor, axis: int) -> Tensor:
    """Give a state the batch axes, such as particles, that a slope has more than it."""
    if axis == 0:
        y = y.reshape(len(y), *[1] * (like.dim() - y.dim()), *y.shape[1:])
    return y.expand(torch.broadcast_shapes(y.shape, like.shape))


def inside_transform() -> bool:
    """Tell whether this runs under a transform of ``torch.func``, such as ``vmap`` or ``jacrev``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def all_finite(values: Tensor) -> bool | None:
    """Tell whether all values are finite; None under ``torch.func.vmap``, which hides them."""
    finite = torch.isfinite(values).all()
    if not inside_transform():
        return bool(finite)
    try:
        return bool(finite)
    except RuntimeError:  # vmap refuses control flow that depends on values
        return None
