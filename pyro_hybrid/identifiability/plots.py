"""Pictures of a certificate's numbers: one axes for each check, and all of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_hybrid.identifiability.certificate import SAYS, Certificate
from pyro_hybrid.identifiability.check import Check
from pyro_hybrid.identifiability.efficiency import RATIO, Efficiency
from pyro_hybrid.identifiability.fisher import SEEN, Fisher
from pyro_hybrid.identifiability.fit import FACTOR, Misfit
from pyro_hybrid.identifiability.injectivity import ALIKE, APART, Twins
from pyro_hybrid.identifiability.learning_curves import Curve
from pyro_hybrid.identifiability.statistics import INDEPENDENT, Statistics
from pyro_hybrid.identifiability.variability import LOCATIONS, NATS, Variability
from pyro_hybrid.scores.ambiguity import Ambiguity
from pyro_hybrid.scores.separability import Separability

__all__ = ["PANELS", "certificate", "curve", "panel"]

COLOURS = {"holds": "#2a6fbb", "fails": "#c0392b", "undecided": "#d9702b", "not checked": "#8a8a8a"}
GREY = "#8a8a8a"


def certificate(made: Certificate) -> Figure:
    """Nine panels, each titled with what was asked and what came out."""
    figure = Figure(figsize=(12.5, 9.5), layout="constrained")
    axes = figure.subplots(3, 3)
    figure.suptitle(SAYS[made.verdict], color=COLOURS[made.verdict], fontsize=13)
    for axis, (condition, key, draw) in zip(axes.flat, PANELS, strict=True):
        check = next(
            (c for c in (*made.conditions, *made.further) if condition in c.condition), None
        )
        numbers = next(
            (value for name, value in made.numbers.items() if name.startswith(key)), None
        )
        panel(axis, check, numbers, draw)
    return figure


def panel(axis: Axes, check: Check | None, numbers: Any, draw: Callable[[Axes, Any], None]) -> None:
    """One check's picture, or why there is none."""
    axis.spines[["top", "right"]].set_visible(False)
    if check is not None:
        axis.set_title(
            f"{check.condition}: {check.status}", color=COLOURS[check.status], fontsize=10
        )
    if numbers is None or check is not None and check.status == "not checked":
        axis.set_axis_off()
        axis.text(
            0.5,
            0.5,
            "" if check is None else check.why,
            ha="center",
            va="center",
            wrap=True,
            color=GREY,
            transform=axis.transAxes,
        )
        return
    draw(axis, numbers)


def _limit(axis: Axes, value: float, text: str, *, across: bool = True) -> None:
    (axis.axhline if across else axis.axvline)(value, color=GREY, lw=0.9, ls="--")
    if across:
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0.5 * value), max(high, 2.0 * value))
    place = (0.99, value) if across else (value, 0.97)
    transform = axis.get_yaxis_transform() if across else axis.get_xaxis_transform()
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
    axis.text(
        *place,
        text,
        transform=transform,
        ha="right",
        va="bottom" if across else "top",
        fontsize=8,
        color=GREY,
        rotation=0 if across else 90,
        bbox=paper if text else None,
    )


def _bars(
    axis: Axes, labels: Sequence[str], values: Tensor | np.ndarray, floor: float, label: str
) -> None:
    heights = np.maximum(np.asarray(values, dtype=float), floor)
    axis.bar(range(len(heights)), heights, color=COLOURS["holds"], width=0.6)
    axis.set(yscale="log", ylabel=label, ylim=(floor / 2, None))
    axis.set_xticks(
        range(len(heights)),
        labels,
        rotation=20 if max(map(len, labels), default=0) > 6 else 0,
        fontsize=8,
    )


def fit(axis: Axes, numbers: Misfit) -> None:
    """Errors of each system's trajectories, in noises."""
    factor = numbers.error.sqrt().clamp(1e-3, 1e3).numpy()
    axis.hist(
        factor,
        np.geomspace(min(0.2, factor.min()), max(5.0, factor.max()), 40).tolist(),
        color=COLOURS["holds"],
    )
    axis.set(xscale="log", xlabel="error of observations / noise claimed", ylabel="systems")
    wide = factor.max() > 20.0 or factor.min() < 0.05
    ticks = [10.0**i for i in range(-3, 4)] if wide else [0.25, 0.5, 1.0, 2.0, 4.0]
    axis.minorticks_off()
    axis.set_xticks([t for t in ticks if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]])
    axis.xaxis.set_major_formatter("{x:g}")
    for edge in (FACTOR.holds, 1.0 / FACTOR.holds):
        _limit(axis, edge, "", across=False)


def local(axis: Axes, numbers: Fisher) -> None:
    """Singular values of each direction, nine tenths of the systems."""
    values = numbers.singular.flatten(0, -2).clamp(min=1e-4)
    low, mid, high = values.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=values.dtype), 0).numpy()
    axis.errorbar(
        range(len(mid)), mid, [mid - low, high - mid], fmt="o", ms=5, color=COLOURS["holds"]
    )
    axis.set(yscale="log", xlabel="direction", ylabel="observations move by, in noises")
    axis.set_xticks(range(len(mid)))
    _limit(axis, SEEN.holds, "seen")


