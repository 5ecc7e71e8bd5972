"""Judge a measured value by its interval: a yes needs a margin, a no needs evidence."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import scipy  # its parts are imported when they are used

__all__ = ["Check", "Interval", "Status", "Threshold", "proportion_interval"]

Status = Literal["holds", "fails", "undecided", "not checked"]
Interval = tuple[float, float]


class Threshold(NamedTuple):
    """Bounds that a value is judged by.

    Attributes:
        holds: bound that the whole interval must be beyond for a yes.
        fails: bound that the whole interval must miss for a no.
        larger: True where larger values are better.
    """

    holds: float
    fails: float
    larger: bool = True

    def __str__(self) -> str:
        return f"{'>' if self.larger else '<'} {self.holds:.3g}"

    def judge(self, interval: Interval) -> Status:
        """Return ``holds`` or ``fails`` where the whole interval is on that side, ``undecided`` otherwise."""
        low, high = interval
        if math.isnan(low) or math.isnan(high):
            return "undecided"
        if self.larger:
            is_good, is_bad = low > self.holds, high < self.fails
        else:
            is_good, is_bad = high < self.holds, low > self.fails
        return "holds" if is_good else "fails" if is_bad else "undecided"


class Check(NamedTuple):
    """Result of one check.

    Attributes:
        condition: name of the condition.
        status: ``holds``, ``fails``, ``undecided`` or ``not checked``.
        value: measured value; NaN where nothing was measured.
        interval: 95% interval of the value.
        threshold: bounds that the interval was compared with.
        why: meaning of the numbers, in sentences that name the latents.
        remedy: advice; empty where the condition holds.
    """

    condition: str
    status: Status
    value: float = math.nan
    interval: Interval = (math.nan, math.nan)
    threshold: Threshold | None = None
    why: str = ""
    remedy: str = ""

    @classmethod
    def from_interval(
        cls,
        condition: str,
        value: float,
        interval: Interval,
        threshold: Threshold,
        why: str,
        remedy: str = "",
    ) -> Check:
        """Decide a check by its interval alone; leave the remedy out where the condition holds."""
        status = threshold.judge(interval)
        if status == "holds":
            remedy = ""
        bounds = float(interval[0]), float(interval[1])
        return cls(condition, status, float(value), bounds, threshold, why, remedy)

    @classmethod
    def skipped(cls, condition: str, why: str, remedy: str = "") -> Check:
        """Return a check that was not made, with the reason."""
        return cls(condition, "not checked", why=why, remedy=remedy)

    def to_dict(self) -> dict[str, Any]:
        """Return numbers and texts as JSON holds them: NaN and infinities become None."""
        threshold = None if self.threshold is None else self.threshold._asdict()
        return {
            **self._asdict(),
            "value": _finite_or_none(self.value),
            "interval": [_finite_or_none(bound) for bound in self.interval],
            "threshold": threshold,
        }


def proportion_interval(count: int, total: int) -> Interval:
    """Return the 95% interval of Clopper and Pearson for a proportion of ``count`` in ``total``."""
    interval = scipy.stats.binomtest(count, total).proportion_ci(0.95, method="exact")
    return float(interval.low), float(interval.high)


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
