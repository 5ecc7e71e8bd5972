"""Computed evidence against posteriors in closed form, and what must not go wrong on the way."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor
from torch.testing import assert_close
from toys import (
    NOISE,
    SEPARATE,
    START_NOISE,
    TIMES,
    Line,
    alone,
    exact,
    features,
    make_tasks,
    with_query,
)

import pyro_hybrid as ph
from pyro_hybrid.data.segments import to_segments
from pyro_hybrid.evidence.gauss_newton import Belief, Point, Problem, information, observed

# Forward differences in float64 leave about 1e-8 of relative error.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
FIVE = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)


def posterior(model: Line, episode: ph.Episode, iterations: int = 8) -> Belief:
    mean, precision = model.prior.gaussian(None)
    tasks = episode.query.shape[0]
    problem = Problem(
        model, episode, model.prior.sites, mean.expand(tasks, -1), precision.expand(tasks, -1, -1)
    )
    return ph.Linearised(iterations)(problem, problem.mean)


def line(*, inferred: bool = False) -> Line:
    return Line(ph.Linearised(), inferred=inferred).double()


@pytest.mark.parametrize("shots", [1, 2, 7])
@pytest.mark.parametrize("inferred", [False, True])
def test_a_linear_gaussian_program_gives_the_exact_posterior(inferred: bool, shots: int) -> None:
    episode = ph.Episode(
        None, make_tasks(4, shots + 1, num_support=shots, inferred=inferred).episode().support
    )
    belief, truth = posterior(line(inferred=inferred), episode), exact(episode, inferred=inferred)
    assert_close(belief.mean, truth.mean[:, :3], **CLOSE)
    assert_close(belief.covariance, truth.covariance[:, :3, :3], **CLOSE)
    assert_close(belief.precision, torch.linalg.inv(truth.covariance[:, :3, :3]), **CLOSE)
    assert belief.shot_mean.shape == (4, shots, 1 if inferred else 0)


def test_the_latents_of_shots_have_their_exact_marginals_and_conditionals() -> None:
    episode = ph.Episode(None, make_tasks(3, 5, num_support=4, inferred=True).episode().support)
    belief, truth = posterior(line(inferred=True), episode), exact(episode, inferred=True)
    assert_close(belief.shot_mean.squeeze(-1), truth.mean[:, 3:], **CLOSE)
    gain = torch.linalg.solve(belief.shot_precision, belief.coupling)
    marginal = (
        torch.linalg.inv(belief.shot_precision) + gain @ belief.covariance.unsqueeze(1) @ gain.mT
    )
    assert_close(marginal.flatten(1), truth.covariance.diagonal(dim1=-2, dim2=-1)[:, 3:], **CLOSE)
    elsewhere = belief.mean + 1.0
    across, within = truth.covariance[:, 3:, :3], truth.covariance[:, :3, :3]
    moved = truth.mean[:, 3:] + (across @ torch.linalg.inv(within)).sum(-1)
    assert_close(belief.shots_given(elsewhere)[0].squeeze(-1), moved, **CLOSE)


def test_the_starts_are_known_better_than_they_were_measured() -> None:
    episode = ph.Episode(None, make_tasks(3, 5, num_support=4, inferred=True).episode().support)
    belief = posterior(line(inferred=True), episode)
    assert (belief.shot_precision > START_NOISE**-2).all()


@pytest.mark.parametrize("inferred", [False, True])
def test_masked_observations_say_nothing_whatever_their_values(inferred: bool) -> None:
    mask = torch.rand(4, 4, 6, 1, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, :, 0] = True
    episode = ph.Episode(
        None, make_tasks(4, 4, num_support=3, inferred=inferred, mask=mask).episode().support
    )
    model = line(inferred=inferred)
    belief, truth = posterior(model, episode), exact(episode, inferred=inferred)
    assert_close(belief.mean, truth.mean[:, :3], **CLOSE)
    assert_close(belief.covariance, truth.covariance[:, :3, :3], **CLOSE)
    wild = with_query(episode, values=episode.query.values.where(episode.query.scored, 1e6))
    assert all(torch.equal(a, b) for a, b in zip(belief, posterior(model, wild), strict=True))


def test_with_everything_masked_the_posterior_is_the_prior() -> None:
    episode = ph.Episode(None, make_tasks(2, 3, num_support=2).episode().support)
    model = line()
    belief = posterior(model, with_query(episode, scored=torch.zeros_like(episode.query.scored)))
    mean, precision = model.prior.gaussian(None)
    assert torch.equal(belief.mean, mean.expand(2, -1)) and torch.equal(
        belief.precision, precision.expand(2, -1, -1)
    )


def test_evidence_of_two_sets_of_shots_adds_up() -> None:
    episode, model = make_tasks(3, 7).episode(), line()
    both, first = ph.Episode(None, episode.query), ph.Episode(None, episode.support)
    all_of_them = alone(
        both.query.times,
        torch.cat([first.query.values, both.query.values], 1),
        torch.cat([first.query.initial, both.query.initial], 1),
        scored=torch.cat([first.query.scored, both.query.scored], 1),
    )
    prior = model.prior.gaussian(None)[1]
    parts = [posterior(model, e).precision - prior for e in (first, both)]
    assert_close(posterior(model, all_of_them).precision - prior, parts[0] + parts[1], **CLOSE)


def test_every_observation_of_a_segmented_problem_counts_once() -> None:
    pieces = to_segments(make_tasks(2, 4, num_support=3).episode().support, 2)
    assert pieces.shape == (2, 9)
    grown = features(pieces.times) - features(
        pieces.times[:, :1]
    )  # (shot, time, 3), from each segment's own start
    counts = pieces.scored.squeeze(-1).double()
    assert (counts.unflatten(1, (3, 3)).sum((2, 3)) == len(TIMES) - 1).all()
    expected = (
        torch.diag(torch.tensor([0.25, 1.0, 1.0]))
        + torch.einsum("ksi,ksj,tks->tij", grown, grown, counts) / NOISE**2
    )
    assert_close(posterior(line(), ph.Episode(None, pieces)).precision, expected, **CLOSE)


def test_segments_come_first_and_the_whole_trajectories_have_the_last_word() -> None:
    episode = ph.Episode(None, make_tasks(3, 4, num_support=3).episode().support)
    model, truth = line(), exact(episode)
    mean, precision = (x.expand(3, *x.shape) for x in model.prior.gaussian(None))
    belief = ph.Linearised(6, segments=(2, 2, 3))(
        Problem(model, episode, SEPARATE, mean, precision), mean
    )
    assert_close(belief.mean, truth.mean[:, :3], **CLOSE)
    assert_close(belief.covariance, truth.covariance[:, :3, :3], **CLOSE)


def test_a_program_is_run_out_of_sight_of_handlers_outside() -> None:
    episode, model = ph.Episode(None, make_tasks(2, 2).episode().support), line()
    with poutine.trace() as trace, pyro.plate("outside", 7, dim=-3):
        sites, free = observed(model, episode, {})
    assert not set(trace.trace.nodes) & {"slope", "bend", "x"}
    assert list(free) == ["slope", "bend"]
    assert sites[0].mean.shape == episode.query.values.shape
    assert_close(sites[0].scale, torch.full_like(sites[0].scale, NOISE), check_dtype=False)


# ---- a nonlinear program, where steps can go wrong -----------------------------------------------


def oscillation(episode: ph.Episode) -> None:
    """x = sin(rate t): many local optima, and Gauss-Newton steps that overshoot."""
    with episode.plate:
        rate = pyro.sample(
            "rate", dist.LogNormal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1)
        )
        mean = torch.sin(rate[..., None, :] * 5.0 * episode.query.times) * episode.query.initial
        pyro.sample(
            "x", dist.Normal(mean.unsqueeze(-1), 0.05).to_event(3), obs=episode.query.values
        )


def swing(rate: Tensor) -> Problem:
    tasks = len(rate)
    query = torch.sin(rate.view(-1, 1, 1, 1) * 5.0 * FIVE.view(-1, 1)).expand(-1, 2, -1, -1)
    episode = alone(FIVE, query, (torch.ones(tasks, 2, dtype=torch.float64),))
    flat = torch.zeros(tasks, 1, dtype=torch.float64)
    return Problem(
        oscillation,
        episode,
        {"rate": ph.families.LogNormal(1)},
        flat,
        torch.ones(tasks, 1, 1, dtype=torch.float64),
    )


def cost(problem: Problem, task: Tensor) -> Tensor:
    shot = torch.zeros(problem.tasks, problem.episode.query.shape[1], 0, dtype=task.dtype)
    return problem.errors(task[None], shot[None])[0].square().sum((1, 2)) + (
        task - problem.mean
    ).square().sum(-1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.2, 4.0), st.floats(-3.0, 3.0)), min_size=1, max_size=6),
    st.integers(1, 4),
    st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_the_cost_never_ends_higher_than_it_started(
    pairs: list[tuple[float, float]], iterations: int, damping: float
) -> None:
    rate, start = (torch.tensor(x, dtype=torch.float64) for x in zip(*pairs, strict=True))
    problem = swing(rate)
    end = ph.Linearised(iterations, damping=damping)(problem, start.unsqueeze(-1)).mean
    assert (cost(problem, end) <= cost(problem, start.unsqueeze(-1))).all()


def test_from_nearby_it_finds_the_truth_and_its_spread() -> None:
    rate = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    problem = swing(rate)
    belief = ph.Linearised(6)(problem, rate.log().unsqueeze(-1) + 0.05)
    found = problem.values(belief.mean)["rate"]
    assert (found.squeeze(-1) - rate).abs().max() < 0.02
    derivative = (
        rate.view(-1, 1) * 5.0 * FIVE * torch.cos(rate.view(-1, 1) * 5.0 * FIVE)
    )  # by u = log rate
    assert_close(
        belief.precision.flatten(),
        1.0 + 2 * derivative.square().sum(1) / 0.05**2,
        rtol=0.03,
        atol=0.0,
    )


def test_a_step_is_no_longer_than_its_reach() -> None:
    problem = swing(torch.tensor([0.5, 3.0], dtype=torch.float64))
    start = problem.mean
    for reach in (0.01, 0.1):
        moved = ph.Linearised(1, reach=reach)(problem, start).mean - start
        assert (moved.abs() <= reach * (1 + 1e-12)).all() and (moved.abs() > 0).any()


def test_a_latent_of_large_units_is_as_near_as_any_other() -> None:
    # A neural latent has the units that training left it with: what is 70 in some is 0.7 in others.
    def proportional(episode: ph.Episode) -> None:
        with episode.plate:
            z = pyro.sample(
                "z", dist.Normal(torch.zeros(1, dtype=torch.float64), 100.0).to_event(1)
            )
            mean = (z * FIVE)[..., None, :, None]
            pyro.sample("x", dist.Normal(mean, 0.1).to_event(3), obs=episode.query.values)

    query = 70.0 * FIVE.view(1, 1, -1, 1)
    episode, zero = (
        alone(FIVE, query, (torch.zeros(1, 1, dtype=torch.float64),)),
        query.new_zeros(1, 1),
    )
    problem = Problem(
        proportional, episode, {"z": ph.families.Normal(1)}, zero, 1e-4 * query.new_ones(1, 1, 1)
    )
    assert_close(
        ph.Linearised(1, damping=0.0)(problem, zero).mean, zero + 70.0, rtol=1e-4, atol=0.0
    )


def runaway(episode: ph.Episode) -> None:
    """y' = z y²: ends in infinity before the last time where z y(0) is large."""
    with episode.plate:
        z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))

        def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (z * state[0] ** 2,)

        shots = episode.query
        states = ph.solve(field, shots.initial.unbind(-1), shots.times, substeps=20)
        pyro.sample("x", dist.Normal(states, 0.1).to_event(3), obs=shots.values)


