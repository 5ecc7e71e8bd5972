"""Certificate: every condition with what was measured, and what follows for the whole."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyro_hybrid.identifiability.check import Check, Status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Certificate"]

WIDTH = 118
SAYS = {
    "holds": "certified: every condition holds under which latents are identified up to a linear map",
    "fails": "REFUSED: a condition fails under which latents are identified",
    "undecided": "undecided: a condition could neither be shown to hold nor to fail",
}


@dataclass(frozen=True)
class Certificate:
    """Whether a program's latents are identified: the theorem's conditions one by one, and what is left to know.

    Attributes:
        conditions: the theorem's conditions and its premise, in order.
        further: what doesn't decide: the ambiguity that remains, whether ICA resolves it, efficiency.
        numbers: what each check was judged by, for pictures and for a closer look.
        systems, shots: number of tasks, and of shots in their supports.
        seconds: how long it took.
    """

    conditions: Sequence[Check]
    further: Sequence[Check] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict, repr=False)
    systems: int = 0
    shots: int = 0
    seconds: float = 0.0

    @property
    def verdict(self) -> Status:
        """``holds`` if every condition does, ``fails`` if one of them does, ``undecided`` otherwise."""
        found = {check.status for check in self.conditions}
        return "fails" if "fails" in found else "holds" if found == {"holds"} else "undecided"

    def __getitem__(self, condition: str) -> Check:
        """One check by the beginning of its name."""
        for check in (*self.conditions, *self.further):
            if check.condition.startswith(condition):
                return check
        raise KeyError(
            f"{condition!r} isn't among {[c.condition for c in (*self.conditions, *self.further)]}"
        )

    def __str__(self) -> str:
        name = max((len(check.condition) for check in (*self.conditions, *self.further)), default=9)
        blocks = [
            SAYS[self.verdict],
            f"({self.systems} system{'s' * (self.systems != 1)}, supports of {self.shots} "
            f"shot{'s' * (self.shots != 1)}; {self.seconds:.0f} s)",
            "",
            _row("condition", "verdict", "value [95%]", "wanted", "why, and what to do", name),
        ]
        blocks += [_lines(check, name) for check in self.conditions]
        if self.further:
            blocks += ["", "beyond the theorem"] + [_lines(check, name) for check in self.further]
        return "\n".join(blocks)

    def to_dict(self) -> dict[str, Any]:
        """Everything that was judged, as JSON can hold it."""
        return {
            "verdict": self.verdict,
            "systems": self.systems,
            "shots": self.shots,
            "seconds": round(self.seconds, 1),
            "conditions": [check.to_dict() for check in self.conditions],
            "further": [check.to_dict() for check in self.further],
        }

    def plot(self) -> Figure:
        """A picture of every number that was judged, with its threshold."""
        from pyro_hybrid.identifiability.plots import certificate

        return certificate(self)


def _lines(check: Check, name: int) -> str:
    status = check.status.upper() if check.status == "fails" else check.status
    value = "" if math.isnan(check.value) else f"{_short(check.value)} {_span(check.interval)}"
    row = _row(check.condition, status, value, str(check.threshold or ""), check.why, name)
    space = " " * (name + 53)
    remedy = textwrap.wrap(
        f"-> {check.remedy}", WIDTH, initial_indent=space, subsequent_indent=space + "   "
    )
    return "\n".join([row, *remedy] if check.remedy else [row])


def _row(condition: str, status: str, value: str, wanted: str, why: str, name: int) -> str:
    first = f"{condition:<{name}}  {status:<11}  {value:<27}  {wanted:<7}  "
    return (
        textwrap.fill(why, WIDTH, initial_indent=first, subsequent_indent=" " * (name + 53))
        or first.rstrip()
    )


def _span(interval: tuple[float, float]) -> str:
    low, high = (_short(x, 2) for x in interval)
    return "" if low == high or math.isnan(interval[0]) else f"[{low}, {high}]"


def _short(x: float, digits: int = 3) -> str:
    return f"{x:g}" if math.isinf(x) else f"{x:.0f}" if 100 <= abs(x) < 1e5 else f"{x:.{digits}g}"
