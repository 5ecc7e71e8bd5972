"""Tables and figure of the experiment on the real double pendulum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.run import Result
from experiments.tables import markdown, spread
from pyro_hybrid.systems.compound_pendulum import HORIZONS

__all__ = ["JOINTS", "figure", "table"]

JOINTS = ("upper", "lower")
ROWS = {"compound": "classical, six parameters", "point_mass": "point masses, two parameters"}


def table(results: Sequence[Result]) -> str:
    """Tabulate median errors at each horizon, the ratio to the classical ones by seed, and the recovered latents."""
    return "\n\n".join([_error_table(results), _recovery_table(results)])


def _error_table(results: Sequence[Result]) -> str:
    names = {"hybrid": "hybrid, latents from the support", **ROWS}
    rows = []
    for key, name in names.items():
        by_horizon = [[run[key][k] for run in results] for k in range(len(HORIZONS))]
        rows.append([name, *(spread(values) for values in by_horizon)])
    for run in results:
        ratios = zip(run["ratio"], run["ratio_low"], run["ratio_high"], strict=True)
        cells = [f"{ratio:.3f} ({low:.3f} to {high:.3f})" for ratio, low, high in ratios]
        rows.append([f"hybrid / compound, seed {run['seed']}", *cells])
    return markdown(["median error, rad", *(f"{horizon} s" for horizon in HORIZONS)], rows)


def _recovery_table(results: Sequence[Result]) -> str:
    def cell(key: str, num_digits: int | None = None) -> str:
        return spread([run[key] for run in results], num_digits)

    rows = [
        ["log gravity, R with log s", cell("log_gravity_linear_r", 5)],
        ["log gravity, strong correlation", cell("log_gravity_strong", 5)],
        ["exponent of gravity in s (true: 2)", cell("log_gravity_slope", 3)],
        ["relative sd of s from gravity", cell("clock_relative_sd")],
        ["neural latent, R with s", cell("neural_linear_r", 3)],
    ]
    for joint in JOINTS:
        friction = [run[f"{joint}_friction"] for run in results]
        correlation = spread([one["r"] for one in friction], 3)
        exponent = spread([one["exponent"] for one in friction], 2)
        rows.append([f"{joint} friction, correlation with s", correlation])
        rows.append([f"exponent of {joint} friction in s (true: 1)", exponent])
    return markdown(["recovered on held-out tasks", f"{len(results)} seeds"], rows)


def figure(results: Sequence[Result]) -> Figure:
    """Plot errors against the horizon, the recovered clock, and the trend of friction."""
    figure = Figure(figsize=(9.0, 3.0), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _plot_errors(left, results)
    _plot_clock(middle, results)
    _plot_friction(right, results)
    return figure


def _plot_errors(axis: Axes, results: Sequence[Result]) -> None:
    names = {"hybrid": "hybrid", "compound": "compound", "point_mass": "point masses"}
    for index, (key, name) in enumerate(names.items()):
        for run in results:
            label = name if run is results[0] else None
            axis.loglog(HORIZONS, run[key], "o-", ms=3, lw=1, color=f"C{index}", label=label)
    axis.set(xlabel="horizon, s", ylabel="median error, rad")
    axis.legend(frameon=False, fontsize=8)


def _plot_clock(axis: Axes, results: Sequence[Result]) -> None:
    for run in results:
        clock = torch.tensor(run["clock"])
        root = torch.tensor(run["gravity"]).sqrt()
        axis.plot(clock, root / (root / clock).mean(), "o", ms=3, color="C0", alpha=0.5)
    axis.axline((1.0, 1.0), slope=1.0, color="grey", lw=0.8)
    axis.set(xlabel="true s", ylabel="s from gravity")


def _plot_friction(axis: Axes, results: Sequence[Result]) -> None:
    for run in results:
        clock = torch.tensor(run["clock"])
        for index, (joint, rates) in enumerate(zip(JOINTS, run["friction"], strict=True)):
            label = f"{joint} joint" if run is results[0] else None
            axis.plot(clock, rates, "o", ms=3, color=f"C{index}", alpha=0.5, label=label)
    axis.set(xlabel="true s", ylabel="damping, 1/s")
    axis.legend(frameon=False, fontsize=8)
