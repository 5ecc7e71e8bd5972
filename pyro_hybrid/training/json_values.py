"""Plain values as JSON and back, with every type checked on the way back."""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn, TypeVar

from pyro_hybrid.errors import fail

__all__ = ["from_json", "parse_json", "to_json"]

_T = TypeVar("_T")
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no words for them


def to_json(value: Any) -> Any:
    """Return numbers, strings, containers and dataclasses as JSON, numbers that aren't finite as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if is_dataclass(value):
        return {one.name: to_json(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value]


def parse_json(text: bytes) -> Any:
    """Parse JSON as the standard has it; raise a ValueError for all else, such as NaN or too deep a nesting."""

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} isn't JSON")

    def finite(word: str) -> float:
        return float(word) if math.isfinite(float(word)) else refuse(word)

    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def from_json(kind: type[_T], value: Any, name: str, error: type[Exception] = ValueError) -> _T:
    """Build a value of a type from JSON that :func:`to_json` made; refuse anything else by name.

    Arguments:
        kind: bool, int, float, str, a dataclass, or list, tuple, dict and ``| None`` of these.
        value: parsed JSON.
        name: how messages call the value.
        error: the exception to raise.
    """
    decoded: _T = _decoded(kind, value, name, error)
    return decoded


def _decoded(kind: Any, value: Any, name: str, error: type[Exception]) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _optional(kind, value, name, error)
    if kind is float:
        return _float(value, name, error)
    if kind in (bool, int, str):
        if type(value) is not kind:
            _refuse(f"{name} to be of type {kind.__name__}", value, error)
        return value
    if is_dataclass(kind):
        return _record(kind, value, name, error)
    if origin is list:
        (item_kind,) = typing.get_args(kind)
        items = _typed(list, value, name, error)
        return [_decoded(item_kind, item, f"{name}[{i}]", error) for i, item in enumerate(items)]
    if origin is tuple:
        return _tuple(kind, value, name, error)
    if origin is dict:
        return _dict(kind, value, name, error)
    raise TypeError(f"{kind} has no form in JSON")


def _optional(kind: Any, value: Any, name: str, error: type[Exception]) -> Any:
    if value is None:
        return None
    (inner,) = (part for part in typing.get_args(kind) if part is not type(None))
    return _decoded(inner, value, name, error)


def _float(value: Any, name: str, error: type[Exception]) -> float:
    if type(value) is str and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if type(value) not in (int, float):
        _refuse(f"{name} to be a number", value, error)
    try:
        return float(value)
    except OverflowError:
        _refuse(f"{name} to be a number that fits a float", value, error)


def _record(kind: Any, value: Any, name: str, error: type[Exception]) -> Any:
    hints = typing.get_type_hints(kind)
    items = _typed(dict, value, name, error)
    names = [one.name for one in fields(kind)]
    if set(items) != set(names):
        _refuse(f"{name} with the fields {', '.join(names)}", sorted(items), error)
    return kind(**{key: _decoded(hints[key], items[key], f"{name}.{key}", error) for key in names})


def _tuple(kind: Any, value: Any, name: str, error: type[Exception]) -> tuple[Any, ...]:
    kinds = typing.get_args(kind)
    items = _typed(list, value, name, error)
    if len(items) != len(kinds):
        _refuse(f"{name} with {len(kinds)} values", items, error)
    pairs = zip(kinds, items, strict=True)
    return tuple(_decoded(one, item, f"{name}[{i}]", error) for i, (one, item) in enumerate(pairs))


def _dict(kind: Any, value: Any, name: str, error: type[Exception]) -> dict[Any, Any]:
    key_kind, item_kind = typing.get_args(kind)
    decoded = {}
    for key, item in _typed(dict, value, name, error).items():
        if key_kind is int and not (key.isascii() and key.isdigit() and len(key) < 19):
            _refuse(f"{name} with whole numbers as keys", key, error)
        decoded[key_kind(key)] = _decoded(item_kind, item, f"{name}[{key}]", error)
    return decoded


def _typed(kind: type[_T], value: Any, name: str, error: type[Exception]) -> _T:
    if type(value) is not kind:
        _refuse(f"{name} to be a {'list' if kind is list else 'JSON object'}", value, error)
    return value


def _refuse(expected: str, value: Any, error: type[Exception]) -> NoReturn:
    shown = repr(value)
    fail(
        expected,
        shown if len(shown) <= 60 else f"{shown[:60]}...",
        "Go back to an earlier checkpoint: remove this one, or name that one.",
        error,
    )
