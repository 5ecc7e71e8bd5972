"""The theorem's premise: errors of the exact posterior in closed form, and claims of too little noise and too much."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from toys import NOISE, TIMES, TOGETHER, Line, alone, features, make_tasks, with_query

import pyro_hybrid as ph
from pyro_hybrid.identifiability.fit import Misfit, judge_misfit, measure_misfit
from pyro_hybrid.scores.check import Check

DESIGN = features(TIMES) - features(TIMES[:1])
MODEL = Line(sites=TOGETHER).double()
EPISODE = make_tasks(30, 8, num_support=4).episode()


class Exact(NamedTuple):
    """The posterior of all latents, by task."""

    mean: Tensor
    covariance: Tensor


def posterior(episode: ph.Episode, noise: float = NOISE) -> Exact:
    """From support and query together, by the normal equations."""
    assert episode.support is not None
    sides = episode.support, episode.query
    grown = torch.cat([side.values - side.initial.unsqueeze(-2) for side in sides], 1).squeeze(-1)
    weight = torch.cat([side.scored for side in sides], 1).squeeze(-1).double() / noise**2
    precision = torch.eye(3).double() + torch.einsum("tsn,ni,nj->tij", weight, DESIGN, DESIGN)
    pull = torch.einsum("tsn,ni,tsn->ti", weight, DESIGN, grown)
    return Exact(torch.linalg.solve(precision, pull), torch.linalg.inv(precision))


def drawing(found: Exact) -> Callable[[ph.Episode], None]:
    """A guide that is that posterior, correlations included."""
    guide = dist.MultivariateNormal(found.mean, found.covariance)

    def program(episode: ph.Episode) -> None:
        with episode.plate:
            pyro.sample("both", guide)

    return program


def judged(claimed: float, episode: ph.Episode = EPISODE) -> Check:
    """Of a program that claims this noise, and its exact posterior."""
    model = Line(sites=TOGETHER, noise=claimed).double()
    return judge_misfit(measure_misfit(model, drawing(posterior(episode, claimed)), episode))


def test_errors_at_the_middle_of_the_exact_posterior_are_as_in_closed_form() -> None:
    found = posterior(EPISODE)
    values = (EPISODE.query.values - EPISODE.query.initial.unsqueeze(-2))[:, :, 1:, 0]
    away = values - (found.mean @ DESIGN[1:].mT).unsqueeze(1)
    expected = away.square().sum((1, 2)) / (4 * 5) / NOISE**2
    measured = measure_misfit(MODEL, drawing(found), EPISODE, num_samples=4000).error
    assert_close(measured, expected, rtol=0.02, atol=0.0)
    assert measured.dtype == torch.float64 and measured.mean() == pytest.approx(1.0, abs=0.1)


def test_the_exact_model_holds() -> None:
    check = judged(NOISE)
    assert (
        check.status == "holds" and check.value == pytest.approx(1.0, abs=0.15) and not check.remedy
    )
    assert check.interval[0] <= check.value <= check.interval[1]
    assert (
        "times the noise that the program claims" in check.why
        and "in the worst of 30 systems" in check.why
    )


def test_the_library_s_own_guide_does_as_well() -> None:
    model = Line(ph.GaussNewton(10), sites=TOGETHER).double()
    guide = ph.AmortizedGuide(model, ph.GaussNewton(10)).double()
    assert judge_misfit(measure_misfit(model, guide, EPISODE)).value == pytest.approx(1.0, abs=0.15)


def test_latents_that_trade_off_against_each_other_do_not_count_against_a_factorised_guide() -> (
    None
):
    """Slope and bend are correlated by -0.99: independent draws of them would miss by twice the noise."""
    model = Line(ph.GaussNewton(10)).double()
    guide = ph.AmortizedGuide(model, ph.GaussNewton(10)).double()
    check = judge_misfit(measure_misfit(model, guide, make_tasks(40, 8, num_support=4).episode()))
    assert check.status == "holds" and check.value < 1.5


def test_a_noise_that_is_too_small_fails() -> None:
    check = judged(0.1)
    assert check.status == "fails" and check.value == pytest.approx(3.0, abs=0.4)
    assert check.remedy.startswith("Train longer, or let the neural term express what is missing")


def test_a_noise_that_is_too_large_is_to_be_learned() -> None:
    check = judged(1.2)
    assert (
        check.status != "holds" and check.value > 2.0 and check.remedy.startswith("Learn the noise")
    )


def test_what_the_program_cannot_express_fails() -> None:
    query = EPISODE.query.values + torch.sin(9.0 * TIMES).view(-1, 1)
    bent = with_query(EPISODE, values=query)
    assert judged(NOISE, bent).status == "fails"


def test_near_the_threshold_it_stays_open() -> None:
    error = torch.linspace(1.0, 8.0, 9, dtype=torch.float64)
    check = judge_misfit(Misfit(error))
    assert check.status == "undecided" and check.interval[0] < 2.0 < check.interval[1]


def test_the_typical_task_counts_not_the_worst() -> None:
    error = torch.ones(50, dtype=torch.float64)
    error[7] = 1e6
    check = judge_misfit(Misfit(error))
    assert check.status == "holds" and "1e+03 times in the worst of 50 systems" in check.why


@pytest.mark.parametrize(
    ("error", "factor"), [(9.0, 3.0), (1 / 9.0, 3.0), (1.0, 1.0), (0.0, 1e12), (math.inf, 1e12)]
)
def test_too_large_and_too_small_are_told_by_the_same_factor(error: float, factor: float) -> None:
    assert judge_misfit(
        Misfit(torch.full((20,), error, dtype=torch.float64))
    ).value == pytest.approx(factor)


def test_masked_observations_do_not_count_whatever_their_values() -> None:
    mask = torch.rand(30, 8, 6, 1, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, :, 0] = True
    episode = make_tasks(30, 8, num_support=4, mask=mask).episode()
    query = episode.query
    wild = with_query(episode, values=query.values.where(query.scored | query.observed, torch.nan))
    found = drawing(posterior(episode))
    pyro.set_rng_seed(0)
    clean = measure_misfit(MODEL, found, episode).error
    pyro.set_rng_seed(0)
    assert torch.equal(measure_misfit(MODEL, found, wild).error, clean)
    assert clean.mean() == pytest.approx(1.0, abs=0.15)


def test_a_task_of_which_nothing_is_observed_is_left_out() -> None:
    mask = EPISODE.query.scored.clone()
    mask[3] = False
    assert not torch.equal(mask, EPISODE.query.scored)
    found = drawing(posterior(EPISODE))
    pyro.set_rng_seed(0)
    whole = measure_misfit(MODEL, found, EPISODE).error
    pyro.set_rng_seed(0)
    some = measure_misfit(MODEL, found, with_query(EPISODE, scored=mask)).error
    assert_close(some, whole[torch.arange(30) != 3])


def test_where_nothing_is_observed_nothing_is_judged() -> None:
    blind = with_query(EPISODE, scored=torch.zeros_like(EPISODE.query.scored))
    check = judge_misfit(measure_misfit(MODEL, drawing(posterior(EPISODE)), blind))
    assert (
        check.status == "not checked"
        and check.why == "No system has observations beside its support."
    )


def test_one_system_is_told_in_the_singular() -> None:
    assert judge_misfit(Misfit(torch.ones(1, dtype=torch.float64))).why.endswith(
        "1 times in the worst of 1 system."
    )


# ---- programs that go wrong, and odd ones --------------------------------------------------------


def growing(
    rate: Tensor,
) -> tuple[Callable[[ph.Episode], None], Callable[[ph.Episode], None], ph.Episode]:
    """y' = z y², from y = 1: infinite before the end where z is above 1; its guide is sure of z."""
    times, start = (
        torch.linspace(0.0, 1.0, 5, dtype=torch.float64),
        torch.ones(len(rate), 2, dtype=torch.float64),
    )

    def guide(episode: ph.Episode) -> None:
        with episode.plate:
            pyro.sample("z", dist.Normal(rate.unsqueeze(-1), 1e-9).to_event(1))

    def model(episode: ph.Episode) -> None:
        with episode.plate:
            z = pyro.sample("z", dist.Normal(torch.zeros_like(rate).unsqueeze(-1), 1.0).to_event(1))
            states = ph.solve(
                lambda t, y: (z * y[0] ** 2,),
                episode.query.initial.unbind(-1),
                episode.query.times,
                substeps=40,
            )
            pyro.sample("x", dist.Normal(states, 0.1).to_event(3), obs=episode.query.values)

    query = 1.0 / (1.0 - rate.clamp(max=0.5).view(-1, 1, 1, 1) * times.view(-1, 1)) + torch.zeros(
        len(rate), 2, 5, 1
    )
    return model, guide, alone(times, query, (start,))


