"""Recovering tasks from a heap: the mathematics against closed forms, and a tiny run from end to end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiments import unlabelled
from experiments.grouping import (
    concentration,
    group,
    log_evidence,
    measurement,
    misfit,
    sum_by_group,
)
from experiments.long_recordings import Clocked, cut, with_clock
from experiments.relabelling import Unpaired, dependence, pairs, sets
from experiments.run import Choice, carry_out
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyro_hybrid as ph


def covariances(n: int, d: int) -> Tensor:
    root = 0.3 * torch.randn(n, d, d, dtype=torch.float64)
    return root @ root.mT + 0.05 * torch.eye(d, dtype=torch.float64)


def readings(systems: int, shots: int, extra: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of systems read in several trajectories each, with known errors and a misfit on top."""
    d = len(extra)
    truth = torch.arange(systems).repeat_interleave(shots)
    covariance = 0.002 * covariances(len(truth), d)
    error = MultivariateNormal(torch.zeros(d, dtype=torch.float64), covariance + extra).sample()
    return torch.randn(systems, d, dtype=torch.float64)[truth] + error, covariance, truth


def test_evidence_of_one_measurement_is_its_marginal_density() -> None:
    torch.manual_seed(0)
    location, covariance = torch.randn(5, 3, dtype=torch.float64), covariances(5, 3)
    zero, one = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    marginal = MultivariateNormal(zero, one + covariance).log_prob(location)
    alone = MultivariateNormal(zero, covariance).log_prob(location)
    # What adds up over measurements of one system: the density of the measurement where the latent is zero.
    torch.testing.assert_close(log_evidence(measurement(location, covariance)), marginal - alone)


def test_evidence_of_a_group_is_the_density_of_all_its_members_together() -> None:
    torch.manual_seed(0)
    location, covariance, d = torch.randn(2, 3, dtype=torch.float64), covariances(2, 3), 3
    one = torch.eye(d, dtype=torch.float64)
    joint = torch.block_diag(*covariance) + one.repeat(2, 2)  # both share one latent
    zero = torch.zeros(2 * d, dtype=torch.float64)
    expected = MultivariateNormal(zero, joint).log_prob(location.flatten()) - MultivariateNormal(
        zero, torch.block_diag(*covariance)
    ).log_prob(location.flatten())
    both = sum_by_group(measurement(location, covariance), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(log_evidence(both), expected.unsqueeze(0))


def test_groups_are_found_without_their_number_or_sizes() -> None:
    torch.manual_seed(0)
    location, covariance, truth = readings(60, 6, 1e-4 * torch.eye(4, dtype=torch.float64))
    kept = torch.rand(len(truth)) < 0.7  # of unequal sizes
    labels = group(location[kept], covariance[kept], 1e-4 * torch.eye(4, dtype=torch.float64), 20.0)
    assert unlabelled.grouping_scores(labels, truth[kept])["adjusted_rand"] > 0.97


def test_what_has_no_groups_is_left_alone() -> None:
    torch.manual_seed(0)
    location = torch.randn(200, 5, dtype=torch.float64)
    covariance = 1e-4 * torch.eye(5, dtype=torch.float64).expand(200, 5, 5)
    assert (
        len(group(location, covariance, torch.zeros(5, 5, dtype=torch.float64), 20.0).unique())
        > 195
    )


def test_misfit_is_recovered_from_pairs() -> None:
    torch.manual_seed(0)
    extra = torch.tensor([[0.02, 0.005], [0.005, 0.01]], dtype=torch.float64)
    location, covariance, truth = readings(1000, 8, extra)
    found = misfit(
        location, covariance, truth, torch.eye(2, dtype=torch.float64), num_iterations=200
    )
    torch.testing.assert_close(found, extra, rtol=0.1, atol=1e-3)


def test_misfit_needs_a_pair() -> None:
    one = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="two trajectories in one group"):
        misfit(torch.zeros(3, 2, dtype=torch.float64), one.expand(3, 2, 2), torch.arange(3), one)


def test_concentration_expects_as_many_groups_as_there_are() -> None:
    labels = torch.arange(1000) % 120
    alpha = concentration(labels)
    assert alpha * math.log1p(1000 / alpha) == pytest.approx(120, rel=1e-6)


def test_dependence_tells_a_function_of_the_start_from_independence() -> None:
    torch.manual_seed(0)
    start = torch.rand(400, 2)
    apart = torch.stack([dependence(torch.rand(400, 3), start) for _ in range(20)])
    assert float(dependence(start, start)) == pytest.approx(1.0, abs=1e-5)
    assert abs(float(apart.mean())) < 0.003  # unbiased
    assert (
        float(dependence((start[:, :1] - 0.5).square(), start)) > 0.1
    )  # uncorrelated, and yet dependent


