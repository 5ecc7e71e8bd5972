"""Draw a certificate's numbers: one function for each check, and one for all of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_hybrid.identifiability.certificate import Certificate
from pyro_hybrid.identifiability.efficiency import RATIO, Efficiency
from pyro_hybrid.identifiability.fisher import SEEN, FisherInformation
from pyro_hybrid.identifiability.fit import FACTOR, Misfit
from pyro_hybrid.identifiability.injectivity import ALIKE, APART, EquivalentLatents
from pyro_hybrid.identifiability.learning_curves import LearningCurve
from pyro_hybrid.identifiability.statistics import INDEPENDENT, Statistics
from pyro_hybrid.identifiability.variability import LOCATIONS, NATS, Variability
from pyro_hybrid.scores.ambiguity import Ambiguity
from pyro_hybrid.scores.check import Check
from pyro_hybrid.scores.separability import Separability

__all__ = [
    "PANELS",
    "Panel",
    "plot_ambiguity",
    "plot_certificate",
    "plot_efficiency",
    "plot_equivalent_latents",
    "plot_information",
    "plot_learning_curve",
    "plot_means",
    "plot_misfit",
    "plot_nats",
    "plot_panel",
    "plot_separability",
    "plot_statistics",
]

COLORS = {"holds": "#2a6fbb", "fails": "#c0392b", "undecided": "#d9702b", "not checked": "#8a8a8a"}
BLUE = COLORS["holds"]
GREY = "#8a8a8a"


class Panel(NamedTuple):
    """Axes of a certificate's figure.

    Attributes:
        condition: part of the name of the check.
        key: beginning of the name of its numbers.
        draw: draws the numbers.
    """

    condition: str
    key: str
    draw: Callable[[Axes, Any], None]


def plot_certificate(certificate: Certificate) -> Figure:
    """Draw nine panels, each titled with the condition and its status."""
    figure = Figure(figsize=(12.5, 9.5), layout="constrained")
    axes = figure.subplots(3, 3)
    color = COLORS[certificate.verdict]
    figure.suptitle(certificate.headline, color=color, fontsize=13)
    for axis, panel in zip(axes.flat, PANELS, strict=True):
        checks = (check for check in certificate.checks if panel.condition in check.condition)
        items = certificate.numbers.items()
        numbers = (value for name, value in items if name.startswith(panel.key))
        plot_panel(axis, next(checks, None), next(numbers, None), panel.draw)
    return figure


def plot_panel(
    axis: Axes, check: Check | None, numbers: Any, draw: Callable[[Axes, Any], None]
) -> None:
    """Draw the numbers of a check, or write why there are none."""
    axis.spines[["top", "right"]].set_visible(False)
    if check is not None:
        title = f"{check.condition}: {check.status}"
        axis.set_title(title, color=COLORS[check.status], fontsize=10)
    is_skipped = check is not None and check.status == "not checked"
    if numbers is not None and not is_skipped:
        draw(axis, numbers)
        return
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


def _draw_horizontal_limit(axis: Axes, value: float, label: str) -> None:
    axis.axhline(value, color=GREY, lw=0.9, ls="--")
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.5 * value), max(high, 2.0 * value))
    transform = axis.get_yaxis_transform()
    axis.text(0.99, value, label, transform=transform, va="bottom", **_label_style(label))


def _draw_vertical_limit(axis: Axes, value: float, label: str) -> None:
    axis.axvline(value, color=GREY, lw=0.9, ls="--")
    transform = axis.get_xaxis_transform()
    axis.text(value, 0.97, label, transform=transform, va="top", rotation=90, **_label_style(label))


def _label_style(label: str) -> dict[str, Any]:
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
    return {"ha": "right", "fontsize": 8, "color": GREY, "bbox": paper if label else None}


def _draw_bars(
    axis: Axes, labels: Sequence[str], values: Tensor | np.ndarray, floor: float, label: str
) -> None:
    heights = np.maximum(np.asarray(values, dtype=float), floor)
    places = range(len(heights))
    axis.bar(places, heights, color=BLUE, width=0.6)
    axis.set(yscale="log", ylabel=label, ylim=(floor / 2, None))
    longest = max(map(len, labels), default=0)
    axis.set_xticks(places, labels, rotation=20 if longest > 6 else 0, fontsize=8)


def plot_misfit(axis: Axes, misfit: Misfit) -> None:
    """Draw a histogram of the errors of each system's trajectories, in units of the noise."""
    factors = misfit.error.sqrt().clamp(1e-3, 1e3).numpy()
    bins = np.geomspace(min(0.2, factors.min()), max(5.0, factors.max()), 40)
    axis.hist(factors, bins.tolist(), color=BLUE)
    axis.set(xscale="log", xlabel="error of observations / noise claimed", ylabel="systems")
    is_wide = factors.max() > 20.0 or factors.min() < 0.05
    ticks = [10.0**i for i in range(-3, 4)] if is_wide else [0.25, 0.5, 1.0, 2.0, 4.0]
    low, high = axis.get_xlim()
    axis.minorticks_off()
    axis.set_xticks([tick for tick in ticks if low <= tick <= high])
    axis.xaxis.set_major_formatter("{x:g}")
    for edge in (FACTOR.holds, 1.0 / FACTOR.holds):
        _draw_vertical_limit(axis, edge, "")


