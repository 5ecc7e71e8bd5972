"""ICA against known sources, and its licence three ways: given, refused, and left open where tasks are few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from pyro_hybrid.scores import ica, separability
from pyro_hybrid.scores.check import Check
from pyro_hybrid.scores.ica import disentangle
from pyro_hybrid.scores.mcc import mcc
from pyro_hybrid.scores.separability import (
    Separability,
    judge_separability,
    measure_separability,
)

Sampler = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def parabola(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    sources = rng.uniform(-1, 1, shape)
    sources[:, 1] = sources[:, 0] ** 2 + 0.1 * sources[:, 1]
    return sources


def ring(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi, shape[0])
    return np.stack([np.cos(angle), np.sin(angle)], 1) + 0.05 * rng.normal(size=shape)


INDEPENDENT: dict[str, Sampler] = {
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "lognormal": lambda rng, shape: np.exp(0.5 * rng.normal(size=shape)),
    "bimodal": lambda rng, shape: rng.choice([-1.0, 1.0], shape) + 0.3 * rng.normal(size=shape),
}
DEPENDENT: dict[str, Sampler] = {
    "parabola": parabola,
    "ring": ring,
    "common scale": lambda rng, shape: (
        rng.laplace(size=shape) * np.exp(0.7 * rng.normal(size=(shape[0], 1)))
    ),
}
OTHER: dict[str, Sampler] = {"gaussian": lambda rng, shape: rng.normal(size=shape)}


def mixed(
    kind: str, tasks: int, components: int, seed: int, gaussians: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sources = {**INDEPENDENT, **DEPENDENT, **OTHER}[kind](rng, (tasks, components))
    sources[:, :gaussians] = rng.normal(size=(tasks, gaussians))
    return sources @ rng.normal(size=(components, components)) + rng.normal(
        size=components
    ), sources


def uniform(tasks: int, components: int, seed: int = 0) -> Tensor:
    return torch.rand(
        tasks, components, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def judged(kind: str, tasks: int, components: int, seed: int = 0, gaussians: int = 0) -> Check:
    return judge_separability(
        measure_separability(mixed(kind, tasks, components, seed, gaussians)[0], seed=seed)
    )


# ---- disentangle ---------------------------------------------------------------------------------


@pytest.mark.parametrize("components", range(2, 9))
def test_disentangle_recovers_linearly_mixed_uniform_sources(components: int) -> None:
    for seed in range(3):
        z, sources = mixed("uniform", 500, components, seed)
        assert mcc(disentangle(z, seed=seed), sources).strong > 0.98


@pytest.mark.parametrize("kind", sorted(INDEPENDENT))
@pytest.mark.parametrize("components", [2, 5])
def test_disentangle_recovers_light_heavy_skewed_and_bimodal_sources(
    kind: str, components: int
) -> None:
    z, sources = mixed(kind, 1000, components, seed=0)
    assert mcc(disentangle(z), sources).strong > 0.98


def test_disentangle_finds_light_and_heavy_tails_in_one_mixture() -> None:
    light, heavy = mixed("uniform", 500, 2, seed=1)[1], mixed("laplace", 500, 2, seed=2)[1]
    sources = np.column_stack([light, heavy])
    assert (
        mcc(disentangle(sources @ np.random.default_rng(3).normal(size=(4, 4))), sources).strong
        > 0.98
    )


def test_two_gaussians_that_nothing_resolves_spoil_no_other_component() -> None:
    z, sources = mixed("uniform", 500, 8, seed=0, gaussians=2)
    assert mcc(disentangle(z), sources).matched[2:].min() > 0.97


def test_disentangle_leaves_the_order_and_sign_of_what_is_independent_already() -> None:
    sources = uniform(1000, 5)
    independent = disentangle(sources)
    correlation = np.corrcoef(independent.T, sources.T)[:5, 5:]
    assert np.diag(correlation).min() > 0.98
    np.testing.assert_allclose(independent.std(0, unbiased=False), 1.0)


def test_disentangle_applies_the_unmixing_of_other_tasks() -> None:
    z, sources = mixed("uniform", 600, 3, seed=4)
    together = disentangle(z[:500])
    np.testing.assert_allclose(disentangle(z[:7], fit=z[:500]), together[:7])
    assert mcc(disentangle(z[500:], fit=z[:500]), sources[500:]).strong > 0.98


def test_disentangle_returns_the_type_precision_and_shape_it_was_given() -> None:
    z = uniform(200, 3).float().requires_grad_()
    tensor, array = disentangle(z), disentangle(z.detach().numpy())
    assert isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and not tensor.requires_grad
    assert isinstance(array, np.ndarray) and array.dtype == np.float32 and array.shape == (200, 3)
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert disentangle(z.detach()[:, :1]).shape == (200, 1)


def test_disentangle_warns_in_its_own_words_when_no_run_converges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ica, "ITERATIONS", 1)
    monkeypatch.setattr(ica, "PATIENCE", 2)
    with pytest.warns(
        RuntimeWarning, match="expected ICA to converge; got 15 runs of 2 iterations that did not"
    ):
        disentangle(uniform(200, 4))


def spared(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three sources turned into four latents; in one direction tasks differ little, as a function of the sources."""
    rng = np.random.default_rng(seed)
    sources = rng.uniform(-1, 1, (600, 3))
    spare = 0.05 * np.abs(sources[:, :1] + sources[:, 1:2])
    turn, mixing = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (4, 3))
    return np.concatenate([sources @ (mixing * [1.0, 0.6, 0.4]), spare], 1) @ turn, sources


