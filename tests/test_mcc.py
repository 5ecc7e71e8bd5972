"""Scores against closed forms: what is recovered scores 1, what is mixed says so, noise scores near 0."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_hybrid.identifiability import disentangle, mcc
from pyro_hybrid.identifiability.mcc import _matrix

module = importlib.import_module("pyro_hybrid.identifiability.mcc")

SOURCES = {
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "lognormal": lambda rng, shape: np.exp(0.5 * rng.normal(size=shape)),
    "bimodal": lambda rng, shape: rng.choice([-1.0, 1.0], shape) + 0.3 * rng.normal(size=shape),
}


def uniform(tasks: int, components: int, seed: int = 0) -> Tensor:
    return torch.rand(tasks, components, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(angle: float) -> Tensor:
    c, s = np.cos(angle), np.sin(angle)
    return torch.tensor([[c, -s], [s, c]])


def mixed(kind: str, tasks: int, components: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sources = SOURCES[kind](rng, (tasks, components))
    return sources @ rng.normal(size=(components, components)) + rng.normal(size=components), sources


def test_permuted_scaled_and_shifted_truth_scores_one_everywhere() -> None:
    truth = uniform(200, 3)
    score = mcc(truth[:, [2, 0, 1]] * torch.tensor([3.0, -0.1, 1e4]) + 7.0, truth)
    assert score.strong == pytest.approx(1.0) and score.weak == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(score.linear_r, 1.0)
    np.testing.assert_array_equal(score.assignment, [1, 2, 0])


def test_rotation_lowers_strong_to_its_cosine_and_leaves_weak_and_linear_at_one() -> None:
    truth = uniform(4000, 2)
    score = mcc(truth @ rotation(np.pi / 6), truth)
    assert score.strong == pytest.approx(np.cos(np.pi / 6), abs=0.02)
    assert score.weak == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(score.linear_r, 1.0)


def test_independent_noise_scores_near_zero() -> None:
    score = mcc(uniform(2000, 4, seed=1), uniform(2000, 4, seed=2))
    assert score.strong < 0.05 and score.weak < 0.06
    assert score.linear_r.max() < 0.06


def test_many_irrelevant_estimates_do_not_buy_weak_or_linear_score() -> None:
    score = mcc(uniform(100, 40, seed=1), uniform(100, 2, seed=2))
    assert score.weak < 0.3 and score.linear_r.max() < 0.3


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
def test_linear_r_is_the_correlation_that_noise_leaves(ratio: float) -> None:
    signal, noise = uniform(20000, 2, seed=3), uniform(20000, 2, seed=4)
    score = mcc(signal, signal + np.sqrt(ratio) * noise)
    expected = 1 / np.sqrt(1 + ratio)
    np.testing.assert_allclose(score.linear_r, expected, atol=0.02)
    np.testing.assert_allclose(score.matched, expected, atol=0.02)
    assert score.weak == pytest.approx(expected, abs=0.02)


def test_spearman_forgives_a_monotone_map_that_pearson_sees() -> None:
    truth = uniform(300, 3)
    warped = torch.exp(8 * truth)[:, [1, 2, 0]]
    assert mcc(warped, truth, method="spearman").strong == pytest.approx(1.0)
    assert mcc(warped, truth).strong < 0.9


def test_more_estimates_than_truth_uses_each_true_component_once() -> None:
    truth = uniform(300, 2)
    score = mcc(torch.cat([uniform(300, 3, seed=5), truth], dim=1), truth)
    np.testing.assert_array_equal(score.assignment, [3, 4])
    assert score.strong == pytest.approx(1.0) and score.weak == pytest.approx(1.0, abs=1e-3)
    assert score.matched.shape == score.linear_r.shape == (2,)


def test_a_true_component_that_no_estimate_can_partner_counts_as_zero() -> None:
    truth = uniform(2000, 2)
    score = mcc(truth[:, [1]], truth)
    np.testing.assert_array_equal(score.assignment, [-1, 0])
    np.testing.assert_allclose(score.matched, [0.0, 1.0])
    assert score.strong == pytest.approx(0.5) and score.weak == pytest.approx(0.5, abs=1e-3)
    assert score.linear_r[0] < 0.1 and score.linear_r[1] == pytest.approx(1.0)


def test_a_duplicated_estimate_changes_neither_weak_nor_linear_score() -> None:
    truth = uniform(300, 2)
    score = mcc(torch.cat([truth, truth], dim=1), truth)
    assert score.weak == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(score.linear_r, 1.0)


def test_tensors_and_arrays_score_alike_and_repeatedly() -> None:
    estimate, truth = uniform(100, 3, seed=6).requires_grad_(), uniform(100, 2, seed=7)
    first, second = mcc(estimate, truth, seed=3), mcc(estimate.detach().numpy(), truth.numpy(), seed=3)
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("components", range(2, 9))
def test_disentangle_recovers_linearly_mixed_uniform_sources(components: int) -> None:
    for seed in range(5):
        z, sources = mixed("uniform", 500, components, seed)
        assert mcc(disentangle(z, seed=seed), sources).strong > 0.98


@pytest.mark.parametrize("kind", sorted(SOURCES))
@pytest.mark.parametrize("components", [2, 5])
def test_disentangle_recovers_light_heavy_skewed_and_bimodal_sources(kind: str, components: int) -> None:
    z, sources = mixed(kind, 1000, components, seed=0)
    assert mcc(disentangle(z), sources).strong > 0.98


def test_disentangle_finds_light_and_heavy_tails_in_one_mixture() -> None:
    light, heavy = mixed("uniform", 500, 2, seed=1)[1], mixed("laplace", 500, 2, seed=2)[1]
    sources = np.column_stack([light, heavy])
    assert mcc(disentangle(sources @ np.random.default_rng(3).normal(size=(4, 4))), sources).strong > 0.98


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


def test_scores_and_components_repeat_and_leave_the_global_random_state_alone() -> None:
    z, sources = mixed("uniform", 200, 4, seed=5)
    before, before_torch = str(np.random.get_state()), torch.get_rng_state()
    np.testing.assert_array_equal(disentangle(z, seed=9), disentangle(z, seed=9))
    assert mcc(z, sources, seed=9).weak == mcc(z, sources, seed=9).weak
    assert str(np.random.get_state()) == before
    assert torch.equal(torch.get_rng_state(), before_torch)


def test_disentangle_warns_in_its_own_words_when_no_run_converges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ITERATIONS", 1)
    with pytest.warns(RuntimeWarning, match="expected ICA to converge; got 10 runs"):
        disentangle(uniform(200, 4))


def test_disentangle_refuses_redundant_components() -> None:
    z = uniform(200, 2)
    with pytest.raises(ValueError, match="expected 3 linearly independent components; got rank 2"):
        disentangle(torch.cat([z, z.sum(1, keepdim=True)], dim=1))


def test_disentangle_refuses_a_fit_of_other_width() -> None:
    with pytest.raises(ValueError, match="fit with as many components as latents; got 2 and 3"):
        disentangle(uniform(50, 3), fit=uniform(50, 2))


@pytest.mark.parametrize("score", [lambda z: mcc(z, uniform(len(z), 2)), disentangle], ids=["mcc", "disentangle"])
def test_unusable_latents_are_named(score: Callable[[Tensor], object]) -> None:
    z = uniform(50, 3)
    constant, broken, rounding = z.clone(), z.clone(), z.float()
    constant[:, 1], broken[4, 2], rounding[:, 0] = 0.5, torch.nan, 1.0
    rounding[::2, 0] += 1.2e-7
    for unusable, message in (
        (constant, r"to vary over tasks; got component \[1\] constant over 50 tasks"),
        (rounding, r"component \[0\] constant"),
        (broken, r"got nan in task 4, component 2 \(1 such entries\)"),
        (z[:8], "expected at least 9 tasks in .* for 3 components; got 8 tasks"),
        (z[:, 0], r"of shape \(tasks, components\); got shape \(50,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            score(unusable)


def test_rows_that_are_not_the_same_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="one row a task in both estimate and truth; got 50 and 49 rows"):
        mcc(uniform(50, 2), uniform(49, 2))


def test_lists_and_unknown_methods_are_refused() -> None:
    with pytest.raises(TypeError, match="estimate to be a torch tensor or a numpy array; got list"):
        _matrix("estimate", [[1.0]])
    with pytest.raises(Exception, match="spearman"):  # beartype's own, where it checks the package
        mcc(uniform(50, 2), uniform(50, 2), method="kendall")  # type: ignore[arg-type]
