"""Scores against closed forms: what is recovered scores 1, what is mixed says so, noise and controls near 0."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from toys import make_tasks

from pyro_hybrid.scores.mcc import mcc


def uniform(tasks: int, components: int, seed: int = 0) -> Tensor:
    return torch.rand(
        tasks, components, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def rotation(angle: float) -> Tensor:
    c, s = np.cos(angle), np.sin(angle)
    return torch.tensor([[c, -s], [s, c]])


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
    assert score.strong == score.score.pearson == pytest.approx(
        0.5
    ) and score.weak == pytest.approx(0.5, abs=1e-3)
    assert score.linear_r[0] < 0.1 and score.linear_r[1] == pytest.approx(1.0)


def test_a_duplicated_estimate_changes_neither_weak_nor_linear_score() -> None:
    truth = uniform(300, 2)
    score = mcc(torch.cat([truth, truth], dim=1), truth)
    assert score.weak == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(score.linear_r, 1.0)


# ---- both correlations ---------------------------------------------------------------------------


def test_both_correlations_are_there_and_method_chooses_strong_alone() -> None:
    truth = uniform(300, 3)
    warped = torch.exp(8 * truth)[:, [1, 2, 0]]
    pearson, spearman = mcc(warped, truth), mcc(warped, truth, method="spearman")
    assert pearson.score.spearman == pytest.approx(1.0) and pearson.score.pearson < 0.9
    assert pearson.strong == pytest.approx(pearson.score.pearson)
    assert spearman.strong == pytest.approx(spearman.score.spearman)
    np.testing.assert_array_equal(np.hstack(pearson.score), np.hstack(spearman.score))


# ---- intervals -----------------------------------------------------------------------------------


def test_intervals_cover_what_all_tasks_would_give_nineteen_times_in_twenty() -> None:
    expected, covered = 1 / np.sqrt(1 + 0.5), []
    for seed in range(100):
        signal, noise = (np.random.default_rng(2 * seed + i).normal(size=(200, 2)) for i in (0, 1))
        score = mcc(signal, signal + np.sqrt(0.5) * noise, seed=seed)
        covered.append((np.hstack(score.low) <= expected) & (expected <= np.hstack(score.high)))
    pearson, spearman, weak, *linear = np.mean(covered, 0)
    assert min(pearson, weak, *linear) >= 0.88
    assert spearman < pearson  # of normals it is smaller: 6/pi arcsin(r/2)


def test_intervals_narrow_with_the_root_of_the_number_of_tasks() -> None:
    def widths(tasks: int) -> np.ndarray:
        signal, noise = uniform(tasks, 2, seed=3), uniform(tasks, 2, seed=4)
        score = mcc(signal, signal + noise)
        return np.hstack(score.high) - np.hstack(score.low)

    np.testing.assert_allclose(
        widths(250) / widths(4000), 4.0, rtol=0.5
    )  # a width from 200 resamples is off by 10%


def test_a_task_drawn_twice_does_not_leak_from_the_fit_into_the_score() -> None:
    score = mcc(uniform(100, 40, seed=1), uniform(100, 2, seed=2))
    assert score.high.weak < 0.4 and score.high.linear_r.max() < 0.3


def test_intervals_of_noise_lie_around_its_score_and_not_above() -> None:
    score = mcc(uniform(300, 1, seed=1), uniform(300, 1, seed=2))
    assert score.low.pearson < 0 < score.score.pearson < 0.05 < score.high.pearson
    middle = (score.low.pearson + score.high.pearson) / 2
    assert middle == pytest.approx(score.score.pearson, abs=0.01)


# ---- controls ------------------------------------------------------------------------------------


def test_the_random_control_is_what_noise_scores_whatever_the_estimate() -> None:
    truth = uniform(300, 3)
    score = mcc(truth, truth)
    assert score.strong == pytest.approx(1.0) and score.random.pearson < 0.12
    assert score.random.weak < 0.1 and score.random.linear_r.max() < 0.1
    drawn = [mcc(uniform(300, 3, seed=seed), truth).strong for seed in range(1, 9)]
    assert score.random.pearson == pytest.approx(np.mean(drawn), abs=0.03)


def test_the_random_control_shows_how_far_chance_gets_with_few_tasks_and_many_estimates() -> None:
    score = mcc(uniform(85, 40, seed=1), uniform(85, 2, seed=2))
    assert score.random.pearson > 0.2  # the best of forty
    assert abs(score.strong - score.random.pearson) < 0.1


def test_principal_components_of_data_that_contain_the_truth_find_it() -> None:
    truth = uniform(300, 2)
    scales = torch.tensor([3.0, 1.0], dtype=torch.float64)
    turned = (truth - 0.5) * scales @ torch.linalg.qr(uniform(10, 10, seed=1))[0][:2]
    control = mcc(uniform(300, 2, seed=3), truth, data=turned).pca
    assert control is not None and control.pearson > 0.99 and control.linear_r.min() > 0.999


def test_principal_components_of_mixed_data_are_linear_in_the_truth_only() -> None:
    truth = uniform(1000, 2)
    control = mcc(
        truth, truth, data=(truth @ rotation(np.pi / 4).double()) * torch.tensor([2.0, 1.0])
    ).pca
    assert control is not None and control.linear_r.min() > 0.999
    assert control.pearson == pytest.approx(np.cos(np.pi / 4), abs=0.03)


def test_principal_components_of_unrelated_data_know_nothing() -> None:
    control = mcc(uniform(500, 2), uniform(500, 2), data=uniform(500, 6, seed=9)).pca
    assert control is not None and control.weak < 0.15 and control.linear_r.max() < 0.1


def test_data_may_have_any_axes_after_the_task_and_fewer_numbers_than_estimates() -> None:
    truth, data = uniform(60, 3), uniform(60, 12, seed=1)
    flat, shaped = (
        mcc(truth, truth, data=data).pca,
        mcc(truth, truth, data=data.view(60, 2, 3, 2).numpy()).pca,
    )
    assert flat is not None and shaped is not None
    np.testing.assert_array_equal(np.hstack(flat), np.hstack(shaped))
    single = mcc(truth, truth, data=truth[:, 0]).pca
    assert (
        single is not None and single.linear_r[0] == pytest.approx(1.0) and single.linear_r[1] < 0.3
    )
    assert single.pearson < 0.5  # one principal component partners one latent of three


# ---- the table, and what is asked of every function ----------------------------------------------


def test_the_score_prints_as_a_table_with_a_column_for_each_control() -> None:
    truth = uniform(100, 2)
    lines = str(mcc(truth, truth, data=truth)).splitlines()
    assert lines[0].split() == ["score", "95%", "interval", "random", "PCA"]
    assert [line[:18].strip() for line in lines[1:]] == [
        "strong (Pearson)", "strong (Spearman)", "weak", "linear R 0", "linear R 1"
    ]  # fmt: skip
    assert (
        lines[1].split()[2:6] == ["1.000", "1.000", "to", "1.000"]
        and len({len(line) for line in lines}) == 1
    )
    assert "PCA" not in str(mcc(truth, truth)) and "random" in str(mcc(truth, truth))


def test_numbers_repeat_for_tensors_and_arrays_and_leave_the_global_random_state_alone() -> None:
    estimate, truth = uniform(100, 3, seed=6).requires_grad_(), uniform(100, 2, seed=7)
    before, before_torch = str(np.random.get_state()), torch.get_rng_state()
    first, second = (
        mcc(estimate, truth, seed=3),
        mcc(estimate.detach().numpy(), truth.numpy(), seed=3),
    )
    assert first.assignment.tolist() == second.assignment.tolist() and str(first) == str(second)
    for name in ("score", "low", "high", "random"):
        np.testing.assert_array_equal(
            np.hstack(getattr(first, name)), np.hstack(getattr(second, name))
        )
    assert mcc(estimate, truth, seed=4).weak != first.weak
    assert str(np.random.get_state()) == before and torch.equal(torch.get_rng_state(), before_torch)


def test_unusable_latents_are_named() -> None:
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
            mcc(unusable, uniform(len(unusable), 2))


def test_data_of_other_tasks_or_without_variation_are_refused() -> None:
    z = uniform(50, 2)
    broken = uniform(50, 4)
    broken[3, 1] = torch.inf
    for data, message in (
        (uniform(49, 4), r"expected data of 50 tasks, those of the estimate; got shape \(49, 4\)"),
        (torch.ones(50, 4), "expected data that vary over tasks; got the same for all"),
        (broken, "expected finite data; got inf in task 3, component 1"),
    ):
        with pytest.raises(ValueError, match=message):
            mcc(z, z, data=data)


def test_rows_that_are_not_the_same_tasks_are_refused() -> None:
    with pytest.raises(
        ValueError, match="one row per task in both estimate and true_latents; got 50 and 49 rows"
    ):
        mcc(uniform(50, 2), uniform(49, 2))


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(Exception, match="spearman"):  # beartype's own, where it checks the package
        mcc(uniform(50, 2), uniform(50, 2), method="kendall")  # type: ignore[arg-type]


# ---- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1e-300, 1e-200, 1e-8, 1e8, 1e160, 1e300, 1e307])
def test_units_do_not_matter_from_the_smallest_number_to_the_largest(unit: float) -> None:
    z = uniform(100, 2)
    noisy = z + 0.1 * uniform(100, 2, seed=1)
    expected = mcc(noisy, z, data=noisy)
    for estimate, true_latents, data in ((unit * noisy, z, noisy), (noisy, unit * z, unit * noisy)):
        score = mcc(estimate, true_latents, data=data)
        for name in ("score", "low", "high", "random", "pca"):
            np.testing.assert_allclose(
                np.hstack(getattr(score, name)), np.hstack(getattr(expected, name)), atol=1e-9
            )


def test_an_offset_of_a_billion_sds_does_not_matter() -> None:
    z = uniform(100, 2)
    assert mcc(z + 1e9, z).strong == pytest.approx(1.0, abs=1e-6)


# ---- wrong objects -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimate", "message"),
    [
        ([[1.0]], r"estimate to be a torch tensor or a numpy array; got list\. Convert it: torch"),
        (pd.DataFrame({"z": [1.0]}), r"got DataFrame\. Convert it: estimate\.to_numpy\(\)"),
        (
            make_tasks(2, 2),
            r'got Tasks\. Pass the latents themselves, such as tasks\.true_latents\["omega"\]',
        ),
        (
            {"z": torch.zeros(3, 1)},
            r"got dict\. Pass one matrix: torch\.cat\(list\(estimate\.values",
        ),
        (torch.zeros(9, 2, dtype=torch.complex64), r"real numbers; got dtype torch\.complex64"),
        (np.array([["a", "b"]] * 9), r"real numbers; got dtype <U1\. Convert the entries"),
        (np.array([[None, 1.0]] * 9), r"real numbers; got dtype object"),
    ],
    ids=["list", "frame", "tasks", "dictionary", "complex", "text", "objects"],
)
def test_wrong_objects_are_answered_with_what_to_pass(
    without_jaxtyping: None, estimate: object, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        mcc(estimate, uniform(9, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=message.replace("estimate", "data")):
        mcc(uniform(9, 2), uniform(9, 2), data=estimate)  # type: ignore[arg-type]


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (0.5, TypeError), (None, TypeError)])
def test_a_seed_is_a_whole_number(without_jaxtyping: None, seed: object, error: type) -> None:
    with pytest.raises(error, match="seed as a whole number of 0 or more; got "):
        mcc(uniform(9, 2), uniform(9, 2), seed=seed)  # type: ignore[arg-type]


def test_precisions_that_numpy_lacks_and_whole_numbers_are_scored() -> None:
    z = uniform(200, 2)
    assert mcc(z.bfloat16(), z).strong > 0.99 and mcc(z.half(), z).strong > 0.99
    assert mcc((1e6 * z).long(), (1e6 * z).long().numpy()).strong == pytest.approx(1.0)
