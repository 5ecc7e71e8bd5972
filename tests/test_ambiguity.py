"""Two recoveries of the same latents: the same, permuted, mixed, unrelated, or not known well enough to say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_hybrid.scores.ambiguity import Ambiguity, judge_ambiguity, measure_ambiguity
from pyro_hybrid.scores.check import Check


def uniform(tasks: int, components: int, seed: int = 0) -> Tensor:
    """Independent components of mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(seed)
    return math.sqrt(12) * (
        torch.rand(tasks, components, generator=generator, dtype=torch.float64) - 0.5
    )


def rotation(degrees: float) -> Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def found(one: Tensor, other: Tensor) -> tuple[Ambiguity, Check]:
    numbers = measure_ambiguity(one, other)
    return numbers, judge_ambiguity(numbers)


# ---- each kind, where it is known ----------------------------------------------------------------


def test_the_same_latents_twice_are_identical() -> None:
    numbers, check = found(uniform(200, 3), uniform(200, 3))
    assert numbers.kind == "identity" and numbers.identity == numbers.identity_interval[0] == 1.0
    np.testing.assert_allclose(numbers.matrix, np.eye(3), atol=1e-12)
    assert numbers.condition == pytest.approx(1.0)
    assert (
        check.status == "holds"
        and check.why == "The two are the same without any alignment (R at least 1.00)."
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z[:, [1, 2, 0]],
        lambda z: -z,
        lambda z: 3 * z,
        lambda z: z + torch.tensor([0.0, 0.0, 2.0]),
    ],
    ids=["order", "sign", "scale", "offset"],
)
def test_another_order_sign_scale_or_offset_is_a_permutation_both_ways(change) -> None:
    z = uniform(200, 3)
    for one, other in ((z, change(z)), (change(z), z)):
        numbers, check = found(one, other)
        assert numbers.kind == "permutation" and numbers.identity < 0.9, numbers
        assert numbers.strong == pytest.approx(1.0) and numbers.condition == pytest.approx(1.0)
        assert (
            check.status == "holds"
            and "up to order, sign, scale and offset (correlation at least 1.00" in check.why
        )


def test_identity_is_the_same_from_either_side_and_measured_by_what_varies_less() -> None:
    z = uniform(200, 2)
    wide = 1.3 * z
    assert measure_ambiguity(wide, z).identity == pytest.approx(measure_ambiguity(z, wide).identity)
    assert measure_ambiguity(z, wide).identity == pytest.approx(math.sqrt(1 - 0.3**2), abs=0.01)


@pytest.mark.parametrize("degrees", [30, 45])
def test_a_rotation_is_linear_its_strong_score_is_the_cosine_and_its_matrix_the_rotation(
    degrees: float,
) -> None:
    z = uniform(4000, 2)
    numbers, check = found(z @ rotation(degrees).T, z)
    assert numbers.kind == "linear" and numbers.linear == pytest.approx(1.0)
    assert numbers.strong == pytest.approx(math.cos(math.radians(degrees)), abs=0.02)
    np.testing.assert_allclose(numbers.matrix, rotation(degrees), atol=0.03)
    assert numbers.condition == pytest.approx(1.0, abs=0.05)
    assert check.status == "holds" and check.value == numbers.linear
    assert f"but not up to a permutation (strong {numbers.strong:.2f})" in check.why


def test_the_condition_number_is_that_of_the_map_between_standardised_latents() -> None:
    z = uniform(20000, 2)
    numbers, _ = found(100.0 * z @ torch.tensor([[1.0, 0.0], [1.0, 0.001]], dtype=torch.float64), z)
    # rows (1, 1)/sqrt(2) and (0, 1), whatever their sizes
    np.testing.assert_allclose(numbers.matrix, [[0.5**0.5, 0.5**0.5], [0.0, 1.0]], atol=0.02)
    assert numbers.condition == pytest.approx(1 + math.sqrt(2), abs=0.05)


def test_one_mixed_pair_among_many_is_not_hidden_by_the_mean() -> None:
    z = uniform(500, 8)
    turned = z.clone()
    turned[:, :2] = z[:, :2] @ rotation(30)
    numbers, _ = found(turned, z)
    assert numbers.strong > 0.96 and numbers.kind == "linear"
    assert numbers.worst == pytest.approx(math.cos(math.radians(30)), abs=0.03)


def test_independent_latents_have_no_relation() -> None:
    numbers, check = found(uniform(300, 2, seed=1), uniform(300, 2, seed=2))
    assert numbers.kind == "none" and numbers.linear < 0.2
    assert check.status == "fails" and "do not agree up to a linear map" in check.why
    assert check.remedy.startswith("Train both longer")


def test_a_fold_of_one_latent_is_no_linear_map_of_it() -> None:
    z = uniform(300, 2)
    folded = torch.stack([z[:, 0].abs(), z[:, 1]], 1)
    numbers, check = found(folded, z)
    assert numbers.kind == "none" and check.status == "fails"
    assert numbers.one_from_other[1] > 0.99 and numbers.one_from_other[0] < 0.3


