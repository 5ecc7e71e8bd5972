"""Check: one condition, what was measured, and what follows. A yes needs a margin, a no needs evidence."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

__all__ = ["Check", "Interval", "Status", "Threshold", "judged", "unchecked"]

Status = Literal["holds", "fails", "undecided", "not checked"]
Interval = tuple[float, float]


class Threshold(NamedTuple):
    """Where a value is good enough, and where it is bad enough; ``larger`` says which way is better."""

    holds: float
    fails: float
    larger: bool = True

    def __str__(self) -> str:
        return f"{'>' if self.larger else '<'} {self.holds:.3g}"

    def judge(self, interval: Interval) -> Status:
        """``holds`` or ``fails`` where the whole interval is on that side, ``undecided`` otherwise."""
        low, high = interval
        if math.isnan(low) or math.isnan(high):
            return "undecided"
        if not self.larger:
            return "holds" if high < self.holds else "fails" if low > self.fails else "undecided"
        return "holds" if low > self.holds else "fails" if high < self.fails else "undecided"


class Check(NamedTuple):
    """One condition of a certificate.

    Attributes:
        condition: what is asked, in a word or two.
        status: ``holds``, ``fails``, ``undecided`` or ``not checked``.
        value: what was measured; NaN where nothing was.
        interval: 95% of what the value could as well have been.
        threshold: what the interval was held against.
        why: what the numbers mean, by name of the latent.
        remedy: what to do about it; empty where nothing need be done.
    """

    condition: str
    status: Status
    value: float = math.nan
    interval: Interval = (math.nan, math.nan)
    threshold: Threshold | None = None
    why: str = ""
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Numbers and texts as JSON has them: NaN and infinities as None."""

        def number(x: float) -> float | None:
            return float(x) if math.isfinite(x) else None

        threshold = (
            None
            if self.threshold is None
            else dict(zip(self.threshold._fields, self.threshold, strict=True))
        )
        return {
            **self._asdict(),
            "value": number(self.value),
            "interval": [number(x) for x in self.interval],
            "threshold": threshold,
        }


def judged(
    condition: str,
    value: float,
    interval: Interval,
    threshold: Threshold,
    why: str,
    remedy: str = "",
) -> Check:
    """A check decided by its interval alone; the remedy is left out where the condition holds."""
    status = threshold.judge(interval)
    return Check(
        condition,
        status,
        float(value),
        (float(interval[0]), float(interval[1])),
        threshold,
        why,
        "" if status == "holds" else remedy,
    )


def unchecked(condition: str, why: str, remedy: str = "") -> Check:
    """A check that wasn't made, and why."""
    return Check(condition, "not checked", why=why, remedy=remedy)
