"""SetEncoder: any number of shots, in any order, with gaps that say nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import pyro_hybrid as ph
from pyro_hybrid.data.segments import to_segments, truncate

SENSORS, STEPS, FEATURES = 2, 5, 6
TIMES = torch.linspace(0.0, 1.0, STEPS)


def encoder() -> ph.SetEncoder:
    return ph.SetEncoder(SENSORS, STEPS, FEATURES, width=16)


def shots_of(values: Tensor, observed: Tensor | None = None) -> ph.Shots:
    return ph.Shots.from_tensors(TIMES.to(values.dtype), values, observed=observed)


def trajectories(tasks: int, shots: int) -> Tensor:
    return torch.randn(tasks, shots, STEPS, SENSORS)


@pytest.fixture
def without_jaxtyping() -> Iterator[None]:
    """As users run it: shapes and dtypes are checked by the library's own words alone."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("shots", [1, 2, 4, 13, 100])
def test_any_number_of_shots_gives_features_of_the_same_shape(shots: int) -> None:
    features = encoder()(shots_of(trajectories(3, shots)))
    assert features.shape == (3, FEATURES) and features.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(shots=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_shots_changes_no_bit(shots: int, seed: int) -> None:
    torch.manual_seed(seed)
    net, values = encoder(), trajectories(2, shots)
    shuffled = values[:, torch.randperm(shots)]
    assert torch.equal(net(shots_of(values).sorted_shots), net(shots_of(shuffled).sorted_shots))
    assert_close(
        net(shots_of(values)), net(shots_of(shuffled))
    )  # without the canonical order: to rounding


def test_tasks_don_t_look_at_each_other() -> None:
    net, values = encoder(), trajectories(4, 3)
    changed = values.clone()
    changed[2] += 1.0
    before, after = net(shots_of(values)), net(shots_of(changed))
    assert_close(before[[0, 1, 3]], after[[0, 1, 3]])
    assert (before[2] - after[2]).abs().max() > 1e-3


def test_features_of_a_set_are_those_of_the_mean_of_its_shots_and_of_its_size() -> None:
    net, one, other = encoder(), trajectories(1, 1), trajectories(1, 1)
    each = net.shots(shots_of(torch.cat([one, other], 1)))
    assert_close(each, torch.cat([net.shots(shots_of(one)), net.shots(shots_of(other))], 1))
    size = torch.tensor([[2.0]]).log()
    assert_close(
        net(shots_of(torch.cat([one, other], 1))), net.joint(torch.cat([each.mean(1), size], -1))
    )


def test_a_shot_twice_is_not_a_shot_once() -> None:
    net, once = encoder(), trajectories(3, 1)
    assert (net(shots_of(once)) - net(shots_of(once.repeat(1, 2, 1, 1)))).abs().max() > 1e-3


def test_shots_of_which_nothing_was_observed_do_not_count() -> None:
    net, values = encoder(), trajectories(3, 4)
    padded = torch.cat([torch.full((3, 2, STEPS, SENSORS), torch.nan), values], 1)
    expected = net(shots_of(values))
    assert_close(net(shots_of(padded, padded.isfinite())), expected, rtol=0.0, atol=1e-6)
    some_empty = torch.ones_like(values, dtype=torch.bool)
    some_empty[1, 2:] = False
    features = net(shots_of(values, some_empty))
    assert_close(features[[0, 2]], expected[[0, 2]], rtol=0.0, atol=1e-6)
    fewer = net(shots_of(values[1:2, :2]))
    assert_close(features[1:2], fewer, rtol=0.0, atol=1e-6)


def test_a_task_of_which_nothing_was_observed_has_finite_features_and_gradients() -> None:
    net, values = encoder(), trajectories(2, 3)
    seen = torch.ones_like(values, dtype=torch.bool)
    seen[0] = False
    features = net(shots_of(values, seen))
    features.sum().backward()
    assert features.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_what_is_masked_has_no_influence_but_that_it_is_masked_has() -> None:
    net, values = encoder(), trajectories(3, 4)
    seen = torch.rand(values.shape) < 0.7
    noise = torch.where(seen, values, 1e6 * torch.randn(values.shape))
    unknown = torch.where(seen, values, torch.nan)
    features = net(shots_of(values, seen))
    assert torch.equal(net(shots_of(noise, seen)), features) and torch.equal(
        net(shots_of(unknown, seen)), features
    )
    zeros = values.where(seen, net.center)
    assert (net(shots_of(zeros)) - features).abs().max() > 1e-3


def test_a_measured_start_is_read_although_it_counts_as_no_observation() -> None:
    net, values = encoder(), trajectories(3, 4)
    tasks = ph.Tasks.from_trajectories(TIMES, values, num_support=2)
    moved = values.clone()
    moved[:, :, 0] += 1.0
    before, after = (
        net(t.episode().query)
        for t in (tasks, ph.Tasks.from_trajectories(TIMES, moved, num_support=2))
    )
    assert (before - after).abs().amax(1).min() > 1e-4


def test_cut_and_shortened_episodes_are_read_whole() -> None:
    net, values = encoder(), trajectories(3, 4)
    whole = ph.Tasks.from_trajectories(TIMES, values, num_support=2).episode().query
    parts = (to_segments(whole, 2), truncate(whole, 2), to_segments(truncate(whole, 3), 1))
    for part in parts:
        assert part.values.shape != whole.values.shape
        assert torch.equal(net(part), net(whole))
        assert torch.equal(net(part.sorted_shots), net(whole.sorted_shots))


def test_standardizing_makes_the_units_of_sensors_irrelevant() -> None:
    values, unit, zero = trajectories(20, 4), torch.tensor([1e3, 0.01]), torch.tensor([50.0, -3.0])
    net = encoder()
    net.standardize(values, torch.ones_like(values, dtype=torch.bool))
    features = net(shots_of(values))
    net.standardize(unit * values + zero, torch.ones_like(values, dtype=torch.bool))
    assert_close(net(shots_of(unit * values + zero)), features, rtol=0.0, atol=1e-4)


def test_standardizing_takes_mean_and_spread_of_what_was_seen() -> None:
    values = trajectories(20, 4).double()
    seen = torch.rand(values.shape) < 0.5
    net = encoder().double()
    net.standardize(values.where(seen, torch.nan), seen)
    for sensor in range(SENSORS):
        known = values[..., sensor][seen[..., sensor]]
        assert_close(net.center[sensor], known.mean())
        assert_close(net.scale[sensor], known.std(correction=0))


def test_a_sensor_that_never_changes_or_is_never_seen_does_no_harm() -> None:
    values = trajectories(5, 4)
    values[..., 0] = 3.0
    seen = torch.ones(values.shape, dtype=torch.bool)
    seen[..., 1] = False
    net = encoder()
    net.standardize(values, seen)
    assert net.center[0] == 3.0 and (net.scale > 0.0).all()
    assert net(shots_of(values, seen)).isfinite().all()


def test_gradients_reach_every_parameter() -> None:
    net = encoder()
    net(shots_of(trajectories(3, 4))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0.0 for p in net.parameters())


def test_standardization_is_saved_with_the_parameters() -> None:
    one, other, values = encoder(), encoder(), 5.0 + trajectories(5, 4)
    one.standardize(values, torch.ones_like(values, dtype=torch.bool))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(shots_of(values)), other(shots_of(values)))


