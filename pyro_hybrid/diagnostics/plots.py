"""The figure of a calibration: every latent's ranks in their band above, what else was counted below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from pyro_hybrid.diagnostics.ranks import COVERED, Array, Latent, band, ecdf
from pyro_hybrid.inference import arviz_data as _arviz

if TYPE_CHECKING:
    from pyro_hybrid.diagnostics.calibration import Calibration

__all__ = ["calibration"]

COLOURS = {"holds": "#0072b2", "fails": "#d55e00", "undecided": "#767676"}
GREY, PALE = "#767676", "#dcdcdc"
ACROSS, HIGH = 4, 2.0  # panels in a row, and the highest k-hat that is told from higher ones


def calibration(made: Calibration, reliable: float) -> Figure:
    """The whole figure, its title in the colour of the verdict."""
    rows = -(-len(made.latents) // ACROSS)
    heights = [0.5 + 1.7 * rows, 1.3 + 0.26 * max(4, len(made.latents))]
    figure = Figure(figsize=(12.0, 0.4 + sum(heights)), layout="constrained")
    figure.suptitle(made.says, color=COLOURS[made.verdict], fontsize=13)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flat
    _all_ranks(above, made.latents, made.ranks, rows)
    coverage, z, contraction, weights = below.subplots(1, 4, width_ratios=[1.5, 1.0, 1.0, 1.2])
    for axis in (coverage, z, contraction):
        _named(axis, made.latents if axis is coverage else [None] * len(made.latents))
    _coverage(coverage, made.latents)
    _z(z, made.latents)
    _contraction(contraction, made.latents)
    _weights(weights, made, reliable)
    return figure


def _all_ranks(figure: SubFigure, latents: Sequence[Latent], ranks: Array, rows: int) -> None:
    """One panel for each latent, all on one scale."""
    grid, low, high = band(len(ranks), len(latents))
    panels = figure.subplots(
        rows, -(-len(latents) // rows), squeeze=False, sharex=True, sharey=True
    )
    far = max(
        np.abs([low - grid, high - grid]).max(),
        *(np.abs(ecdf(column) - grid).max() for column in ranks.T),
    )
    for i, axis in enumerate(panels.flat):
        if i >= len(latents):
            axis.set_axis_off()
            continue
        axis.fill_between(
            [0.0, *grid, 1.0], [0.0, *low - grid, 0.0], [0.0, *high - grid, 0.0], color=PALE, lw=0
        )
        axis.axhline(0.0, color=GREY, lw=0.8, ls="--")
        _arviz.plot_ranks(ranks[:, i], axis, COLOURS[latents[i].status])
        axis.set_title(
            f"{latents[i].name}: {latents[i].says}", color=COLOURS[latents[i].status], fontsize=10
        )
        axis.set(
            xlim=(0.0, 1.0),
            ylim=(-1.15 * far, 1.15 * far),
            xlabel="",
            ylabel="",
            xticks=[0.0, 0.5, 1.0],
        )
        axis.xaxis.set_major_formatter("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
    figure.supylabel("ECDF − uniform", fontsize=10)
    figure.supxlabel(
        "rank of the truth among the guide's draws: right inside the band (99%, all latents together)",
        fontsize=10,
    )


def _named(axis: Axes, latents: Sequence[Latent | None]) -> None:
    """A line for each latent, the first on top."""
    axis.set_yticks(
        range(len(latents)),
        ["" if latent is None else latent.name for latent in latents],
        fontsize=9,
    )
    middle, reach = 0.5 * (len(latents) - 1), 0.5 * max(len(latents), 3) + 0.1
    axis.set_ylim(middle + reach, middle - reach)
    axis.tick_params(left=False)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _coverage(axis: Axes, latents: Sequence[Latent]) -> None:
    for k, p in enumerate(COVERED):
        axis.axvline(100 * p, color=GREY, lw=0.9, ls="--")
        for i, latent in enumerate(latents):
            axis.plot(
                100 * np.array(latent.intervals[k]), [i, i], color=COLOURS[latent.status], lw=1.5
            )
            axis.plot(100 * latent.coverage[k], i, "o", ms=5, color=COLOURS[latent.status])
    axis.set(
        xlabel="truth inside, %",
        xlim=(min(30.0, *(90 * low for x in latents for low, _ in x.intervals)), 101.0),
        xticks=[100 * p for p in COVERED],
    )
    axis.set_title("coverage: right on the dashed lines", fontsize=10)


def _z(axis: Axes, latents: Sequence[Latent]) -> None:
    axis.axvspan(-1.0, 1.0, color=PALE, lw=0)
    axis.axvline(0.0, color=GREY, lw=0.9, ls="--")
    for i, latent in enumerate(latents):
        axis.errorbar(
            latent.z_mean,
            i,
            xerr=latent.z_sd,
            fmt="o",
            ms=5,
            capsize=3,
            color=COLOURS[latent.status],
        )
    far = max(abs(latent.z_mean) + latent.z_sd for latent in latents)
    axis.set(
        xlabel="(mean − truth) / sd: mean ± sd",
        xlim=np.array([-1.0, 1.0]) * np.clip(1.1 * far, 2.5, 10.0),
    )
    axis.set_title("z: right from −1 to 1", fontsize=10)


def _contraction(axis: Axes, latents: Sequence[Latent]) -> None:
    for i, latent in enumerate(latents):
        axis.barh(i, max(latent.contraction, -1.0), height=0.55, color=COLOURS[latent.status])
        if latent.contraction < -1.0:
            axis.text(-0.97, i, f"{latent.contraction:.3g}", color="white", va="center", fontsize=9)
    axis.axvline(0.0, color=GREY, lw=0.9)
    least = min(0.0, *(latent.contraction for latent in latents))
    axis.set(xlabel="1 − posterior / prior variance", xlim=(max(-1.0, least), 1.0))
    axis.set_title("contraction: what the query adds", fontsize=10)


def _weights(axis: Axes, made: Calibration, reliable: float) -> None:
    k = np.sort(np.clip(made.pareto_k, -0.5, HIGH))
    axis.plot(
        range(1, len(k) + 1), k, "o", ms=3.5, color=COLOURS[made.weights.status], clip_on=False
    )
    axis.axhline(reliable, color=GREY, lw=0.9, ls="--")
    axis.set(
        xlabel="task, sorted",
        ylim=(min(0.0, k[0]) - 0.05, max(1.0, k[-1]) + 0.05),
        ylabel=f"PSIS k-hat{f', cut at {HIGH:g}' if k[-1] == HIGH else ''}",
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"real queries: right below {reliable}", fontsize=10)