def escape(z: list[float]) -> Problem:
    start = torch.ones(len(z), 2, dtype=torch.float64)
    query = 1.0 / (
        1.0
        - torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64).view(-1, 1, 1, 1) * FIVE.view(-1, 1)
    )
    episode = alone(FIVE, query.expand(-1, 2, -1, -1).contiguous(), (start,))
    flat = torch.tensor(z, dtype=torch.float64).unsqueeze(-1)
    return Problem(
        runaway,
        episode,
        {"z": ph.families.Normal(1)},
        flat,
        torch.ones(len(z), 1, 1, dtype=torch.float64),
    )


def test_a_task_that_diverges_stays_put_and_leaves_the_others_alone() -> None:
    fine, wild = escape([0.2, 0.2, 0.2]), escape([9.0, 0.2, 0.2])
    calm, storm = (ph.Linearised(4)(problem, problem.mean) for problem in (fine, wild))
    assert not torch.isfinite(
        wild.errors(wild.mean[None], wild.mean.new_zeros(1, 3, 2, 0))[0, 0]
    ).all()
    assert torch.equal(calm.mean[1:], storm.mean[1:]) and torch.equal(
        calm.precision[1:], storm.precision[1:]
    )
    assert storm.mean[0] == 9.0 and torch.isfinite(storm.precision).all()
    assert (
        calm.mean.flatten() - torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64)
    ).abs().max() < 0.02


