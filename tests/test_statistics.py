"""Condition (iii): families whose statistics are independent, repeated, and dependent on parts of the line only."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_hybrid.beliefs.families import (
    Beta,
    Family,
    FullNormal,
    Gamma,
    LogNormal,
    Normal,
    VonMises,
)
from pyro_hybrid.identifiability import statistics as module
from pyro_hybrid.identifiability.statistics import Statistics, judge_statistics, measure_statistics
from pyro_hybrid.identifiability.task_beliefs import TaskBeliefs


class Repeated(Normal):
    """T = (z, 3 - 2 z): the second follows from the first."""

    def statistics(self, z: Tensor) -> Tensor:
        return torch.stack([z, 3.0 - 2.0 * z], -1)


class Absolute(Normal):
    """T = (z, |z|): independent on the line, dependent on either half of it."""

    def statistics(self, z: Tensor) -> Tensor:
        return torch.stack([z, z.abs()], -1)


class Constant(Normal):
    """T = (z, 0.1): the second says nothing; its mean isn't 0.1 to the last digit."""

    def statistics(self, z: Tensor) -> Tensor:
        return torch.stack([z, torch.full_like(z, 0.1)], -1)


def believed(
    family: Family, centre: float = 0.0, spread: float = 1.0, tasks: int = 200
) -> TaskBeliefs:
    """Means that spread over tasks, each known to a third of that."""
    mean = centre + spread * torch.randn(2, tasks, family.n, dtype=torch.float64)
    return TaskBeliefs(
        {"z": family},
        {"z": family.from_gaussian(mean, torch.full_like(mean, spread / 3))},
        num_support=1,
    )


def status(family: Family, centre: float = 0.0, spread: float = 1.0) -> str:
    return judge_statistics(measure_statistics(believed(family, centre, spread))).status


# ---- the number ----------------------------------------------------------------------------------


def test_the_margin_is_the_least_eigenvalue_of_the_correlation_matrix() -> None:
    values = torch.randn(500, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64) + 5.0
    expected = np.linalg.eigvalsh(np.corrcoef(values.numpy().T))[0]
    assert module._margin(values[:, 0], values)[0] == pytest.approx(expected, rel=1e-9)


def test_units_of_a_statistic_do_not_matter() -> None:
    values = torch.randn(500, 2, dtype=torch.float64)
    scaled = values * torch.tensor([1e-6, 1e5]) + torch.tensor([0.0, 3e4])
    margins = [module._margin(values[:, 0], columns)[0] for columns in (values, scaled)]
    assert margins[0] == pytest.approx(margins[1], rel=1e-6)


def test_on_a_quarter_it_is_the_margin_of_the_statistics_there() -> None:
    """On the interval (a, b) with uniform z, corr(z, z²) is known."""
    z = torch.linspace(1.0, 3.0, 200_001, dtype=torch.float64)
    low, high = 1.0, 3.0
    centre, half = 0.5 * (low + high), 0.5 * (high - low)
    correlation = 2 * centre / np.sqrt(4 * centre**2 + 4 * half**2 / 15)
    assert module._margin(z, Normal(1).statistics(z))[0] == pytest.approx(1 - correlation, rel=1e-3)


# ---- what is good holds --------------------------------------------------------------------------


@pytest.mark.parametrize("family", [Normal, LogNormal, Gamma, Beta, VonMises])
def test_every_family_of_the_library_holds(family: Callable[[int], Family]) -> None:
    check = judge_statistics(measure_statistics(believed(family(2))))
    assert check.status == "holds" and not check.remedy
    assert check.why in (
        "The sufficient statistics of `z[0]` are the least independent ones.",
        "The sufficient statistics of `z[1]` are the least independent ones.",
    )


@pytest.mark.parametrize(
    ("centre", "spread"),
    [
        (0.0, 1e-6),
        (0.0, 1e6),
        (3.0, 0.1),
        (-50.0, 5.0),
        (100.0, 0.01),
        (100.0, 1e-3),
        (-1e4, 0.1),
        (1e-3, 1e-8),
    ],
)
def test_units_of_the_latent_and_its_origin_do_not_matter(centre: float, spread: float) -> None:
    assert status(Normal(1), centre, spread) == "holds"


@pytest.mark.parametrize("family", [Normal, LogNormal, Gamma, Beta, VonMises])
def test_a_narrow_range_far_from_zero_does_not_count_against_a_family(
    family: Callable[[int], Family],
) -> None:
    assert status(family(1), 3.0, 0.01) == "holds"


