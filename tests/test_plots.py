"""Pictures show the numbers that were judged, where they are judged, and say why where there is nothing to show."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure

import pyro_hybrid as ph
from pyro_hybrid.identifiability import plots
from pyro_hybrid.identifiability.certificate import HEADLINES
from pyro_hybrid.identifiability.efficiency import RATIO, Efficiency
from pyro_hybrid.identifiability.fisher import SEEN, FisherInformation
from pyro_hybrid.identifiability.fit import FACTOR, Misfit
from pyro_hybrid.identifiability.injectivity import ALIKE, EquivalentLatents
from pyro_hybrid.identifiability.learning_curves import LearningCurve
from pyro_hybrid.identifiability.statistics import INDEPENDENT, Statistics
from pyro_hybrid.identifiability.variability import LOCATIONS, NATS, Variability
from pyro_hybrid.scores.ambiguity import Ambiguity
from pyro_hybrid.scores.check import Check, Status
from pyro_hybrid.scores.separability import Separability

LATENTS, TERMS = (
    ["rate", "unknown[0]"],
    ["rate: log z", "rate: log² z", "unknown[0]: z", "unknown[0]: z²"],
)


def doubles(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def fit(*factors: float) -> Misfit:
    return Misfit(doubles(*factors).square())


def fisher(singular: torch.Tensor) -> FisherInformation:
    n = singular.shape[-1]
    points = torch.zeros(*singular.shape)
    return FisherInformation(
        LATENTS[:n], points, torch.diag_embed(singular.square()), singular, torch.full((n,), 1 / n)
    )


def twins(distance: torch.Tensor, apart: torch.Tensor) -> EquivalentLatents:
    return EquivalentLatents(LATENTS, torch.zeros_like(apart), apart, apart, distance, 18)


def statistics(margin: torch.Tensor) -> Statistics:
    return Statistics(LATENTS, margin, torch.full_like(margin, 1e-14), [True, True])


def variability(locations: torch.Tensor, nats: torch.Tensor, tasks: int = 300) -> Variability:
    return Variability(
        LATENTS,
        TERMS,
        tasks,
        4,
        locations,
        (0.1, 9.0),
        doubles(0.5, 0.5),
        nats,
        (0.01, 0.02),
        torch.full((4,), 0.25),
    )


def ambiguity(matrix: np.ndarray) -> Ambiguity:
    one, whole = np.ones(2), (1.0, 1.0)
    return Ambiguity("linear", 1.0, whole, one, one, 0.7, one, 0.7, whole, 0.3, whole, matrix, 2.0)


def separability(
    value: list[float], interval: list[tuple[float, float]], level: float
) -> Separability:
    return Separability(
        np.array(value),
        np.array(interval),
        level,
        0.1,
        (0, 1),
        0.1,
        np.ones(len(value)),
        1.0,
        (1.0, 1.0),
    )


def efficiency(ratio: torch.Tensor, bound: float = 0.25) -> Efficiency:
    return Efficiency(
        LATENTS, "truth", ratio * bound, torch.full_like(ratio, bound), ratio.expand(9, -1)
    )


def numbers() -> dict[str, Any]:
    """What a certificate of all checks holds."""
    generator = torch.Generator().manual_seed(0)
    return {
        "beliefs": None,
        "noise": None,
        "fit": fit(0.8, 1.0, 1.1, 1.3),
        "fisher": fisher(doubles([[4.0, 40.0], [5.0, 50.0], [6.0, 60.0]])),
        "equivalent latents": twins(
            doubles(5.0, torch.inf, 30.0), doubles([1.0, 1.0], [0.0, 0.0], [0.0, 2.0])
        ),
        "statistics": statistics(torch.rand(2, 4, generator=generator, dtype=torch.float64)),
        "variability": variability(doubles(4.0, 90.0), doubles(0.02, 0.1, 0.4, 3.0)),
        "against restart 1": ambiguity(np.array([[1.0, 0.5], [0.2, -2.0]])),
        "separability": separability([0.1, 0.3], [(0.05, 0.2), (0.2, 0.5)], 0.02),
        "efficiency": efficiency(doubles(1.5, 2.5)),
    }


CONDITIONS = (
    "noise (i)",
    "fit",
    "injectivity, local (ii)",
    "injectivity, global (ii)",
    "statistics (iii)",
    "variability of means (iv)",
    "variability (iv)",
)
FURTHER = ("ambiguity against restart 1", "separability", "efficiency")
DRAWN = [*CONDITIONS[1:], *FURTHER]  # noise is looked up in a table: there is no picture of it


def certificate(status: Status = "holds", **changes: Any) -> ph.Certificate:
    def checks(names: tuple[str, ...]) -> list[Check]:
        return [Check(name, status, 1.0, (0.9, 1.1), SEEN, f"why {name}") for name in names]

    return ph.Certificate(
        **{
            "conditions": checks(CONDITIONS),
            "further": checks(FURTHER),
            "numbers": numbers(),
            "systems": 300,
            "shots": 4,
            **changes,
        }
    )


def axes() -> Axes:
    return Figure().subplots()


def limits(axis: Axes, *, across: bool = True) -> list[float]:
    """Where the dashed lines are that run from side to side, or from bottom to top; all of them must be in view."""
    found = [
        line.get_ydata()[0] if across else line.get_xdata()[0]
        for line in axis.lines
        if line.get_linestyle() == "--"
        and len(set(line.get_ydata() if across else line.get_xdata())) == 1
    ]
    low, high = axis.get_ylim() if across else axis.get_xlim()
    assert all(low <= float(value) <= high for value in found), (found, low, high)
    return [float(value) for value in found]


def bars(axis: Axes) -> list[float]:
    """Heights of all bars, in order."""
    (container,) = [
        container for container in axis.containers if isinstance(container, BarContainer)
    ]
    return [bar.get_height() for bar in container]


def marks(axis: Axes, which: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, 2) with error bars, and the lower and upper ends of these (n, 2)."""
    container = [
        container for container in axis.containers if isinstance(container, ErrorbarContainer)
    ][which]
    line, _, (ends,) = container.lines
    return np.stack(line.get_data(), -1), np.array(
        [segment[:, 1] for segment in ends.get_segments()]
    )