def test_a_side_that_lost_a_dimension_fails_although_the_other_explains_it() -> None:
    z = uniform(300, 2)
    lost = torch.stack([z[:, 0], z[:, 0] + 1e-3 * uniform(300, 1, seed=5)[:, 0]], 1)
    numbers, check = found(lost, z)
    assert numbers.one_from_other.min() > 0.99 and numbers.other_from_one.min() < 0.3
    assert check.status == "fails"


# ---- noise, and few tasks ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "status"), [(0.02, "holds"), (0.25, "undecided"), (1.0, "fails")]
)
def test_noise_between_two_recoveries_decides_by_the_correlation_that_it_leaves(
    ratio: float, status: str
) -> None:
    z = uniform(500, 2)
    numbers, check = found((z + math.sqrt(ratio) * uniform(500, 2, seed=1)) @ rotation(40), z)
    low, high = numbers.linear_interval
    assert low < 1 / math.sqrt(1 + ratio) < high + 0.02
    assert check.status == status and numbers.kind == ("linear" if status == "holds" else "none")
    assert ("leave open whether the two agree up to a linear map" in check.why) == (
        status == "undecided"
    )


def test_slight_noise_leaves_identity_and_permutation_what_they_are() -> None:
    z, noise = uniform(300, 3), 0.1 * uniform(300, 3, seed=1)
    assert found(z + noise, z)[0].kind == "identity"
    assert found((z + noise)[:, [2, 1, 0]], z)[0].kind == "permutation"


def test_a_dozen_noisy_tasks_decide_nothing() -> None:
    z = uniform(12, 2)
    numbers, check = found((z + 0.4 * uniform(12, 2, seed=1)) @ rotation(40), z)
    assert check.status == "undecided" and numbers.kind == "none"
    assert numbers.linear_interval[1] - numbers.linear_interval[0] > 0.1


def test_a_permutation_is_linear_even_where_too_few_tasks_are_there_to_fit_a_map() -> None:
    z = uniform(16, 5)
    numbers, check = found((z + 0.15 * uniform(16, 5, seed=2))[:, [4, 1, 2, 3, 0]], z)
    assert numbers.kind == "permutation" and numbers.linear_interval[0] < 0.95
    assert check.status == "holds" and check.value == numbers.worst


# ---- different numbers of latents ----------------------------------------------------------------


def test_what_counts_is_the_smaller_side_from_the_larger_in_either_order() -> None:
    z = uniform(400, 3)
    smaller = z[:, :2] @ rotation(40)
    for one, other in ((z, smaller), (smaller, z)):
        numbers, check = found(one, other)
        assert numbers.kind == "linear" and check.status == "holds"
        assert check.why.endswith(
            "Only the 2 latents of one side are judged, as functions of the 3 of the other."
        )
        assert numbers.matrix.shape == (one.shape[1], other.shape[1]) and numbers.matched.shape == (
            2,
        )
        assert numbers.identity == 0.0
    lost = measure_ambiguity(z, smaller).one_from_other
    assert lost[:2].min() > 0.99 and lost[2] < 0.2


def test_a_side_contained_in_the_other_is_a_permutation_and_one_beyond_it_fails() -> None:
    z = uniform(400, 4)
    assert found(z[:, [2, 0]], z)[0].kind == "permutation"
    beyond, check = found(torch.cat([z[:, :1], uniform(400, 1, seed=7)], 1), z)
    assert beyond.kind == "none" and check.status == "fails"


# ---- repeatable, and its messages ----------------------------------------------------------------


def test_numbers_repeat_for_tensors_and_arrays_and_leave_the_global_random_state_alone() -> None:
    one = uniform(50, 2, seed=1).requires_grad_()
    other = (one + 0.5 * uniform(50, 2, seed=2)).detach()
    before, before_torch = str(np.random.get_state()), torch.get_rng_state()
    first = measure_ambiguity(one, other, seed=3)
    for left, right in zip(
        first, measure_ambiguity(one.detach().numpy(), other.numpy(), seed=3), strict=True
    ):
        np.testing.assert_array_equal(left, right)
    assert measure_ambiguity(one, other, seed=4).linear_interval != first.linear_interval
    assert str(np.random.get_state()) == before and torch.equal(torch.get_rng_state(), before_torch)


def test_unusable_latents_are_named_by_side() -> None:
    z = uniform(50, 2)
    constant = z.clone()
    constant[:, 1] = 0.5
    for one, other, message in (
        (z, z[:49], "one row per task in both one and other; got 50 and 49 rows"),
        (z, constant, r"every component of other to vary over tasks; got component \[1\]"),
        (z[:6], z[:6], "at least 7 tasks in one and other for 2 components; got 6 tasks"),
        (z[:, 0], z, r"one of shape \(tasks, components\); got shape \(50,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_ambiguity(one, other)


@pytest.mark.parametrize("unit", [1e-300, 1e160, 1e307])
def test_units_do_not_matter_from_the_smallest_number_to_the_largest(unit: float) -> None:
    z = uniform(100, 2)
    assert measure_ambiguity(unit * z, unit * z).kind == "identity"
    assert (
        measure_ambiguity(unit * z, z).kind == measure_ambiguity(z, unit * z).kind == "permutation"
    )
    assert measure_ambiguity(unit * z @ rotation(30).T, z).kind == "linear"
