"""Tables of results, as mean ± standard deviation over seeds, and the frame of their figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.run import Result

__all__ = ["grouped", "markdown", "panels", "spread"]


def grouped(results: Sequence[Result], *keys: str) -> dict[tuple[str, ...], list[Result]]:
    """Group results by the values of some keys, in the order in which these first appear."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(str(result[key]) for key in keys), []).append(result)
    return groups


def spread(values: Sequence[float | None], digits: int | None = None) -> str:
    """Format mean ± standard deviation; "-" if a value is missing.

    Numbers have ``digits`` digits after the point, or three significant ones.

    >>> spread([0.98, 0.99, 1.0], 3), spread([123.4, 130.0]), spread([0.00123]), spread([1.0, None])
    ('0.990 ± 0.010', '127 ± 4.67', '0.00123', '-')
    """
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values) or not numbers:
        return "-"
    shown = "{:.3g}" if digits is None else f"{{:.{digits}f}}"
    mean = shown.format(statistics.fmean(numbers))
    return f"{mean} ± {shown.format(statistics.stdev(numbers))}" if len(numbers) > 1 else mean


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table.

    >>> print(markdown(["a", "b"], [["1", "2"]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def panels(
    names: Sequence[str], models: Sequence[str], label: str
) -> tuple[Figure, dict[str, Axes]]:
    """Draw an empty panel for each system, side by side, and a legend of the models' colors below."""
    drawing = Figure(figsize=(9.0, 3.2), layout="constrained")
    axes = drawing.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel(label)
    handles = [
        Line2D([], [], marker="o", ls="", ms=4, color=f"C{k}", label=model)
        for k, model in enumerate(models)
    ]
    drawing.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return drawing, dict(zip(names, axes, strict=True))