@pytest.mark.parametrize("seed", range(4))
def test_disentangle_leaves_a_spare_latent_out_where_it_is_told_how_many_there_are(
    seed: int,
) -> None:
    z, sources = spared(seed)
    found = disentangle(z[300:], components=3, fit=z[:300])
    assert found.shape == (300, 3) and mcc(found, sources[300:]).strong > 0.98
    assert mcc(z[300:], sources[300:]).linear_r.min() > 0.99
    assert (
        mcc(disentangle(z[300:], fit=z[:300]), sources[300:]).strong < 0.95
    )  # nothing unmixes all four


def test_fewer_components_come_in_the_order_and_with_the_signs_of_the_latents_they_resemble() -> (
    None
):
    sources = uniform(500, 3)
    z = torch.cat(
        [0.01 * sources.sum(1, keepdim=True).square(), sources * torch.tensor([1.0, -2.0, 0.5])], 1
    )
    found = disentangle(z, components=3)
    together = torch.corrcoef(torch.cat([found, z[:, 1:]], 1).T)[:3, 3:]
    assert (together.diagonal() > 0.99).all()


def test_disentangle_of_all_components_is_the_same_whether_or_not_it_is_told() -> None:
    z = uniform(300, 3) @ torch.tensor(
        [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]], dtype=torch.float64
    )
    assert torch.equal(disentangle(z), disentangle(z, components=3))


@pytest.mark.parametrize("components", [0, 5])
def test_disentangle_refuses_more_components_than_latents_and_none(components: int) -> None:
    with pytest.raises(
        ValueError, match=f"components as a whole number from 1 to 4; got {components}"
    ):
        disentangle(spared(0)[0], components=components)


def test_disentangle_refuses_a_fit_of_other_width() -> None:
    with pytest.raises(ValueError, match="fit with as many components as latents; got 2 and 3"):
        disentangle(uniform(50, 3), fit=uniform(50, 2))


# ---- separable: what is good passes --------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(INDEPENDENT))
def test_independent_sources_that_are_not_gaussian_hold(kind: str) -> None:
    z, sources = mixed(kind, 500, 3, seed=1)
    numbers = measure_separability(z, seed=1)
    check = judge_separability(numbers)
    assert check.status == "holds" and check.remedy == "", check
    assert check.value == numbers.stability > 0.98 and check.interval[0] > 0.95
    assert "At most one component is Gaussian" in check.why
    found = mcc(disentangle(z, seed=1), sources)
    np.testing.assert_allclose(
        numbers.agreement[found.assignment], found.matched, atol=0.02
    )  # what stability promises


def test_many_sources_hold() -> None:
    assert judged("uniform", 500, 6, seed=2).status == "holds"


def test_one_gaussian_among_others_is_allowed_and_found() -> None:
    z, sources = mixed("uniform", 1000, 3, seed=0, gaussians=1)
    numbers = measure_separability(z)
    gaussian = mcc(disentangle(z), sources).assignment[0]
    assert judge_separability(numbers).status == "holds"
    assert (numbers.non_gaussianity < numbers.noise_level).nonzero()[0].tolist() == [gaussian]