def plot_information(axis: Axes, fisher: FisherInformation) -> None:
    """Draw the singular value of each direction, for nine tenths of the systems."""
    values = fisher.singular.flatten(0, -2).clamp(min=1e-4)
    quantiles = torch.tensor([0.05, 0.5, 0.95], dtype=values.dtype)
    low, middle, high = values.quantile(quantiles, 0).numpy()
    places = range(len(middle))
    axis.errorbar(places, middle, [middle - low, high - middle], fmt="o", ms=5, color=BLUE)
    axis.set(yscale="log", xlabel="direction", ylabel="observations move by, in noise sds")
    axis.set_xticks(places)
    _draw_horizontal_limit(axis, SEEN.holds, "seen above")


def plot_equivalent_latents(axis: Axes, equivalents: EquivalentLatents) -> None:
    """Draw the closest pair of each system that is far enough apart."""
    is_found = torch.isfinite(equivalents.distance)
    apart = equivalents.apart[is_found].norm(dim=-1).numpy()
    distance = equivalents.distance[is_found].clamp(min=1e-3).numpy()
    axis.scatter(apart, distance, s=12, color=BLUE)
    axis.set(
        yscale="log",
        xlabel="latents apart, in population sds",
        ylabel="trajectories apart, in noise sds",
        xlim=(APART, max(3.0, 1.05 * apart.max(initial=0.0))),
        ylim=(7e-4, 3.0 * max(10.0, distance.max(initial=0.0))),
    )
    _draw_horizontal_limit(axis, ALIKE, "alike below")
    axis.text(
        0.98,
        0.97,
        f"{int((~is_found).sum())} of {len(is_found)} systems: none found",
        transform=axis.transAxes,
        ha="right",
        va="top",
        fontsize=8,
        color=GREY,
    )


def plot_statistics(axis: Axes, statistics: Statistics) -> None:
    """Draw the smallest eigenvalue of each latent's statistics, on its worst quarter."""
    _draw_bars(axis, statistics.names, statistics.margin.amin(1), 1e-18, "independent share")
    _draw_horizontal_limit(axis, INDEPENDENT.fails, "dependent below")


def plot_means(axis: Axes, variability: Variability) -> None:
    """Draw the signal-to-noise ratios of the means, by principal direction."""
    labels = [str(i) for i in range(len(variability.locations))]
    _draw_bars(axis, labels, variability.locations, 1e-3, "variance between systems / noise")
    axis.set_xlabel("direction of the latents' means")
    _draw_horizontal_limit(axis, LOCATIONS.holds, "more than noise")


def plot_nats(axis: Axes, variability: Variability) -> None:
    """Draw the evidence of the whole training set, by direction of λ."""
    labels = [str(i) for i in range(len(variability.nats))]
    nats = variability.num_tasks * variability.nats
    _draw_bars(axis, labels, nats, 1e-3, f"nats in {variability.num_tasks} systems")
    axis.set_xlabel("direction of the natural parameters")
    _draw_horizontal_limit(axis, NATS, "twenty to one")


def plot_ambiguity(axis: Axes, ambiguity: Ambiguity) -> None:
    """Draw the composition of each latent from those of the other side."""
    size = np.abs(ambiguity.matrix)
    shares = size / size.max(1, keepdims=True).clip(1e-12)
    axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axis.set(
        xlabel="the other's latents",
        ylabel="latent",
        xticks=range(size.shape[1]),
        yticks=range(size.shape[0]),
    )
    axis.spines[:].set_visible(False)


def plot_separability(axis: Axes, separability: Separability) -> None:
    """Draw the distance of each component from a Gaussian."""
    value = np.asarray(separability.non_gaussianity)
    interval = np.asarray(separability.non_gaussianity_interval)
    error = np.abs(interval.T - value)
    places = range(len(value))
    axis.errorbar(places, value, error, fmt="o", ms=5, color=BLUE)
    axis.set(xlabel="component after ICA", ylabel="non-Gaussianity, in nats")
    axis.set_xticks(places)
    _draw_horizontal_limit(axis, float(separability.noise_level), "a Gaussian's")


def plot_efficiency(axis: Axes, efficiency: Efficiency) -> None:
    """Draw mean squared errors in units of the bound."""
    ratios = efficiency.error / efficiency.bound
    _draw_bars(axis, efficiency.names, ratios, 0.1, "error² / Cramér-Rao bound")
    _draw_horizontal_limit(axis, 1.0, "the smallest possible")
    _draw_horizontal_limit(axis, RATIO.holds, "")


def plot_learning_curve(axis: Axes, curve: LearningCurve) -> None:
    """Draw linear R of each latent against the number of tasks or shots."""
    for i, name in enumerate(curve.names):
        value = curve.linear_r[:, i]
        error = np.abs(curve.interval[:, i].T - value)
        axis.errorbar(curve.sizes, value, error, fmt="o-", ms=4, lw=1.2, label=name)
    unit = "tasks to learn from" if curve.of == "tasks" else "support shots"
    axis.set(xscale="log", xlabel=unit, ylabel="linear R of held-out systems", ylim=(-0.02, 1.02))
    axis.set_xticks(curve.sizes, [str(size) for size in curve.sizes])
    axis.minorticks_off()
    if curve.threshold is not None:
        label = f"n·k + 1 = {curve.threshold}"
        _draw_vertical_limit(axis, float(curve.threshold), label)
    axis.legend(frameon=False, fontsize=8)


PANELS = [
    Panel("fit", "fit", plot_misfit),
    Panel("injectivity, local", "fisher", plot_information),
    Panel("injectivity, global", "equivalent latents", plot_equivalent_latents),
    Panel("statistics", "statistics", plot_statistics),
    Panel("variability of means", "variability", plot_means),
    Panel("variability (iv)", "variability", plot_nats),
    Panel("ambiguity", "against", plot_ambiguity),
    Panel("separability", "separability", plot_separability),
    Panel("efficiency", "efficiency", plot_efficiency),
]
