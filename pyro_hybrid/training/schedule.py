"""The schedule of a training: everything that changes from step to step, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

from pyro_hybrid.errors import fail, require

__all__ = [
    "Curriculum",
    "Length",
    "PenaltyWeight",
    "Ramp",
    "Schedule",
    "StepValues",
    "curriculum_of",
    "require_integer",
    "require_number",
]

Length = int | None | tuple[int | None, int]
Curriculum = tuple[tuple[float, Length], ...]


def require_integer(name: str, value: object, least: int = 1) -> None:
    """Refuse anything but an integer of ``least`` or more."""
    require(
        isinstance(value, int) and not isinstance(value, bool) and value >= least,
        f"{name} to be an integer of {least} or more",
        repr(value),
        f"Pass {name}={least} or more, as a Python int.",
    )


def require_number(
    name: str, value: object, low: float, high: float, *, bounds: str, remedy: str
) -> None:
    """Refuse anything but a number between two bounds.

    Arguments:
        name, value: of the argument.
        low, high: the bounds.
        bounds: two brackets that say whether the bounds are included, such as ``"[)"``.
        remedy: what to do.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_inside = is_number and low <= value <= high  # type: ignore[operator]
    is_inside = is_inside and not (bounds[0] == "(" and value == low)
    is_inside = is_inside and not (bounds[1] == ")" and value == high)
    require(
        is_inside,
        f"{name} to be a number in {bounds[0]}{low:g}, {high:g}{bounds[1]}",
        repr(value),
        remedy,
    )


@dataclass(frozen=True)
class Ramp:
    r"""A penalty weight that grows with the progress of a training, :math:`w(p) = w \, p^k` for p from 0 to 1.

    Arguments:
        final: the weight w at the end.
        power: the exponent k; a higher one keeps the weight small for longer.

    >>> Ramp(1000.0, power=2)(0.5)
    250.0
    """

    final: int | float
    power: int | float = 1.0

    def __post_init__(self) -> None:
        remedy = "For example Ramp(30.0, power=2)."
        require_number("final", self.final, 0.0, math.inf, bounds="[)", remedy=remedy)
        require_number("power", self.power, 0.0, math.inf, bounds="()", remedy=remedy)

    def __call__(self, progress: float) -> float:
        """Return the weight after a fraction of the steps."""
        return self.final * progress**self.power


PenaltyWeight = int | float | Callable[[float], float]


class StepValues(NamedTuple):
    """The values of a schedule at one step.

    Attributes:
        learning_rate: of the optimizer.
        kl_weight: the factor of the KL divergence in the loss.
        length: of the segments that trajectories are cut into, and the horizon, as in a curriculum.
        penalty_weights: of the model, by name.
        is_averaged: whether the parameters after this step enter their mean.
    """

    learning_rate: float
    kl_weight: float
    length: Length
    penalty_weights: dict[str, float]
    is_averaged: bool


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The values of a training as pure functions of the step; see :func:`~pyro_hybrid.meta_train` for the arguments."""

    num_steps: int
    learning_rate: float
    curriculum: Curriculum
    warmup: float
    average_last: float
    penalty_weights: dict[str, PenaltyWeight]

    def __post_init__(self) -> None:
        require_integer("num_steps", self.num_steps)
        require_number(
            "learning_rate",
            self.learning_rate,
            0.0,
            math.inf,
            bounds="()",
            remedy="3e-3 is a good first try.",
        )
        require_number(
            "warmup", self.warmup, 0.0, 1.0, bounds="[]", remedy="It is a fraction of the steps."
        )
        require_number(
            "average_last",
            self.average_last,
            0.0,
            1.0,
            bounds="[)",
            remedy="It is a fraction of the steps; 0 keeps the last step's parameters.",
        )
        for name, weight in self.penalty_weights.items():
            _require_weight(name, weight)

    def at(self, step: int) -> StepValues:
        """Return all values at a step, counted from 0."""
        progress = step / self.num_steps
        return StepValues(
            self._learning_rate_at(step, progress),
            self._kl_weight_at(progress),
            self._length_at(progress),
            self.penalty_weights_at(step),
            step >= (1.0 - self.average_last) * self.num_steps,
        )

    def penalty_weights_at(self, step: int) -> dict[str, float]:
        """Return the penalty weights at a step."""
        progress = step / self.num_steps
        return {
            name: float(weight(progress)) if callable(weight) else float(weight)
            for name, weight in self.penalty_weights.items()
        }

    def _learning_rate_at(self, step: int, progress: float) -> float:
        """Rise over the first 5% of the steps, then follow a cosine down to a fiftieth."""
        rise = min(1.0, (step + 1) / (0.05 * self.num_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * rise * (0.02 + 0.98 * cosine)

    def _kl_weight_at(self, progress: float) -> float:
        if progress >= self.warmup:
            return 1.0
        return (progress + 1 / self.num_steps) / self.warmup

    def _length_at(self, progress: float) -> Length:
        reached = [length for fraction, length in self.curriculum if fraction <= progress]
        return reached[-1]


def _require_weight(name: str, weight: object) -> None:
    if callable(weight) and is_dataclass(weight) and weight.__dataclass_params__.frozen:
        return
    require_number(
        f"the penalty weight {name!r}",
        weight,
        0.0,
        math.inf,
        bounds="[)",
        remedy="Pass a number, or ph.Ramp(final, power=2).",
    )


def curriculum_of(curriculum: Mapping[float, Length]) -> Curriculum:
    """Check a curriculum, ``{fraction of the steps: length}``, and sort it by fractions."""
    if not isinstance(curriculum, Mapping):
        fail(
            "a curriculum, {fraction of the steps: length}",
            repr(curriculum),
            "For example {0.0: 5, 0.5: None}.",
            TypeError,
        )
    require(
        0.0 in curriculum,
        "a curriculum that says what to do from 0.0 on",
        dict(curriculum),
        "Add {0.0: ...}.",
    )
    for fraction, length in curriculum.items():
        require_number(
            "a fraction of the curriculum",
            fraction,
            0.0,
            1.0,
            bounds="[)",
            remedy="It is a fraction of the steps, from which on the length holds.",
        )
        _require_length(fraction, length)
    return tuple(sorted(curriculum.items(), key=lambda item: item[0]))


def _require_length(fraction: float, length: Any) -> None:
    is_pair = isinstance(length, tuple) and len(length) == 2
    segment, horizon = length if is_pair else (length, None)
    values = [segment] if not is_pair else [segment, horizon if horizon is not None else 0]
    require(
        all(value is None or type(value) is int and value >= 1 for value in values),
        f"a length from {fraction} on, which is an integer of 1 or more, None, or (length, horizon)",
        repr(length),
        "For example {0.0: 5, 0.5: None}: segments of 5 intervals, then whole trajectories.",
    )