def twin(axis: Axes, numbers: Twins) -> None:
    """The closest far-away pair of each system."""
    found = torch.isfinite(numbers.distance)
    apart = numbers.apart[found].norm(dim=-1).numpy()
    axis.scatter(
        apart, numbers.distance[found].clamp(min=1e-3).numpy(), s=12, color=COLOURS["holds"]
    )
    axis.set(
        yscale="log",
        xlabel="latents apart, in spreads",
        ylabel="trajectories apart, in noises",
        xlim=(APART, max(3.0, apart.max(initial=0.0) * 1.05)),
        ylim=(
            7e-4,
            3.0 * max(10.0, float(numbers.distance[found].max()) if bool(found.any()) else 0.0),
        ),
    )
    _limit(axis, ALIKE, "alike below")
    missing = int((~found).sum())
    axis.text(
        0.98,
        0.97,
        f"{missing} of {len(found)} systems: none found",
        transform=axis.transAxes,
        ha="right",
        va="top",
        fontsize=8,
        color=GREY,
    )


def statistic(axis: Axes, numbers: Statistics) -> None:
    """Smallest eigenvalue of each latent's statistics, on its worst quarter."""
    _bars(axis, numbers.names, numbers.margin.amin(1), 1e-18, "independent share")
    _limit(axis, INDEPENDENT.fails, "dependent below")


def means(axis: Axes, numbers: Variability) -> None:
    """Signal to noise of the means, by principal direction."""
    _bars(
        axis,
        [str(i) for i in range(len(numbers.locations))],
        numbers.locations,
        1e-3,
        "variance between systems / noise",
    )
    axis.set_xlabel("direction of the latents' means")
    _limit(axis, LOCATIONS.holds, "more than noise")


def nats(axis: Axes, numbers: Variability) -> None:
    """Evidence of the whole training set, by direction of λ."""
    _bars(
        axis,
        [str(i) for i in range(len(numbers.nats))],
        numbers.tasks * numbers.nats,
        1e-3,
        f"nats in {numbers.tasks} systems",
    )
    axis.set_xlabel("direction of the natural parameters")
    _limit(axis, NATS, "twenty to one")


def matrix(axis: Axes, numbers: Ambiguity) -> None:
    """What each latent is made of."""
    size = np.abs(numbers.matrix)
    axis.imshow(
        size / size.max(1, keepdims=True).clip(1e-12),
        cmap="Blues",
        vmin=0.0,
        vmax=1.0,
        aspect="auto",
    )
    axis.set(
        xlabel="the other's latents",
        ylabel="latent",
        xticks=range(size.shape[1]),
        yticks=range(size.shape[0]),
    )
    axis.spines[:].set_visible(False)


def separability(axis: Axes, numbers: Separability) -> None:
    """How far from a Gaussian each component is."""
    value, interval = (
        np.asarray(numbers.non_gaussianity),
        np.asarray(numbers.non_gaussianity_interval),
    )
    error = np.abs(interval.T - value)
    axis.errorbar(range(len(value)), value, error, fmt="o", ms=5, color=COLOURS["holds"])
    axis.set(xlabel="component after ICA", ylabel="non-Gaussianity, in nats")
    axis.set_xticks(range(len(value)))
    _limit(axis, float(numbers.noise_level), "a Gaussian's")


def ratio(axis: Axes, numbers: Efficiency) -> None:
    """Mean squared errors in units of the bound."""
    _bars(axis, numbers.names, numbers.error / numbers.bound, 0.1, "error² / Cramér-Rao bound")
    _limit(axis, 1.0, "the best there is")
    _limit(axis, RATIO.holds, "")


def curve(axis: Axes, numbers: Curve) -> None:
    """Linear R of each latent against the number of tasks or shots."""
    for i, name in enumerate(numbers.names):
        axis.errorbar(
            numbers.sizes,
            numbers.linear_r[:, i],
            np.abs(numbers.interval[:, i].T - numbers.linear_r[:, i]),
            fmt="o-",
            ms=4,
            lw=1.2,
            label=name,
        )
    axis.set(
        xscale="log",
        xlabel=f"{numbers.of} to learn from" if numbers.of == "tasks" else "support shots",
        ylabel="linear R of held-out systems",
        ylim=(-0.02, 1.02),
    )
    axis.set_xticks(numbers.sizes, [str(size) for size in numbers.sizes])
    axis.minorticks_off()
    if numbers.threshold is not None:
        _limit(axis, float(numbers.threshold), f"n·k + 1 = {numbers.threshold}", across=False)
    axis.legend(frameon=False, fontsize=8)


PANELS: list[tuple[str, str, Callable[[Axes, Any], None]]] = [
    ("fit", "fit", fit),
    ("injectivity, local", "fisher", local),
    ("injectivity, global", "twins", twin),
    ("statistics", "statistics", statistic),
    ("variability of means", "variability", means),
    ("variability (iv)", "variability", nats),
    ("ambiguity", "against", matrix),
    ("separability", "separability", separability),
    ("efficiency", "efficiency", ratio),
]
