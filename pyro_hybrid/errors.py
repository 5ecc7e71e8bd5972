"""The helpers that write error messages: what was expected, what came, what to do."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

__all__ = ["fail", "require", "require_finite", "require_floating"]


def fail(expected: str, came: object, remedy: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` with a message in the house's one form."""
    raise error(f"expected {expected}; got {came}. {remedy}")


def require(
    condition: bool, expected: str, came: object, remedy: str, error: type[Exception] = ValueError
) -> None:
    """Raise unless ``condition`` holds; never an ``assert``, so that ``python -O`` checks too."""
    if not condition:
        fail(expected, came, remedy, error)


def require_floating(name: str, value: object) -> None:
    """Only floating-point tensors: an integer trajectory would be truncated silently somewhere else."""
    if not isinstance(value, Tensor):
        fail(
            f"{name} to be a torch tensor",
            type(value).__name__,
            f"Convert it: torch.as_tensor({name}, dtype=torch.float32).",
            TypeError,
        )
    require(
        value.dtype in (torch.float32, torch.float64),
        f"{name} in float32 or float64",
        value.dtype,
        f"Convert it: {name}.float() or {name}.double().",
        TypeError,
    )


def require_finite(name: str, value: Tensor, mask: Tensor | None = None) -> None:
    """Every entry that counts must be a number; says where the first bad one is."""
    bad = ~torch.isfinite(value)
    if mask is not None:
        bad = bad & mask
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        fail(
            f"finite {name}",
            f"{value[where].item()} at index {where} ({int(bad.sum())} such entries)",
            "Drop them, or pass observed= with False where a value is missing.",
        )
