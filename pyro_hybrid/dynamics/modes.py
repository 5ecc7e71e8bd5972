"""Settings that hold inside a ``with`` block, in this thread alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

__all__ = ["inside"]

_T = TypeVar("_T")


@contextmanager
def inside(setting: ContextVar[_T], value: _T) -> Iterator[None]:
    """The setting has this value inside."""
    token = setting.set(value)
    try:
        yield
    finally:
        setting.reset(token)