KIND = (3, 4, STEPS, SENSORS)
BAD = {
    "another number of sensors": (
        torch.zeros(3, 4, STEPS, 3),
        ValueError,
        r"\(time, sensor\) = \(5, 2\); got \(5, 3\). Build the SetEncoder with the numbers of sensors",
    ),
    "another number of steps": (
        torch.zeros(3, 4, 7, 2),
        ValueError,
        r"\(time, sensor\) = \(5, 2\); got \(7, 2\)",
    ),
    "no shots": (
        torch.zeros(KIND)[:, :0],
        ValueError,
        "one shot or more; got an empty set. The support can't",
    ),
    "another dtype": (
        torch.zeros(KIND).double(),
        TypeError,
        r"torch.float32, as the encoder; got torch.float64. Convert the model with model.double\(\)",
    ),
    "integers": (
        torch.zeros(KIND).long(),
        TypeError,
        "torch.float32, as the encoder; got torch.int64. Convert",
    ),
}


@pytest.mark.usefixtures("without_jaxtyping")
@pytest.mark.parametrize("case", BAD)
def test_trajectories_of_another_kind_are_refused_with_words(case: str) -> None:
    values, error, message = BAD[case]
    net = encoder()
    with pytest.raises(error, match=message):
        net(shots_of(values))
    with pytest.raises(error, match=message):
        net.standardize(values, torch.ones_like(values, dtype=torch.bool))
    assert torch.equal(net.center, torch.zeros(SENSORS))  # nothing was changed before the check


def test_nothing_to_read_is_refused_with_words() -> None:
    silent = replace(shots_of(trajectories(3, 4)), values=None)
    with pytest.raises(
        ValueError,
        match="shots with values; got values=None. An encoder reads trajectories",
    ):
        encoder()(silent)


SIZES = {"num_sensors": 2, "num_times": 5, "num_features": 6, "width": 16}


@pytest.mark.usefixtures("without_jaxtyping")
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_sizes_that_make_no_sense_are_refused_with_words(name: str, size: float) -> None:
    with pytest.raises(ValueError, match=f"{name}, an integer of 1 or more; got {size}. Pass"):
        ph.SetEncoder(**SIZES | {name: size})
