"""Helpers that raise errors in one form: expected, got, what to do."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = [
    "fail",
    "is_installed",
    "require",
    "require_callable",
    "require_finite",
    "require_floating",
    "require_integer",
    "require_package",
    "require_seed",
]


def fail(expected: str, got: object, remedy: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` with a message in the library's one form."""
    raise error(f"expected {expected}; got {got}. {remedy}")


def require(
    condition: bool, expected: str, got: object, remedy: str, error: type[Exception] = ValueError
) -> None:
    """Raise unless ``condition`` holds; unlike ``assert``, also under ``python -O``."""
    if not condition:
        fail(expected, got, remedy, error)


def require_package(module: str, extra: str, alternative: str = "") -> Any:
    """Import a module of an optional package, or raise an error that names the extra which installs it.

    >>> require_package("json", extra="tables").dumps([1])
    '[1]'

    Arguments:
        module: its dotted name.
        extra: the optional dependencies of this package that it belongs to.
        alternative: what to do instead of installing it, for the error message.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        remedy = f"Install it: pip install 'pyro_hybrid[{extra}]'"
        remedy += f", or {alternative}." if alternative else "."
        fail(f"the module {module}", error, remedy, ImportError)


def is_installed(module: str) -> bool:
    """Tell whether a top-level module can be imported, without importing it."""
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def require_floating(name: str, value: object) -> None:
    """Require a floating-point tensor, since an integer one would be truncated silently later."""
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
    """Require finite entries where ``mask`` is True, and name the first that is not."""
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


def require_integer(
    name: str, value: object, least: int, remedy: str, most: int | None = None
) -> None:
    """Require a whole number within limits; True, 1.5 and 2.0 are not whole numbers."""
    limits = f"of {least} or more" if most is None else f"from {least} to {most}"
    expected = f"{name} as a whole number {limits}"
    if not isinstance(value, Integral) or isinstance(value, bool):
        fail(expected, repr(value), remedy, TypeError)
    is_within = least <= int(value) and (most is None or int(value) <= most)
    require(is_within, expected, value, remedy)


def require_seed(seed: object) -> None:
    """Require a seed that both torch and numpy accept."""
    require_integer("seed", seed, 0, "Pass seed=0, or another seed for other random numbers.")


def require_callable(name: str, value: object, remedy: str) -> None:
    """Require something that can be called, such as a Pyro program."""
    require(callable(value), f"{name} to be callable", type(value).__name__, remedy, TypeError)
