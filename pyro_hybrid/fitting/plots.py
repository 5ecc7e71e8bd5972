"""Pictures of a trained program: latents against their truth, trajectories, and what the query adds."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import fail
from pyro_hybrid.fitting.report import Report
from pyro_hybrid.inference.draws import draws, predict
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.programs.module import HybridModel

__all__ = ["latents_figure", "prior_posterior_figure", "trajectories_figure"]

BLUE, ORANGE, GREY = "#2a6fbb", "#d9702b", "#8a8a8a"


def latents_figure(report: Report) -> Figure:
    """Plot true against recovered latents, with 90% intervals, after the linear map that theory leaves open."""
    recovered, aligned = report.recovered, report.aligned
    if aligned is None or recovered.truth is None:
        fail(
            "a report of tasks with true latents",
            "one without",
            "Pass true_latents with the tasks.",
        )
    low, middle, high = aligned.quantile(0.05, 0), aligned.mean(0), aligned.quantile(0.95, 0)
    figure, axes = _row(len(recovered.names), 2.8)
    for i, (name, axis) in enumerate(zip(recovered.names, axes, strict=True)):
        x, y = recovered.truth[:, i], middle[:, i]
        bars = torch.stack([y - low[:, i], high[:, i] - y]).clamp(min=0)
        color = BLUE if i < recovered.num_physics else ORANGE
        axis.errorbar(x, y, bars, fmt="o", ms=2.5, lw=0.7, color=color, alpha=0.6)
        ends = [float(x.min()), float(x.max())]
        axis.plot(ends, ends, color=GREY, lw=0.8, zorder=0)
        axis.set(title=f"{name}   R = {report.numbers['linear_r'][i]:.3f}", xlabel="true")
    axes[0].set_ylabel("recovered from the support alone")
    return figure


@torch.no_grad()
def trajectories_figure(
    model: HybridModel,
    guide: AmortizedGuide,
    tasks: Tasks,
    *,
    names: Sequence[str] | None = None,
    sensors: Sequence[int] | None = None,
    observation: str = "x",
) -> Figure:
    """Plot a query shot of three tasks: observed, reconstructed, and predicted from the support alone.

    Arguments:
        model: a trained program.
        guide: its guide.
        tasks: three tasks or more.
        names: names of the sensors.
        sensors: the sensors to show, by default up to four.
        observation: name of the observed site.
    """
    episode = tasks[:3].episode()
    latents = draws(model, guide, episode, 100)
    conditioned = poutine.condition(model, latents)
    reconstructed = predict(conditioned, episode, 100)[observation][:, :, 0]
    predicted = predict(model, episode, 100)[observation][:, :, 0]
    values = episode.query.values
    if values is None:
        fail("tasks with values", "none", "Pass tasks that were observed.")
    shown = list(range(min(4, values.shape[-1]))) if sensors is None else list(sensors)
    labels = [f"sensor {s}" for s in shown] if names is None else [names[s] for s in shown]
    num_tasks = len(values)
    figure, axes = plt.subplots(
        len(shown),
        num_tasks,
        figsize=(3 * num_tasks, 1.7 * len(shown)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    times = episode.query.times
    for column in range(num_tasks):
        for axis, s in zip(axes[:, column], shown, strict=True):
            band = predicted[:, column, :, s]
            low, high = band.quantile(0.05, 0), band.quantile(0.95, 0)
            axis.fill_between(
                times, low, high, color=ORANGE, alpha=0.3, lw=0, label="prediction, 90%"
            )
            mean = reconstructed[:, column, :, s].mean(0)
            axis.plot(times, mean, color=BLUE, lw=1.2, label="reconstruction")
            observed = values[column, 0, :, s]
            axis.plot(times, observed, ".", color="black", ms=2.5, label="observed")
        axes[0, column].set_title(f"held-out task {column}")
        axes[-1, column].set_xlabel("time")
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@torch.no_grad()
def prior_posterior_figure(model: HybridModel, guide: AmortizedGuide, tasks: Tasks) -> Figure:
    """Plot the latents of one task: given the support alone, and given the query too."""
    episode = tasks[:1].episode()
    before = predict(model, episode, 2000)
    after = draws(model, guide, episode, 2000)
    sites = model.prior.families
    entries = [(name, i) for name, family in sites.items() for i in range(family.n)]
    figure, axes = _row(len(entries), 2.2)
    truth = tasks.true_latents or {}
    for axis, (name, i) in zip(axes, entries, strict=True):
        _histogram(axis, before[name][:, 0, i], ORANGE, "support")
        _histogram(axis, after[name][:, 0, i], BLUE, "support and query")
        if name in truth and sites[name].n == 1:
            axis.axvline(float(truth[name][0, i]), color="black", lw=1, label="truth")
        axis.set(title=name if sites[name].n == 1 else f"{name}[{i}]", yticks=[])
    axes[0].legend(fontsize=7)
    return figure


def _histogram(axis: Axes, values: Tensor, color: str, label: str) -> None:
    axis.hist(values.numpy(), 50, density=True, color=color, alpha=0.5, label=label)


def _row(number: int, height: float) -> tuple[Figure, NDArray[np.object_]]:
    figure, axes = plt.subplots(
        1, number, figsize=(2.7 * number, height), squeeze=False, layout="constrained"
    )
    return figure, axes[0]