def test_a_step_into_divergence_is_taken_back() -> None:
    problem = escape([0.2, 0.2, 0.2])
    start = torch.full((3, 1), 0.99, dtype=torch.float64)  # just short of the pole
    belief = ph.Linearised(12)(problem, start)
    assert torch.isfinite(belief.mean).all() and (belief.mean <= 0.99).all()


# ---- Fisher information --------------------------------------------------------------------------


def line_problem(episode: ph.Episode, *, inferred: bool = False, precision: float = 1.0) -> Problem:
    model, tasks = line(inferred=inferred), episode.query.shape[0]
    weak = precision * torch.eye(3, dtype=torch.float64).expand(tasks, 3, 3)
    return Problem(
        model, episode, model.prior.sites, torch.zeros(tasks, 3, dtype=torch.float64), weak
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inferred", [False, True])
def test_information_is_that_of_least_squares_with_the_starts_eliminated_by_hand(
    inferred: bool, masked: bool
) -> None:
    mask = torch.rand(4, 4, 6, 1, generator=torch.Generator().manual_seed(1)) < (
        0.6 if masked else 2.0
    )
    mask[:, :, 0] = True
    episode = ph.Episode(
        None, make_tasks(4, 4, num_support=3, inferred=inferred, mask=mask).episode().support
    )
    weight = (
        torch.diag_embed(episode.query.scored.squeeze(-1).double()) / NOISE**2
    )  # (task, shot, time, time)
    if inferred:  # the Schur complement of each shot's start
        pull = weight.sum(-1, keepdim=True)
        weight = weight - pull @ pull.mT / (weight.sum((-2, -1), keepdim=True) + START_NOISE**-2)
    design = features(TIMES)
    expected = torch.einsum("ni,tsnm,mj->tij", design, weight, design)
    at = torch.randn(4, 3, dtype=torch.float64)
    assert_close(
        information(line_problem(episode, inferred=inferred), at), expected, atol=1e-6, rtol=1e-6
    )


def test_information_knows_nothing_of_the_prior_nor_of_the_values_observed() -> None:
    episode = ph.Episode(None, make_tasks(3, 4, num_support=3).episode().support)
    at = torch.zeros(3, 3, dtype=torch.float64)
    faint, strong = (information(line_problem(episode, precision=p), at) for p in (1e-9, 1e3))
    assert_close(faint, strong, **CLOSE)
    other = with_query(episode, values=episode.query.values + 3.0)
    assert_close(information(line_problem(other), at), faint, **CLOSE)


def test_information_of_a_nonlinear_program_is_that_of_its_derivative_at_the_point() -> None:
    rate = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).view(-1, 1)
    problem = swing(torch.ones(3, dtype=torch.float64))
    derivative = rate * 5.0 * FIVE * torch.cos(rate * 5.0 * FIVE)  # by u = log rate
    expected = 2 * derivative.square().sum(1) / 0.05**2
    assert_close(information(problem, rate.log()).flatten(), expected, rtol=1e-5, atol=0.0)