def test_a_program_that_diverges_fails_and_does_not_crash() -> None:
    check = judge_misfit(measure_misfit(*growing(torch.full((6,), 40.0, dtype=torch.float64))))
    assert check.status == "fails" and check.value >= 1e6
    json.dumps(check.to_dict(), allow_nan=False)


def test_a_task_that_diverges_leaves_the_others_alone() -> None:
    error = measure_misfit(*growing(torch.tensor([0.3, 40.0, 0.1], dtype=torch.float64))).error
    assert error[1] > 1e12 and (error[[0, 2]] < 1e-3).all()


def test_a_task_without_a_prediction_is_as_wrong_as_can_be() -> None:
    def model(episode: ph.Episode) -> None:
        with episode.plate:
            z = pyro.sample("z", dist.Normal(torch.zeros(3, 1).double(), 1.0).to_event(1))
            mean = z.sqrt()[..., None, None, :] + torch.zeros(3, 2, 5, 1)
            pyro.sample("x", dist.Normal(mean, 0.1).to_event(3), obs=episode.query.values)

    _, guide, episode = growing(torch.tensor([0.25, -1.0, 0.36], dtype=torch.float64))
    error = measure_misfit(model, guide, episode).error
    assert error[1] > 1e12 and torch.isfinite(error[[0, 2]]).all()


def test_an_observation_that_no_latent_moves_counts_like_any_other() -> None:
    def model(episode: ph.Episode) -> None:
        MODEL(episode)
        with pyro.plate("system", 30, dim=-1):
            fixed = torch.zeros(30, 4, 6, 1, dtype=torch.float64)
            pyro.sample("gauge", dist.Normal(fixed, 0.5).to_event(3), obs=torch.ones_like(fixed))

    found = posterior(EPISODE)
    alone, both = (
        measure_misfit(program, drawing(found), EPISODE, num_samples=500).error
        for program in (MODEL, model)
    )
    assert_close(both, (20 * alone + 24 * 4.0) / 44, rtol=0.05, atol=0.0)


def test_it_leaves_no_random_trace_in_the_judgement() -> None:
    found, before = Misfit(torch.linspace(1.0, 8.0, 9, dtype=torch.float64)), torch.get_rng_state()
    assert judge_misfit(found) == judge_misfit(found) != judge_misfit(found, seed=1)
    assert torch.equal(before, torch.get_rng_state())