def heap(values: Tensor) -> ph.Tasks:
    twice = ph.Tasks.from_trajectories(torch.arange(4.0), values.repeat(1, 2, 1, 1), num_support=1)
    if values.shape[1] > 1:
        return ph.Tasks.from_trajectories(torch.arange(4.0), values, num_support=1)
    return replace(
        twice,
        values=values,
        observed=twice.observed[:, :1],
        scored=twice.scored[:, :1],
        initial=values[:, :, 0],
        states=values,
    )


def test_pairs_are_two_of_a_group_and_a_loner_with_itself() -> None:
    labels = torch.tensor([0, 1, 0, 2, 0, 1])
    numbers = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 4, 1)
    rows = pairs(heap(numbers), labels).values[:, :, 0, 0].long()
    assert sorted(rows[:, 0].tolist()) == sorted(rows[:, 1].tolist()) == list(range(6))
    assert (labels[rows[:, 0]] == labels[rows[:, 1]]).all()
    assert (rows[:, 0] == rows[:, 1]).tolist() == (labels[rows[:, 0]] == 2).tolist()
    assert len(pairs(heap(numbers), labels, loners=False)) == 5


def test_sets_are_whole_groups_and_leave_loners_out() -> None:
    labels = torch.tensor([0, 1, 0, 2, 0, 1])
    numbers = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 4, 1)
    tasks = sets(heap(numbers), labels, 4)
    counts = tasks.scored[:, :, 1:].all((-1, -2))
    members = [
        row[some].tolist()
        for row, some in zip(tasks.values[:, :, 0, 0].long(), counts, strict=True)
    ]
    assert [set(some) for some in members] == [{0, 2, 4}, {1, 5}] and [
        len(some) for some in members
    ] == [3, 2]
    assert tasks.num_support == 2 and counts.tolist() == [
        [True, True, True, False],
        [True, False, True, False],
    ]
    assert len(sets(heap(numbers), torch.arange(6), 4)) == 6  # nothing found, nothing to leave out


def test_independence_is_held_against_the_program_only_while_training() -> None:
    torch.manual_seed(0)
    system = ph.systems.Pendulum()
    model = Unpaired(system, independence=1.0, **unlabelled.PAIRED.options)
    episode, guide = system.simulate(6, 4, 0).episode(), model.guide()

    def loss() -> float:
        torch.manual_seed(1)
        return float(ph.SVI(model, guide, torch.optim.Adam(guide.parameters())).backward(episode))

    model.train()
    held = loss()
    model.independence = 0.0
    assert held != loss()
    model.eval()
    plain = loss()
    model.independence = 1.0
    assert plain == loss()


def test_pieces_know_what_time_it_is() -> None:
    system = ph.systems.Pendulum()
    system.points = 60
    long = system.simulate(3, 2, 0)
    tasks = cut(long, 3)
    assert tasks.values.shape == (3, 3, 20, 3) and tasks.num_support == 1
    torch.testing.assert_close(tasks.values[:, 1, :, 2], long.times[20:40].expand(3, 20))
    torch.testing.assert_close(tasks.values[:, 2, :, :2], long.values[:, 0, 40:])
    assert not tasks.scored[..., 2].any()


def test_a_piece_moves_on_as_the_whole_did() -> None:
    system, clocked = ph.systems.Pendulum(), Clocked()
    system.noise = (0.0, 0.0)
    system.points = 60
    tasks = cut(system.simulate(3, 2, 0), 3)
    pieces = tasks.shots()
    assert tasks.true_latents is not None and pieces.initial is not None
    latents = {name: value.double() for name, value in tasks.true_latents.items()}
    initial = pieces.initial.double().unbind(-1)
    torch.testing.assert_close(
        clocked.trajectories(latents, initial, tasks.times.double()).float(),
        tasks.values,
        rtol=0.0,
        atol=1e-4,
    )


def test_ordinary_trajectories_begin_at_zero() -> None:
    tasks = with_clock(ph.systems.Pendulum().simulate(3, 4, 0))
    torch.testing.assert_close(tasks.values[..., 2], tasks.times.expand(3, 4, 50))
    assert tasks.num_support == 2 and tasks.scored[..., 1:, :2].all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:expected ICA to converge")
def test_a_tiny_run_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ph.systems.Pendulum, "points", 16)
    monkeypatch.setattr(unlabelled, "FRACTIONS", (1.0, 0.25, 0.0))
    results = carry_out(unlabelled, Choice(seeds=(0,), fast=True, folder=tmp_path))
    assert [one["labelled"] for one in results] == [1.0, 0.25, 0.0, None]
    table = unlabelled.table(results)
    assert len(table.splitlines()) == 2 + 5 and "0% of the systems labelled" in table
    assert len(unlabelled.figure(results).axes) == 3