def test_latents_of_shots_are_eliminated_at_the_point_that_is_asked_for() -> None:
    def program(episode: ph.Episode) -> None:
        with episode.plate:
            z = pyro.sample(
                "z", dist.Normal(torch.zeros(2, 1, dtype=torch.float64), 1.0).to_event(1)
            )
            gain = pyro.sample(
                "gain", dist.Normal(torch.ones(2, 3, 1, dtype=torch.float64), 1e-6).to_event(2)
            )
            mean = gain.unsqueeze(-1) * z[..., None, None, :] * episode.query.times.unsqueeze(-1)
            pyro.sample("x", dist.Normal(mean, 0.1).to_event(3), obs=episode.query.values)

    episode = alone(FIVE, torch.zeros(2, 3, 5, 1).double(), (torch.zeros(2, 3).double(),))
    one = torch.ones(2, 1, dtype=torch.float64)
    problem = Problem(program, episode, {"z": ph.families.Normal(1)}, one, one.unsqueeze(-1))
    expected = 3.0 * float(FIVE.square().sum()) / 0.01
    usual, doubled = (
        information(problem, one),
        information(problem, one, torch.full((2, 3, 1), 2.0).double()),
    )
    assert_close(usual.flatten(), torch.full((2,), expected).double(), rtol=1e-5, atol=0.0)
    assert_close(doubled.flatten(), torch.full((2,), 4.0 * expected).double(), rtol=1e-5, atol=0.0)