def texts(axis: Axes) -> str:
    return " ".join(text.get_text() for text in axis.texts)


def names(axis: Axes) -> list[str]:
    return [label.get_text() for label in axis.get_xticklabels()]


# ---- single panels -------------------------------------------------------------------------------


def test_fit_counts_systems_by_their_error_and_marks_the_factor_both_ways() -> None:
    axis = axes()
    plots.plot_misfit(axis, fit(0.7, 1.0, 1.05, 4.0, 30.0))
    counts = {
        (bar.get_x(), bar.get_x() + bar.get_width()): bar.get_height() for bar in axis.patches
    }
    assert sum(counts.values()) == 5
    for factor, expected in ((0.7, 1), (4.0, 1), (30.0, 1)):
        assert (
            sum(
                count for (low, high), count in counts.items() if low <= factor <= high * (1 + 1e-9)
            )
            == expected
        )
    assert sorted(limits(axis, across=False)) == [1.0 / FACTOR.holds, FACTOR.holds]
    assert axis.get_xscale() == "log"


@pytest.mark.parametrize("factors", [(0.0, 1.0), (math.inf, 1.0), (1e-9, 1e9), (1.0,)])
def test_fit_shows_systems_that_are_off_the_scale_at_its_ends(factors: tuple[float, ...]) -> None:
    axis = axes()
    plots.plot_misfit(axis, fit(*factors))
    low, high = axis.get_xlim()
    shown = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert sum(bar.get_height() for bar in axis.patches) == len(factors) and len(shown) >= 3


def test_local_shows_the_middle_nine_tenths_of_every_direction() -> None:
    axis = axes()
    steps = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
    plots.plot_information(
        axis, fisher(torch.stack([2.0 + steps, 20.0 + 10.0 * steps], -1).unsqueeze(0))
    )
    points, ends = marks(axis)
    assert np.allclose(points, [[0, 2.5], [1, 25.0]]) and np.allclose(
        ends, [[2.05, 2.95], [20.5, 29.5]]
    )
    assert limits(axis) == [SEEN.holds] and axis.get_yscale() == "log"


def test_local_has_a_place_for_a_direction_that_nothing_sees() -> None:
    axis = axes()
    plots.plot_information(axis, fisher(torch.zeros(2, 3, 1, dtype=torch.float64)))
    points, _ = marks(axis)
    assert 0.0 < points[0, 1] <= 1e-3 and limits(axis) == [SEEN.holds]


def test_twin_shows_the_pairs_and_counts_the_systems_without_one() -> None:
    axis = axes()
    plots.plot_equivalent_latents(
        axis,
        twins(doubles(0.01, torch.inf, 30.0), doubles([3.0, 4.0], [torch.nan] * 2, [0.0, -2.0])),
    )
    assert np.allclose(axis.collections[0].get_offsets(), [[5.0, 0.01], [2.0, 30.0]])
    assert "1 of 3 systems: none found" in texts(axis) and limits(axis) == [ALIKE]
    assert axis.get_xlim()[0] <= 2.0 and axis.get_xlim()[1] >= 5.0


