"""Errors against the Cramér-Rao bound: least squares reach it, noisy readings don't, and a blind program has none."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from toys import NOISE, SEPARATE, TIMES, Line, features, make_tasks

import pyro_hybrid as ph
from pyro_hybrid.beliefs.families import LogNormal, Normal
from pyro_hybrid.identifiability.efficiency import Efficiency, judge_efficiency, measure_efficiency
from pyro_hybrid.identifiability.task_beliefs import TaskBeliefs

TASKS, SHOTS = 150, 8
DESIGN = features(TIMES) - features(TIMES[:1])
MODEL = Line().double()


def least_squares(
    tasks: ph.Tasks, noise: float = NOISE, spoil: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> TaskBeliefs:
    """What two halves of the shots say with a flat prior; spoilt by noise of so many standard deviations."""
    halves = tasks.shots(slice(0, SHOTS // 2)), tasks.shots(slice(SHOTS // 2, None))
    parts: list[tuple[Tensor, Tensor]] = []
    for half in halves:
        grown = (half.values - half.initial.unsqueeze(-2)).squeeze(-1)
        weight = half.scored.squeeze(-1).double() / noise**2
        precision = torch.einsum("tsn,ni,nj->tij", weight, DESIGN, DESIGN)
        mean = torch.linalg.solve(precision, torch.einsum("tsn,ni,tsn->ti", weight, DESIGN, grown))
        scale = torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1).sqrt()
        parts.append((mean + torch.tensor(spoil) * scale * torch.randn_like(mean), scale))
    mean, scale = (torch.stack(part) for part in zip(*parts, strict=True))
    natural = {
        "slope": Normal(1).from_gaussian(mean[..., :1], scale[..., :1]),
        "bend": Normal(2).from_gaussian(mean[..., 1:], scale[..., 1:]),
    }
    return TaskBeliefs(SEPARATE, natural, num_support=SHOTS // 2)


def data(noise: float = NOISE, mask: Tensor | None = None, tasks: int = TASKS) -> ph.Tasks:
    return make_tasks(tasks, SHOTS, num_support=SHOTS // 2, noise=noise, mask=mask)


def interval(found: Efficiency) -> tuple[Tensor, Tensor]:
    return found.ratios.quantile(0.025, 0), found.ratios.quantile(0.975, 0)


# ---- what reaches the bound ----------------------------------------------------------------------


def test_the_bound_is_that_of_least_squares() -> None:
    tasks = data()
    found = measure_efficiency(MODEL, tasks, least_squares(tasks))
    expected = torch.linalg.inv(4 * DESIGN.mT @ DESIGN / NOISE**2).diagonal()
    assert_close(found.bound, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("known", [False, True])
def test_least_squares_reach_it(known: bool) -> None:
    noise = 0.02  # small beside the differences of systems, so that a regression on estimates has their slope
    tasks, model = data(noise), Line(noise=noise).double()
    found = measure_efficiency(
        model,
        tasks,
        least_squares(tasks, noise),
        true_latents=tasks.true_latents if known else None,
    )
    low, high = interval(found)
    assert found.against == ("truth" if known else "halves")
    assert found.names == ["slope", "bend[0]", "bend[1]"]
    assert (low < 1.0).all() and (high > 1.0).all() and (high - low < 0.8).all()
    check = judge_efficiency(found)
    assert (
        check.status == "holds" and check.value == pytest.approx(1.0, abs=0.35) and not check.remedy
    )


def test_the_error_is_half_the_squared_difference_of_halves() -> None:
    tasks = data()
    beliefs = least_squares(tasks)
    one, other = beliefs.mean
    assert_close(
        measure_efficiency(MODEL, tasks, beliefs).error, (0.5 * (one - other) ** 2).mean(0)
    )


def test_masked_observations_are_missing_from_the_bound_too() -> None:
    mask = torch.ones(TASKS, SHOTS, 6, 1, dtype=torch.bool)
    mask[:, [1, 2, 3, 4, 6, 7], 1:] = False  # of each half a quarter is left
    whole, gaps = (
        measure_efficiency(MODEL, x, least_squares(x)) for x in (data(), data(mask=mask))
    )
    assert_close(gaps.bound, 4.0 * whole.bound, rtol=1e-5, atol=0.0)
    low, high = interval(gaps)
    assert (low < 1.0).all() and (high > 1.0).all() and (high - low < 0.8).all()


def test_the_truth_may_come_in_other_units_and_mixed() -> None:
    noise, turn = (
        0.02,
        torch.tensor([[300.0, 1.0, 0.0], [0.0, 0.01, 1.0], [100.0, 0.0, 2.0]]).double(),
    )
    tasks, model = data(noise), Line(noise=noise).double()
    mixed = torch.cat(list((tasks.true_latents or {}).values()), -1) @ turn + 7.0
    found = measure_efficiency(
        model, tasks, least_squares(tasks, noise), true_latents={"other": mixed}
    )
    low, high = interval(found)
    assert found.names == ["other[0]", "other[1]", "other[2]"]
    assert (low < 1.0).all() and (high > 1.0).all()
    covariance = torch.linalg.inv(4 * DESIGN.mT @ DESIGN / noise**2)
    assert_close(found.bound, (turn.mT @ covariance @ turn).diagonal(), rtol=0.1, atol=0.0)


def test_of_a_positive_latent_the_bound_is_mapped_to_its_own_units() -> None:
    """x = z t with log z known to ±1%: the bound of z is z² times that of log z."""
    random, noise, clock = (
        torch.Generator().manual_seed(0),
        0.01,
        torch.linspace(0.5, 1.0, 6, dtype=torch.float64),
    )
    z = torch.exp(0.5 * torch.randn(TASKS, 1, generator=random, dtype=torch.float64))
    clean = z.view(-1, 1, 1, 1) * clock.view(-1, 1)
    values = clean + noise * torch.randn(TASKS, 2, 6, 1, generator=random, dtype=torch.float64)
    start = torch.zeros(TASKS, 2, 1, dtype=torch.float64)
    tasks = ph.Tasks.from_trajectories(clock, values, num_support=1, initial=start)

    def program(episode: ph.Episode) -> None:
        with episode.plate:
            prior = dist.LogNormal(torch.zeros(TASKS, 1).double(), 1.0).to_event(1)
            rate = pyro.sample("z", prior)[..., None, None, :]
            mean = rate * episode.query.times.unsqueeze(-1) + torch.zeros(
                TASKS, episode.query.shape[1], 6, 1
            )
            pyro.sample("x", dist.Normal(mean, noise).to_event(3), obs=episode.query.values)

    weight = clock / clock.square().sum()
    estimate = torch.einsum("tsno,n->st", values, weight).unsqueeze(-1)
    natural = {"z": LogNormal(1).from_gaussian(estimate.log(), torch.full_like(estimate, 0.01))}
    found = measure_efficiency(
        program,
        tasks,
        TaskBeliefs({"z": LogNormal(1)}, natural, num_support=1),
        true_latents={"z": z},
    )
    assert float(found.bound) == pytest.approx(noise**2 / float(clock.square().sum()), rel=0.02)
    low, high = interval(found)
    assert low < 1.0 < high and high - low < 0.8


# ---- what doesn't --------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
def test_a_noisy_reading_is_called_inefficient_and_the_latent_named(known: bool) -> None:
    noise = 0.02
    tasks, model = data(noise), Line(noise=noise).double()
    beliefs = least_squares(tasks, noise, spoil=(0.0, 5.0, 0.0))
    found = measure_efficiency(
        model, tasks, beliefs, true_latents=tasks.true_latents if known else None
    )
    check = judge_efficiency(found)
    assert check.status == "fails" and check.value == pytest.approx(26.0, rel=0.35)
    assert int((found.error / found.bound).argmax()) == 1
    assert f"`bend[0]` {check.value:.3g}" in check.why and check.remedy.startswith(
        "Call ph.compute_evidence("
    )
    assert check.why.endswith(
        "(after a linear map to the truth)."
        if known
        else "(from the difference of two halves of each task)."
    )


def test_a_moderately_noisy_reading_of_some_systems_is_left_open() -> None:
    tasks = data()
    check = judge_efficiency(
        measure_efficiency(MODEL, tasks, least_squares(tasks, spoil=(2.3, 0.0, 0.0)))
    )
    assert check.status == "undecided" and 4.0 < check.value < 10.0


def test_what_both_halves_have_in_common_is_seen_against_the_truth_alone() -> None:
    noise = 0.02
    tasks, model = data(noise), Line(noise=noise).double()
    beliefs = least_squares(tasks, noise)
    shift = 0.2 * torch.randn(
        TASKS, 1, 1, dtype=torch.float64
    )  # wrong by as much in every support of a task
    mean, scale = beliefs.mean, beliefs.sd
    beliefs = beliefs._replace(
        natural=beliefs.natural
        | {
            "slope": Normal(1).from_gaussian(
                mean[..., :1] + shift[:, 0], scale[..., :1].contiguous()
            )
        }
    )
    assert judge_efficiency(measure_efficiency(model, tasks, beliefs)).status == "holds"
    assert (
        judge_efficiency(
            measure_efficiency(model, tasks, beliefs, true_latents=tasks.true_latents)
        ).status
        == "fails"
    )


def test_a_reading_of_nothing_but_noise_is_not_saved_by_the_regression() -> None:
    noise = 0.02
    tasks, model = data(noise), Line(noise=noise).double()
    beliefs = least_squares(tasks, noise)
    order = torch.randperm(TASKS, generator=torch.Generator().manual_seed(1))
    shuffled = {name: value[order] for name, value in (tasks.true_latents or {}).items()}
    assert (
        judge_efficiency(measure_efficiency(model, tasks, beliefs, true_latents=shuffled)).status
        == "fails"
    )


# ---- what can't be known -------------------------------------------------------------------------


def program(states: Callable[[Tensor, Tensor], Tensor]) -> Callable[[ph.Episode], None]:
    def model(episode: ph.Episode) -> None:
        tasks, shots = episode.query.shape
        with episode.plate:
            z = pyro.sample("z", dist.Normal(torch.zeros(tasks, 2).double(), 1.0).to_event(1))[
                ..., None, None, :
            ]
            mean = states(z, episode.query.times.unsqueeze(-1)) + torch.zeros(
                tasks, shots, len(episode.query.times), 1
            )
            pyro.sample("x", dist.Normal(mean, 0.1).to_event(3), obs=episode.query.values)

    return model


@pytest.mark.parametrize(
    "states",
    [
        lambda z, t: z[..., :1] * t,
        lambda z, t: z.sum(-1, keepdim=True) * t,
        lambda z, t: 0.0 * z[..., :1] * t,
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_where_a_direction_is_not_seen_there_is_no_bound_to_compare_with(
    states: Callable[[Tensor, Tensor], Tensor], known: bool
) -> None:
    tasks = data(tasks=20)
    mean = torch.randn(2, 20, 2, dtype=torch.float64)
    beliefs = TaskBeliefs(
        {"z": Normal(2)}, {"z": Normal(2).from_gaussian(mean, torch.ones_like(mean))}, num_support=4
    )
    truth = {"z": mean[0]} if known else None
    check = judge_efficiency(
        measure_efficiency(program(states), tasks, beliefs, true_latents=truth)
    )
    assert (
        check.status == "not checked"
        and math.isnan(check.value)
        and "say nothing about a direction of the latents" in check.why
    )


def test_without_truth_one_support_of_each_task_is_refused() -> None:
    tasks = data()
    beliefs = least_squares(tasks)
    one = beliefs._replace(natural={name: value[:1] for name, value in beliefs.natural.items()})
    assert measure_efficiency(MODEL, tasks, one, true_latents=tasks.true_latents).against == "truth"
    with pytest.raises(
        ValueError,
        match="expected two supports or more of each task, or the true latents; got one support",
    ):
        measure_efficiency(MODEL, tasks, one)


def test_global_random_numbers_are_left_alone_and_the_seed_decides() -> None:
    tasks = data(tasks=20)
    beliefs, before = least_squares(tasks), torch.get_rng_state()
    one, again, other = (
        measure_efficiency(MODEL, tasks, beliefs, seed=seed).ratios for seed in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())