def test_a_single_latent_has_nothing_to_be_separated_from() -> None:
    numbers = measure_separability(uniform(30, 1))
    assert (numbers.dependence, numbers.dependence_level) == (0.0, 0.0)
    assert numbers.stability == pytest.approx(1.0) and judge_separability(numbers).status == "holds"


# ---- what is bad fails ---------------------------------------------------------------------------


def test_gaussian_sources_fail_and_their_rotation_is_blamed() -> None:
    check = judged("gaussian", 500, 2)
    assert check.status == "fails" and check.interval[0] < 0.9, check
    assert (
        "Components 0 and 1 look Gaussian over tasks: any rotation of them fits as well"
        in check.why
    )
    assert check.remedy.startswith("Report them up to a rotation, or resolve it by what is known")


def test_two_gaussians_are_named_and_the_rest_is_not() -> None:
    z, sources = mixed("uniform", 500, 3, seed=0, gaussians=2)
    one, other = sorted(mcc(disentangle(z), sources).assignment[:2])
    check = judge_separability(measure_separability(z))
    assert check.status == "fails" and check.why.startswith(
        f"Components {one} and {other} look Gaussian"
    ), check


@pytest.mark.parametrize("kind", sorted(DEPENDENT))
def test_dependent_sources_fail_however_stable_their_components_are(kind: str) -> None:
    check = judged(kind, 500, 2, seed=1)
    assert check.status == "fails" and check.interval[0] > 0.1, check
    assert check.why.startswith("Components 0 and 1 depend on each other over tasks")
    assert "name the physics" in check.remedy


# ---- what is unknowable says so ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bimodal", "gaussian"])
def test_thirty_tasks_decide_nothing(kind: str) -> None:
    check = judged(kind, 30, 2)
    assert check.status == "undecided" and check.remedy.startswith("Pool more tasks"), check
    assert "cannot be seen with so few tasks" in check.why


# ---- the numbers, against what is known ----------------------------------------------------------


def test_negentropy_is_zero_for_a_gaussian_and_that_of_a_uniform_is_the_yardstick() -> None:
    grid = (np.arange(20000) + 0.5) / 20000
    columns = np.stack([norm.ppf(grid), grid, 1e3 * grid - 7, -np.log(grid)], 1)
    gaussian, uniformly, moved, exponential = separability.negentropy(columns)
    assert gaussian == pytest.approx(0.0, abs=1e-5)
    assert uniformly == pytest.approx(separability.UNIFORM, abs=1e-4) and moved == pytest.approx(
        uniformly
    )
    assert exponential > 2 * uniformly


def test_independent_components_exceed_the_level_of_dependence_once_in_a_hundred() -> None:
    rng, level = np.random.default_rng(0), separability.dependence_level(200, 3)
    exceeded = [
        separability.largest_dependence(rng.laplace(size=(200, 3)))[0] > level for _ in range(300)
    ]
    assert sum(exceeded) <= 10


def test_dependence_names_the_pair_whatever_monotone_map_hides_it() -> None:
    sources = np.random.default_rng(0).uniform(-1, 1, (500, 4))
    sources[:, 3] = sources[:, 1] ** 2
    value, pair = separability.largest_dependence(sources)
    assert pair == (1, 3) and value > 0.9
    assert separability.largest_dependence(np.exp(5 * sources))[0] == pytest.approx(value)


def test_what_ica_makes_of_noise_is_more_than_noise_has() -> None:
    level = separability.noise_level((200, 5), np.random.default_rng(0))
    untouched = separability.negentropy(np.random.default_rng(1).normal(size=(200, 1000)))
    assert level > np.quantile(untouched, 0.95)