@pytest.mark.parametrize("distance", [torch.inf, 1e-7], ids=["no pair", "twins everywhere"])
def test_twin_keeps_its_limit_in_view_whatever_was_found(distance: float) -> None:
    axis = axes()
    plots.plot_equivalent_latents(
        axis, twins(doubles(distance, distance), doubles([1.5, 0.0], [0.0, 1.5]))
    )
    low, high = axis.get_ylim()
    offsets = np.asarray(axis.collections[0].get_offsets())
    assert len(offsets) == (0 if math.isinf(distance) else 2) and all(
        low <= y <= high for _, y in offsets
    )
    assert limits(axis) == [ALIKE]


def test_statistic_shows_the_worst_quarter_of_every_latent() -> None:
    axis = axes()
    plots.plot_statistics(axis, statistics(doubles([0.5, 1e-3, 0.4, 0.2], [0.3, 0.2, 0.1, 1e-11])))
    assert bars(axis) == pytest.approx([1e-3, 1e-11]) and names(axis) == LATENTS
    assert limits(axis) == [INDEPENDENT.fails] and axis.get_yscale() == "log"


def test_means_shows_the_signal_to_noise_ratios() -> None:
    axis = axes()
    plots.plot_means(axis, variability(doubles(0.5, 90.0), torch.ones(4)))
    assert (
        bars(axis) == pytest.approx([0.5, 90.0])
        and names(axis) == ["0", "1"]
        and limits(axis) == [LOCATIONS.holds]
    )


def test_nats_shows_the_evidence_of_all_tasks() -> None:
    axis = axes()
    plots.plot_nats(axis, variability(torch.ones(2), doubles(0.001, 0.01, 0.1, 2.0), tasks=500))
    assert bars(axis) == pytest.approx([0.5, 5.0, 50.0, 1000.0]) and limits(axis) == [NATS]
    assert "500 systems" in axis.get_ylabel()


def test_ratio_shows_errors_in_units_of_the_bound() -> None:
    axis = axes()
    plots.plot_efficiency(axis, efficiency(doubles(1.5, 8.0)))
    assert bars(axis) == pytest.approx([1.5, 8.0]) and names(axis) == LATENTS
    assert sorted(limits(axis)) == [1.0, RATIO.holds]


@pytest.mark.parametrize(
    ("draw", "found", "expected"),
    [
        (
            plots.plot_statistics,
            statistics(torch.full((2, 4), 1e-17, dtype=torch.float64)),
            [INDEPENDENT.fails],
        ),
        (plots.plot_means, variability(doubles(-0.3, 0.1), torch.ones(4)), [LOCATIONS.holds]),
        (plots.plot_nats, variability(torch.ones(2), torch.full((4,), 1e-9)), [NATS]),
        (plots.plot_efficiency, efficiency(doubles(1e-3, 0.2)), [1.0, RATIO.holds]),
    ],
    ids=["statistic", "means", "nats", "ratio"],
)
def test_a_limit_that_no_bar_reaches_is_in_view(
    draw: Any, found: Any, expected: list[float]
) -> None:
    axis = axes()
    draw(axis, found)
    assert sorted(limits(axis)) == expected
    low, high = axis.get_ylim()
    assert all(low < height <= high for height in bars(axis))


def test_matrix_shows_every_row_by_its_largest_entry() -> None:
    axis = axes()
    plots.plot_ambiguity(axis, ambiguity(np.array([[4.0, -1.0, 0.0], [0.2, 0.1, -0.4]])))
    assert np.allclose(axis.images[0].get_array(), [[1.0, 0.25, 0.0], [0.5, 0.25, 1.0]])
    assert axis.images[0].get_clim() == (0.0, 1.0)


def test_separability_shows_intervals_and_what_a_gaussian_reaches() -> None:
    axis = axes()
    plots.plot_separability(
        axis, separability([0.1, 0.3, 0.0], [(0.05, 0.2), (0.2, 0.5), (0.0, 0.01)], 0.02)
    )
    points, ends = marks(axis)
    assert np.allclose(points, [[0, 0.1], [1, 0.3], [2, 0.0]])
    assert np.allclose(ends, [[0.05, 0.2], [0.2, 0.5], [0.0, 0.01]]) and limits(axis) == [0.02]


def learned(threshold: int | None) -> LearningCurve:
    r = np.array([[0.2, 0.5], [0.7, 0.8], [0.9, 0.99]])
    return LearningCurve(
        "tasks" if threshold else "shots",
        ["rate", "drag"],
        [10, 100, 1000],
        r,
        np.stack([r - 0.1, r + 0.005], -1),
        r.mean(1),
        threshold,
    )


