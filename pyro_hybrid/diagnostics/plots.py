"""Draw a calibration report: all latents' ranks in their band above, everything else below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from pyro_hybrid.diagnostics.calibration import CalibrationReport
from pyro_hybrid.diagnostics.ranks import COVERED, Array, LatentCalibration, ecdf, uniform_band
from pyro_hybrid.inference import arviz_data
from pyro_hybrid.inference.importance import RELIABLE_K

__all__ = ["plot_calibration"]

COLORS = {"holds": "#0072b2", "fails": "#d55e00", "undecided": "#767676"}
GREY = "#767676"
PALE = "#dcdcdc"
ACROSS = 4  # panels in a row
HIGHEST = 2.0  # k-hat at which larger values are cut


def plot_calibration(report: CalibrationReport) -> Figure:
    """Draw the whole report, its title in the color of the verdict."""
    latents = report.latents
    rows = -(-len(latents) // ACROSS)
    heights = [0.5 + 1.7 * rows, 1.3 + 0.26 * max(4, len(latents))]
    figure = Figure(figsize=(12.0, 0.4 + sum(heights)), layout="constrained")
    figure.suptitle(report.headline, color=COLORS[report.verdict], fontsize=13)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flat
    _draw_all_ranks(above, latents, report.ranks, rows)
    coverage, z, contraction, weights = below.subplots(1, 4, width_ratios=[1.5, 1.0, 1.0, 1.2])
    names = [latent.name for latent in latents]
    _set_rows(coverage, names)
    _set_rows(z, [""] * len(names))
    _set_rows(contraction, [""] * len(names))
    _draw_coverage(coverage, latents)
    _draw_z(z, latents)
    _draw_contraction(contraction, latents)
    _draw_weights(weights, report)
    return figure


def _draw_all_ranks(
    figure: SubFigure, latents: Sequence[LatentCalibration], ranks: Array, rows: int
) -> None:
    """Draw one panel for each latent, all on one scale."""
    columns = -(-len(latents) // rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    grid, low, high = uniform_band(len(ranks), len(latents))
    of_band = np.abs([low - grid, high - grid]).max()
    of_ranks = [np.abs(ecdf(column) - grid).max() for column in ranks.T]
    reach = 1.15 * max(of_band, *of_ranks)
    for i, axis in enumerate(axes.flat):
        if i < len(latents):
            _draw_ranks(axis, latents[i], ranks[:, i], len(latents))
            axis.set(xlim=(0.0, 1.0), ylim=(-reach, reach), xlabel="", ylabel="")
            axis.set_xticks([0.0, 0.5, 1.0])
            axis.xaxis.set_major_formatter("{x:g}")
        else:
            axis.set_axis_off()
    figure.supylabel("ECDF − uniform", fontsize=10)
    figure.supxlabel(
        "rank of the truth among the guide's draws: right inside the band (99%, all latents together)",
        fontsize=10,
    )


def _draw_ranks(axis: Axes, latent: LatentCalibration, ranks: Array, num_latents: int) -> None:
    grid, low, high = uniform_band(len(ranks), num_latents)
    color = COLORS[latent.status]
    places = [0.0, *grid, 1.0]
    lower = [0.0, *(low - grid), 0.0]
    upper = [0.0, *(high - grid), 0.0]
    axis.fill_between(places, lower, upper, color=PALE, lw=0)
    axis.axhline(0.0, color=GREY, lw=0.8, ls="--")
    arviz_data.plot_ranks(ranks, axis, color)
    axis.set_title(f"{latent.name}: {latent.finding}", color=color, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _set_rows(axis: Axes, names: Sequence[str]) -> None:
    """Give each latent a row, the first on top."""
    axis.set_yticks(range(len(names)), names, fontsize=9)
    middle = 0.5 * (len(names) - 1)
    reach = 0.5 * max(len(names), 3) + 0.1
    axis.set_ylim(middle + reach, middle - reach)
    axis.tick_params(left=False)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _draw_coverage(axis: Axes, latents: Sequence[LatentCalibration]) -> None:
    for k, probability in enumerate(COVERED):
        axis.axvline(100 * probability, color=GREY, lw=0.9, ls="--")
        for i, latent in enumerate(latents):
            color = COLORS[latent.status]
            axis.plot(100 * np.array(latent.intervals[k]), [i, i], color=color, lw=1.5)
            axis.plot(100 * latent.coverage[k], i, "o", ms=5, color=color)
    lowest = min(low for latent in latents for low, _ in latent.intervals)
    ticks = [100 * probability for probability in COVERED]
    axis.set(xlabel="truth inside, %", xlim=(min(30.0, 90 * lowest), 101.0), xticks=ticks)
    axis.set_title("coverage: right on the dashed lines", fontsize=10)


def _draw_z(axis: Axes, latents: Sequence[LatentCalibration]) -> None:
    axis.axvspan(-1.0, 1.0, color=PALE, lw=0)
    axis.axvline(0.0, color=GREY, lw=0.9, ls="--")
    for i, latent in enumerate(latents):
        color = COLORS[latent.status]
        axis.errorbar(latent.z_mean, i, xerr=latent.z_sd, fmt="o", ms=5, capsize=3, color=color)
    largest = max(abs(latent.z_mean) + latent.z_sd for latent in latents)
    reach = np.clip(1.1 * largest, 2.5, 10.0)
    axis.set(xlabel="(mean − truth) / sd: mean ± sd", xlim=(-reach, reach))
    axis.set_title("z: right from −1 to 1", fontsize=10)


def _draw_contraction(axis: Axes, latents: Sequence[LatentCalibration]) -> None:
    for i, latent in enumerate(latents):
        axis.barh(i, max(latent.contraction, -1.0), height=0.55, color=COLORS[latent.status])
        if latent.contraction < -1.0:
            label = f"{latent.contraction:.3g}"
            axis.text(-0.97, i, label, color="white", va="center", fontsize=9)
    axis.axvline(0.0, color=GREY, lw=0.9)
    smallest = min(0.0, *(latent.contraction for latent in latents))
    axis.set(xlabel="1 − posterior / prior variance", xlim=(max(-1.0, smallest), 1.0))
    axis.set_title("contraction by the query", fontsize=10)


def _draw_weights(axis: Axes, report: CalibrationReport) -> None:
    """Draw sorted k-hats; hollow marks are tasks whose weights are almost equal, where k-hat says nothing."""
    order = np.argsort(report.pareto_k.k_hat)
    k_hat = np.clip(report.pareto_k.k_hat[order], -0.5, HIGHEST)
    is_even = report.pareto_k.relative_ess[order] >= arviz_data.NEARLY_EQUAL
    places = np.arange(1, len(k_hat) + 1)
    color = COLORS[report.weights.status]
    for rows, face in ((~is_even, color), (is_even, "none")):
        if rows.any():  # marks without points, drawn beyond the axes, break the layout
            axis.plot(places[rows], k_hat[rows], "o", ms=3.5, mec=color, mfc=face, clip_on=False)
    axis.axhline(RELIABLE_K, color=GREY, lw=0.9, ls="--")
    cut = f", cut at {HIGHEST:g}" if k_hat[-1] == HIGHEST else ""
    bottom = min(0.0, k_hat[0]) - 0.05
    top = max(1.0, k_hat[-1]) + 0.05
    axis.set(xlabel="task, sorted", ylim=(bottom, top), ylabel=f"PSIS k-hat{cut}")
    axis.spines[["top", "right"]].set_visible(False)
    hollow = " (hollow: equal weights)" if is_even.any() else ""
    axis.set_title(f"real queries: right below {RELIABLE_K}{hollow}", fontsize=10)
