"""Settings of the solver for programs that somebody else wrote, where no argument can reach ``solve``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "Mode",
    "Solution",
    "current_mode",
    "halve_steps",
    "nan_on_failure",
    "record_solutions",
    "skip_integration",
]


class Solution(NamedTuple):
    """Times and states of one call of ``solve``: ``(..., time)`` and ``(..., time, component)``."""

    times: Tensor
    states: Tensor


@dataclass(frozen=True)
class Mode:
    """How ``solve`` behaves in this context.

    Arguments:
        raise_failures: whether a diverging trajectory is an exception rather than NaN.
        integrate: whether equations are integrated at all.
        step_divisor: number of parts into which each fixed step is divided.
        solutions: a list to which every solution is appended, or None.
    """

    raise_failures: bool = True
    integrate: bool = True
    step_divisor: int = 1
    solutions: list[Solution] | None = None


DEFAULT = Mode()
_mode: ContextVar[Mode] = ContextVar("mode", default=DEFAULT)


def current_mode() -> Mode:
    """Return the mode of this context."""
    return _mode.get()


@contextmanager
def nan_on_failure() -> Iterator[None]:
    """Return NaN or Inf for a diverging trajectory inside, instead of raising; leave others as they are."""
    with _changed(raise_failures=False):
        yield


@contextmanager
def skip_integration() -> Iterator[None]:
    """Keep states at their initial value inside, to learn what sites a program has without integrating it."""
    with _changed(integrate=False):
        yield


@contextmanager
def halve_steps() -> Iterator[None]:
    """Halve all fixed steps inside: states then change by their error, but for a sixteenth of it."""
    with _changed(step_divisor=2 * current_mode().step_divisor):
        yield


@contextmanager
def record_solutions() -> Iterator[list[Solution]]:
    """Collect the solutions of all calls of ``solve`` inside."""
    solutions: list[Solution] = []
    with _changed(solutions=solutions):
        yield solutions


@contextmanager
def _changed(**changes: Any) -> Iterator[None]:
    token = _mode.set(replace(current_mode(), **changes))
    try:
        yield
    finally:
        _mode.reset(token)