def test_where_a_program_diverges_there_is_no_information() -> None:
    problem = escape([9.0, 0.2, 0.2])
    found = information(problem, problem.mean)
    assert found[0] == 0.0 and (found[1:] > 0.0).all()


# ---- one descent ---------------------------------------------------------------------------------


def cost_without_prior(problem: Problem, end: Point) -> Tensor:
    errors = problem.errors(end.task[None], end.shot[None])[0].square().sum((1, 2))
    return errors + ((end.shot - problem.shot_mean).square() * problem.shot_weight).sum((1, 2))


@pytest.mark.parametrize("inferred", [False, True])
def test_a_descent_ends_at_the_optimum_with_its_cost(inferred: bool) -> None:
    episode = ph.Episode(None, make_tasks(4, 4, num_support=3, inferred=inferred).episode().support)
    problem = line_problem(episode, inferred=inferred, precision=1e-9)
    start = torch.ones(4, 3, dtype=torch.float64)
    end = ph.Linearised(reach=100.0).descend(problem, start, 8)
    flat = exact(episode, inferred=inferred, scale=(1e4,) * 3)
    assert_close(end.task, flat.mean[:, :3], **CLOSE)
    assert_close(end.cost, cost_without_prior(problem, end), rtol=1e-9, atol=1e-9)
    if inferred:
        assert_close(end.shot.squeeze(-1), flat.mean[:, 3:], **CLOSE)


def test_a_descent_goes_on_where_it_is_told_to_latents_of_shots_included() -> None:
    episode = ph.Episode(None, make_tasks(4, 4, num_support=3, inferred=True).episode().support)
    problem, hunter = line_problem(episode, inferred=True), ph.Linearised(reach=100.0)
    end = hunter.descend(problem, problem.mean, 8)
    again = hunter.descend(problem, end.task, 1, end.shot)
    forgetful = hunter.descend(problem, end.task, 1)
    assert (again.cost <= end.cost).all() and (forgetful.cost >= again.cost).all()
    assert_close(again.shot, end.shot, **CLOSE)


def test_a_descent_judges_its_last_step_and_takes_it_back_where_it_fails() -> None:
    problem = swing(torch.tensor([1.0, 1.0], dtype=torch.float64))
    start = torch.tensor([[0.05], [0.9]], dtype=torch.float64)
    for iterations in (1, 2, 3, 4):
        end = ph.Linearised(damping=0.0).descend(problem, start, iterations)
        assert (end.cost <= cost(problem, start) + 1e-12).all()
        assert_close(end.cost, cost(problem, end.task), rtol=1e-9, atol=1e-9)


def test_tasks_descend_each_for_itself() -> None:
    rate = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    start = rate.log().unsqueeze(-1) + 0.3
    together = ph.Linearised().descend(swing(rate), start, 5)
    alone = [
        ph.Linearised().descend(swing(rate[i : i + 1]), start[i : i + 1], 5).task for i in range(3)
    ]
    assert_close(together.task, torch.cat(alone), rtol=1e-12, atol=1e-12)


# ---- what it refuses -----------------------------------------------------------------------------


def test_a_program_that_observes_nothing_is_refused_with_words() -> None:
    episode = ph.Episode(None, make_tasks(2, 2).episode().support.simulation())
    with pytest.raises(
        ValueError, match=r"expected a program that observes something.*obs=episode\.query"
    ):
        posterior(line(), episode)


@pytest.mark.parametrize("event", [1, 3])
def test_a_latent_of_an_odd_shape_is_refused_by_name(event: int) -> None:
    def program(episode: ph.Episode) -> None:
        with episode.plate:
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            odd = pyro.sample("odd", dist.Normal(torch.zeros([3] * event), 1.0).to_event(event))
            mean = z[..., None, None, :] + odd.sum() + torch.zeros(2, 2, 6, 1)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(3), obs=episode.query.values)

    episode = ph.Episode(None, make_tasks(2, 3, num_support=2).episode().support)
    with pytest.raises(
        ValueError, match=r"latent site 'odd' of shape \(task, shot, component\).*SupportPrior"
    ):
        Problem(
            program, episode, {"z": ph.families.Normal(1)}, torch.zeros(2, 1), torch.ones(2, 1, 1)
        )


def test_no_iteration_at_all_is_refused() -> None:
    with pytest.raises(
        ValueError, match="expected iterations of 1 or more; got 0. Leave evidence=None"
    ):
        ph.Linearised(0)