@pytest.mark.parametrize("threshold", [5, 2000, None], ids=["below", "above", "none"])
def test_curve_shows_every_latent_with_its_interval_and_what_the_theorem_counts(
    threshold: int | None,
) -> None:
    axis, found = axes(), learned(threshold)
    plots.plot_learning_curve(axis, found)
    for i in range(2):
        points, ends = marks(axis, i)
        assert np.allclose(points, np.stack([found.sizes, found.linear_r[:, i]], -1))
        assert np.allclose(ends, found.interval[:, i])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["rate", "drag"]
    assert names(axis) == ["10", "100", "1000"] and axis.get_xscale() == "log"
    assert limits(axis, across=False) == ([] if threshold is None else [threshold])
    assert (f"n·k + 1 = {threshold}" in texts(axis)) == (threshold is not None)
    assert axis.get_xlabel() == ("support shots" if threshold is None else "tasks to learn from")


# ---- all of them ---------------------------------------------------------------------------------


def test_a_certificate_is_nine_panels_each_with_its_verdict(tmp_path: Path) -> None:
    figure = certificate().plot()
    assert isinstance(figure, Figure)
    assert [axis.get_title() for axis in figure.axes] == [f"{name}: holds" for name in DRAWN]
    assert all(axis.axison and axis.has_data() for axis in figure.axes)
    figure.savefig(tmp_path / "certificate.png")
    content = (tmp_path / "certificate.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


@pytest.mark.parametrize("status", ["holds", "fails", "undecided"])
def test_the_headline_is_the_verdict_in_its_colour(status: Status) -> None:
    figure = certificate(status).plot()
    assert figure.get_suptitle() == HEADLINES[status]
    colours = {figure._suptitle.get_color(), *(axis.title.get_color() for axis in figure.axes)}
    assert colours == {plots.COLORS[status]}


def test_what_was_not_checked_shows_why() -> None:
    checks = {name: Check.skipped(name, f"no {name} because") for name in (*CONDITIONS, *FURTHER)}
    figure = certificate(
        conditions=[checks[name] for name in CONDITIONS],
        further=[checks[name] for name in FURTHER],
        numbers={},
    ).plot()
    for axis, name in zip(figure.axes, DRAWN, strict=True):
        assert axis.get_title() == f"{name}: not checked" and texts(axis) == f"no {name} because"
        assert not axis.axison and not axis.has_data()


def test_without_a_second_training_the_panel_of_the_ambiguity_says_so() -> None:
    """The check then has the name of neither side."""
    further = [
        Check.skipped("residual ambiguity", "there is nothing to compare with"),
        *certificate().further[1:],
    ]
    found = {name: value for name, value in numbers().items() if not name.startswith("against")}
    axis = certificate(further=further, numbers=found).plot().axes[6]
    assert (
        axis.get_title() == "residual ambiguity: not checked"
        and texts(axis) == "there is nothing to compare with"
    )


def test_what_was_measured_but_not_judged_shows_why_as_well() -> None:
    """Without a bound there is no ratio to the bound, and a bar of height zero would look like a good one."""
    blind = efficiency(doubles(1.0, 1.0))._replace(bound=torch.full((2,), torch.inf))
    further = [
        *certificate().further[:2],
        Check.skipped("efficiency", "a direction isn't seen at all"),
    ]
    axis = certificate(further=further, numbers={**numbers(), "efficiency": blind}).plot().axes[8]
    assert (
        axis.get_title() == "efficiency: not checked"
        and "a direction isn't seen at all" in texts(axis)
    )
    assert not axis.containers


def test_what_failed_before_anything_was_measured_shows_why() -> None:
    found = {name: value for name, value in numbers().items() if name != "variability"}
    figure = certificate("fails", numbers=found).plot()
    assert [texts(axis) for axis in figure.axes[4:6]] == [f"why {name}" for name in CONDITIONS[5:]]
    assert [axis.get_title() for axis in figure.axes[4:6]] == [
        f"{name}: fails" for name in CONDITIONS[5:]
    ]


def test_restarts_come_before_the_truth() -> None:
    pairs = {
        "against restart 1": ambiguity(np.eye(2)),
        "against the truth": ambiguity(np.ones((2, 2))),
    }
    further = [Check(f"ambiguity {name}", "holds") for name in pairs]
    axis = certificate(further=further, numbers={**numbers(), **pairs}).plot().axes[6]
    assert axis.get_title() == "ambiguity against restart 1: holds"
    assert np.allclose(axis.images[0].get_array(), np.eye(2))


def test_drawing_leaves_pyplot_and_its_settings_alone(tmp_path: Path) -> None:
    figures, settings = matplotlib.pyplot.get_fignums(), dict(matplotlib.rcParams)
    certificate().plot().savefig(tmp_path / "certificate.png")
    plots.plot_learning_curve(axes(), learned(5))
    assert matplotlib.pyplot.get_fignums() == figures and dict(matplotlib.rcParams) == settings
