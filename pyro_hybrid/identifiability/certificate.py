"""Hold and print the result of :func:`~pyro_hybrid.certify`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyro_hybrid.scores.check import Check, Interval, Status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["HEADLINES", "Certificate"]

WIDTH = 118
INDENT = 53  # columns before the explanation, besides the condition's name
HEADLINES: dict[Status, str] = {
    "holds": "Certified: every condition holds under which the latents are identified up to a linear map.",
    "fails": "REFUSED: a condition fails that is needed to identify the latents up to a linear map.",
    "undecided": "Undecided: the measurements show neither that all conditions hold nor that one of them fails.",
}


@dataclass(frozen=True)
class Certificate:
    """Identifiability of a program's latents: the theorem's conditions one by one, and further checks.

    Attributes:
        conditions: the theorem's conditions and its premise, in order.
        further: checks that do not decide the verdict: remaining ambiguity, separability by ICA, efficiency.
        numbers: measurements that the checks were judged by, for pictures and for a closer look.
        systems, shots: number of tasks, and of shots in their supports.
        seconds: duration.
    """

    conditions: Sequence[Check]
    further: Sequence[Check] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict, repr=False)
    systems: int = 0
    shots: int = 0
    seconds: float = 0.0

    @property
    def verdict(self) -> Status:
        """``holds`` if all conditions do, ``fails`` if one of them does, ``undecided`` otherwise."""
        statuses = {check.status for check in self.conditions}
        if "fails" in statuses:
            return "fails"
        return "holds" if statuses == {"holds"} else "undecided"

    @property
    def headline(self) -> str:
        """The verdict as a sentence."""
        return HEADLINES[self.verdict]

    @property
    def checks(self) -> list[Check]:
        """Conditions and further checks, in this order."""
        return [*self.conditions, *self.further]

    def __getitem__(self, condition: str) -> Check:
        """Return the first check whose name begins with ``condition``."""
        for check in self.checks:
            if check.condition.startswith(condition):
                return check
        names = [check.condition for check in self.checks]
        raise KeyError(f"{condition!r} isn't among {names}")

    def __str__(self) -> str:
        width = max((len(check.condition) for check in self.checks), default=9)
        systems = f"{self.systems} system{'s' * (self.systems != 1)}"
        shots = f"{self.shots} shot{'s' * (self.shots != 1)}"
        lines = [
            self.headline,
            f"({systems}, supports of {shots}; {self.seconds:.0f} s)",
            "",
            _row("condition", "verdict", "value [95%]", "wanted", "why, and what to do", width),
        ]
        lines += [_lines(check, width) for check in self.conditions]
        if self.further:
            lines += ["", "beyond the theorem"]
            lines += [_lines(check, width) for check in self.further]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return all verdicts and their reasons as JSON holds them."""
        return {
            "verdict": self.verdict,
            "systems": self.systems,
            "shots": self.shots,
            "seconds": round(self.seconds, 1),
            "conditions": [check.to_dict() for check in self.conditions],
            "further": [check.to_dict() for check in self.further],
        }

    def plot(self) -> Figure:
        """Draw all numbers that were judged, with their thresholds."""
        from pyro_hybrid.identifiability.plots import plot_certificate  # imports matplotlib

        return plot_certificate(self)


def _lines(check: Check, width: int) -> str:
    status = check.status.upper() if check.status == "fails" else check.status
    value = ""
    if not math.isnan(check.value):
        value = f"{_format(check.value)} {_format_interval(check.interval)}"
    row = _row(check.condition, status, value, str(check.threshold or ""), check.why, width)
    if not check.remedy:
        return row
    indent = " " * (width + INDENT)
    remedy = textwrap.fill(
        f"-> {check.remedy}", WIDTH, initial_indent=indent, subsequent_indent=indent + "   "
    )
    return f"{row}\n{remedy}"


def _row(condition: str, status: str, value: str, wanted: str, why: str, width: int) -> str:
    first = f"{condition:<{width}}  {status:<11}  {value:<27}  {wanted:<7}  "
    indent = " " * (width + INDENT)
    filled = textwrap.fill(why, WIDTH, initial_indent=first, subsequent_indent=indent)
    return filled or first.rstrip()


def _format_interval(interval: Interval) -> str:
    if math.isnan(interval[0]):
        return ""
    low, high = (_format(bound, 2) for bound in interval)
    return "" if low == high else f"[{low}, {high}]"


def _format(x: float, digits: int = 3) -> str:
    if math.isinf(x):
        return f"{x:g}"
    if 100 <= abs(x) < 1e5:
        return f"{x:.0f}"
    return f"{x:.{digits}g}"