# ---- what is bad fails ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", [Repeated, Constant])
@pytest.mark.parametrize(
    ("centre", "spread"), [(0.0, 1.0), (100.0, 1.0), (100.0, 1e-3), (0.0, 1e-4)]
)
def test_a_statistic_that_follows_from_the_other_fails(
    family: Callable[[int], Family], centre: float, spread: float
) -> None:
    check = judge_statistics(measure_statistics(believed(family(1), centre, spread)))
    assert (
        check.status == "fails"
        and check.why == "One sufficient statistic of `z` follows from its others."
    )
    assert check.remedy.startswith("Give the family statistics none of which follows")


def test_statistics_that_are_dependent_on_half_of_the_line_fail_thanks_to_quarters() -> None:
    beliefs = believed(Absolute(1))
    found = measure_statistics(beliefs)
    assert judge_statistics(found).status == "fails"
    u = torch.randn(2000, 1, dtype=torch.float64)
    assert (
        module._margin(u[:, 0], Absolute(1).statistics(u)[:, 0])[0] > 0.1
    )  # on all of the line nothing is wrong
    assert found.margin.shape == (1, module.PIECES) and (found.margin[0, [0, -1]] < 1e-12).all()


def test_a_family_that_is_no_product_over_components_fails() -> None:
    check = judge_statistics(measure_statistics(believed(FullNormal(2))))
    assert (
        check.status == "fails"
        and check.why == "The prior of `z[0]`, `z[1]` is not a product over components."
    )
    assert "factorized" in check.remedy


def test_the_latent_at_fault_is_named() -> None:
    one, other = believed(Normal(2)), believed(Repeated(1))
    beliefs = TaskBeliefs(
        {"good": Normal(2), "bad": Repeated(1)},
        {"good": one.natural["z"], "bad": other.natural["z"]},
        1,
    )
    found = measure_statistics(beliefs)
    assert found.names == ["good[0]", "good[1]", "bad"] and found.factorized == [True] * 3
    assert (
        judge_statistics(found).why == "One sufficient statistic of `bad` follows from its others."
    )


# ---- what can't be known says so -----------------------------------------------------------------


@pytest.mark.parametrize("family", [Normal, Repeated, Gamma])
def test_so_narrow_and_so_far_from_zero_that_rounding_hides_all_it_stays_open(
    family: Callable[[int], Family],
) -> None:
    check = judge_statistics(
        measure_statistics(believed(family(1), 100.0 if family is not Gamma else 3.0, 1e-8))
    )
    assert check.status == "undecided" and check.interval[0] == 0.0 < check.interval[1]
    assert check.why.startswith("Rounding hides whether the statistics of `z` are independent")
    assert check.remedy == "Choose an origin and a unit near the values of the latent."


class Verdict(NamedTuple):
    margin: float
    rounding: float
    status: str


@pytest.mark.parametrize(
    "case",
    [
        Verdict(1e-3, 1e-14, "holds"),
        Verdict(1e-20, 1e-12, "holds"),
        Verdict(1e-20, 1e-9, "fails"),
        Verdict(0.0, 1e-14, "fails"),
        Verdict(1e-10, 1e-4, "undecided"),
    ],
)
def test_the_worst_quarter_of_the_worst_latent_decides(case: Verdict) -> None:
    margin, rounding = (
        torch.full((2, 3, 4), 0.5, dtype=torch.float64) * torch.tensor([1.0, 1e-14])[:, None, None]
    )
    margin[1, 2], rounding[1, 2] = case.margin, case.rounding
    check = judge_statistics(Statistics(["a", "b", "c"], margin, rounding, [True] * 3))
    assert (check.value, check.status) == (case.margin, case.status) and "`b`" in check.why


def test_what_is_dependent_comes_before_what_rounding_hides() -> None:
    margin, rounding = (
        torch.zeros(2, 1, dtype=torch.float64),
        torch.tensor([[1e-3], [1e-14]], dtype=torch.float64),
    )
    check = judge_statistics(Statistics(["far", "bad"], margin, rounding, [True] * 2))
    assert (
        check.status == "fails"
        and check.why == "One sufficient statistic of `bad` follows from its others."
    )


def test_global_random_numbers_are_left_alone_and_the_seed_decides() -> None:
    beliefs, before = believed(Normal(1)), torch.get_rng_state()
    one, again, other = (measure_statistics(beliefs, seed=seed).margin for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())