def test_numbers_repeat_and_leave_the_global_random_state_alone() -> None:
    z, _ = mixed("bimodal", 60, 2, seed=5)
    before, before_torch = str(np.random.get_state()), torch.get_rng_state()
    for left, right in zip(
        measure_separability(z, seed=9),
        measure_separability(torch.as_tensor(z), seed=9),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(disentangle(z, seed=9), disentangle(z, seed=9))
    assert str(np.random.get_state()) == before and torch.equal(torch.get_rng_state(), before_torch)


# ---- the judgement, from numbers alone -----------------------------------------------------------

SOUND = Separability(
    non_gaussianity=np.full(3, 0.06),
    non_gaussianity_interval=np.tile([0.05, 0.07], (3, 1)),
    noise_level=0.01,
    dependence=0.1,
    dependent=(0, 2),
    dependence_level=0.15,
    agreement=np.array([0.99, 0.97, 0.99]),
    stability=0.97,
    stability_interval=(0.96, 0.99),
)
GAUSSIAN, UNCERTAIN, CLEAR = [0.0, 0.02], [0.005, 0.1], [0.05, 0.07]


@pytest.mark.parametrize(
    ("changes", "status", "why"),
    [
        (
            {},
            "holds",
            r"correlation is 0\.10, and chance gives up to 0\.15\. At most one component is Gaussian",
        ),
        (
            {"stability_interval": (0.94, 0.99)},
            "undecided",
            "Component 1 changes with the tasks .* by 0.94 only",
        ),
        ({"non_gaussianity_interval": np.array([CLEAR, GAUSSIAN, CLEAR])}, "holds", "At most one"),
        (
            {"non_gaussianity_interval": np.array([GAUSSIAN, CLEAR, GAUSSIAN])},
            "undecided",
            "Components 0 and 2 cannot be told from Gaussian components",
        ),
        (
            {
                "non_gaussianity_interval": np.array([GAUSSIAN, CLEAR, GAUSSIAN]),
                "stability_interval": (0.7, 0.9),
            },
            "fails",
            "Components 0 and 2 look Gaussian over tasks: any rotation of them fits as well",
        ),
        (
            {
                "non_gaussianity_interval": np.array([GAUSSIAN, UNCERTAIN, UNCERTAIN]),
                "stability_interval": (0.7, 0.9),
            },
            "undecided",
            "Components 0, 1 and 2 cannot be told",
        ),
        ({"dependence": 0.2}, "undecided", "Components 0 and 2 depend on each other"),
        ({"dependence": 0.3}, "fails", "Components 0 and 2 depend on each other"),
        ({"dependence": 0.05, "dependence_level": 0.03}, "holds", "hardly depend"),
        (
            {"dependence": 0.3, "dependence_level": 0.4, "stability_interval": (0.5, 1.0)},
            "undecided",
            "below 0.40 cannot be seen with so few tasks. Component 1 changes",
        ),
    ],
)
def test_a_yes_needs_all_conditions_and_a_no_needs_evidence(
    changes: dict[str, Any], status: str, why: str
) -> None:
    check = judge_separability(SOUND._replace(**changes))
    assert check.condition == "separability" and check.status == status, check
    assert bool(check.remedy) == (status != "holds")
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(check.why)


# ---- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [disentangle, measure_separability])
def test_unusable_latents_are_named(score: Callable[[Tensor], object]) -> None:
    z = uniform(50, 3)
    constant, broken = z.clone(), z.clone()
    constant[:, 1], broken[4, 2] = 0.5, torch.nan
    for unusable, message in (
        (
            constant,
            r"every component of latents to vary over tasks; got component \[1\] constant over 50 tasks",
        ),
        (broken, r"finite latents; got nan in task 4, component 2"),
        (z[:8], "expected at least 9 tasks in latents for 3 components; got 8 tasks"),
        (z[:, 0], r"latents of shape \(tasks, components\); got shape \(50,\)"),
        (
            torch.cat([z, z.sum(1, keepdim=True)], 1),
            "expected 4 linearly independent components; got rank 3",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            score(unusable)


@pytest.mark.parametrize("unit", [1e-300, 1e160, 1e307])
@pytest.mark.parametrize("components", [None, 2])
def test_units_do_not_matter_from_the_smallest_number_to_the_largest(
    unit: float, components: int | None
) -> None:
    z, _ = mixed("uniform", 200, 3, seed=0)
    expected = disentangle(z, components=components)
    np.testing.assert_allclose(disentangle(unit * z, components=components), expected, rtol=1e-6)


def test_a_number_of_components_that_is_not_whole_is_refused(without_jaxtyping: None) -> None:
    with pytest.raises(TypeError, match="components as a whole number from 1 to 3; got 1.5"):
        disentangle(uniform(50, 3), components=1.5)  # type: ignore[arg-type]
