"""Computed evidence against posteriors in closed form, and what must not go wrong on the way."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

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
    exact,
    features,
    make_tasks,
    without_type_checks,
)

import pyro_hybrid as ph
from pyro_hybrid.beliefs.belief import Belief, Gaussian
from pyro_hybrid.beliefs.families import Beta, Family, Gamma, LogNormal, Normal, VonMises
from pyro_hybrid.data.segments import to_segments
from pyro_hybrid.evidence.least_squares import Iterate, LeastSquares, fisher_information
from pyro_hybrid.programs.run import run_at

# Forward differences in float64 leave about 1e-8 of relative error.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
FIVE = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)


def posterior(model: Line, shots: ph.Shots, num_iterations: int = 8) -> Gaussian:
    """The belief after computed evidence, starting from the population."""
    before = model.prior.population().expand(shots.shape[0])
    after = before + ph.GaussNewton(num_iterations)(before, shots, model)
    return after.gaussian()


def line(*, inferred: bool = False) -> Line:
    return Line(ph.GaussNewton(), inferred=inferred).double()


def support(
    num_tasks: int, num_shots: int, *, inferred: bool = False, mask: Tensor | None = None
) -> ph.Shots:
    tasks = make_tasks(
        num_tasks, num_shots + 1, num_support=num_shots, inferred=inferred, mask=mask
    )
    shots = tasks.episode().support
    assert shots is not None
    return shots


def random_mask(num_tasks: int, num_shots: int, share: float = 0.6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(num_tasks, num_shots, 6, 1, generator=generator) < share
    mask[:, :, 0] = True
    return mask


# ---- linear programs, where it is exact ----------------------------------------------------------


@pytest.mark.parametrize("num_shots", [1, 2, 7])
@pytest.mark.parametrize("inferred", [False, True])
def test_a_linear_gaussian_program_gives_the_exact_posterior(
    inferred: bool, num_shots: int
) -> None:
    shots = support(4, num_shots, inferred=inferred)
    belief = posterior(line(inferred=inferred), shots)
    truth = exact(shots, inferred=inferred)
    marginal = belief.task_marginal
    assert_close(marginal.mean, truth.mean[:, :3], **CLOSE)
    assert_close(marginal.covariance, truth.covariance[:, :3, :3], **CLOSE)
    assert belief.shot_sizes == ({"start": 1} if inferred else None)


def test_latents_of_shots_have_their_exact_marginals_and_conditionals() -> None:
    shots = support(3, 4, inferred=True)
    belief = posterior(line(inferred=True), shots)
    truth = exact(shots, inferred=True)
    marginal = belief.task_marginal
    at_mean = belief.shots_given(marginal.mean)
    assert_close(at_mean.mean.squeeze(-1), truth.mean[:, 3:], **CLOSE)
    across = truth.covariance[:, 3:, :3]
    gain = across @ torch.linalg.inv(truth.covariance[:, :3, :3])
    explained = (gain @ across.mT).diagonal(dim1=-2, dim2=-1)
    variance = truth.covariance.diagonal(dim1=-2, dim2=-1)[:, 3:] - explained
    assert_close(at_mean.covariance[..., 0, 0], variance, **CLOSE)
    elsewhere = belief.shots_given(marginal.mean + 1.0)
    assert_close(elsewhere.mean.squeeze(-1), truth.mean[:, 3:] + gain.sum(-1), **CLOSE)


def test_starts_are_known_better_than_they_were_measured() -> None:
    belief = posterior(line(inferred=True), support(3, 4, inferred=True))
    given_task = belief.shots_given(belief.task_marginal.mean)
    assert (given_task.covariance < START_NOISE**2).all()


@pytest.mark.parametrize("inferred", [False, True])
def test_masked_observations_add_nothing_whatever_their_values(inferred: bool) -> None:
    shots = support(4, 3, inferred=inferred, mask=random_mask(4, 4))
    model = line(inferred=inferred)
    belief = posterior(model, shots)
    truth = exact(shots, inferred=inferred)
    assert_close(belief.task_marginal.mean, truth.mean[:, :3], **CLOSE)
    assert_close(belief.task_marginal.covariance, truth.covariance[:, :3, :3], **CLOSE)
    wild = replace(shots, values=shots.values.where(shots.scored, 1e6))
    other = posterior(model, wild)
    assert torch.equal(belief.task_marginal.information, other.task_marginal.information)
    assert torch.equal(belief.task_marginal.precision, other.task_marginal.precision)


def test_with_every_observation_masked_the_posterior_is_the_prior() -> None:
    shots = support(2, 2)
    model = line()
    belief = posterior(model, replace(shots, scored=torch.zeros_like(shots.scored)))
    before = model.prior.population().expand(2).gaussian()
    assert torch.equal(belief.own.information, before.own.information)
    assert torch.equal(belief.own.precision, before.own.precision)


@pytest.mark.parametrize("inferred", [False, True])
def test_evidence_of_two_sets_of_shots_adds_up(inferred: bool) -> None:
    everything = support(3, 6, inferred=inferred)
    model = line(inferred=inferred)
    prior = model.prior.population().expand(3).gaussian().own

    def evidence(*rows: int) -> Any:
        shots = everything.select_shots(torch.tensor(rows).expand(3, -1))
        return posterior(model, shots).task_marginal - prior

    total = evidence(0, 1, 2, 3, 4, 5)
    parts = evidence(0, 1) + evidence(2, 3, 4, 5)
    assert_close(total.precision, parts.precision, **CLOSE)
    assert_close(total.information, parts.information, **CLOSE)


def test_evidence_added_in_two_steps_is_the_evidence_of_both() -> None:
    everything = support(3, 6)
    model = line()
    first = everything.select_shots(torch.tensor([0, 1]).expand(3, -1))
    second = everything.select_shots(torch.tensor([2, 3, 4, 5]).expand(3, -1))
    half = posterior(model, first)
    whole = half + ph.GaussNewton(8)(half, second, model)
    expected = posterior(model, everything).task_marginal
    assert_close(whole.gaussian().task_marginal.mean, expected.mean, **CLOSE)
    assert_close(whole.gaussian().task_marginal.covariance, expected.covariance, **CLOSE)


def test_every_observation_of_a_segmented_problem_counts_once() -> None:
    pieces = to_segments(support(2, 3), 2)
    assert pieces.shape == (2, 9)
    grown = features(pieces.times) - features(pieces.times[:, :1])  # from each segment's own start
    counts = pieces.scored.squeeze(-1).double()
    assert (counts.unflatten(1, (3, 3)).sum((2, 3)) == len(TIMES) - 1).all()
    information = torch.einsum("ksi,ksj,tks->tij", grown, grown, counts) / NOISE**2
    expected = torch.diag(torch.tensor([0.25, 1.0, 1.0])) + information
    assert_close(posterior(line(), pieces).task_marginal.precision, expected, **CLOSE)


def test_whole_trajectories_are_the_last_stage_after_segments() -> None:
    shots = support(3, 3)
    model = line()
    before = model.prior.population().expand(3)
    evidence = ph.GaussNewton(6, segments=(2, 2, 3))
    belief = (before + evidence(before, shots, model)).gaussian()
    truth = exact(shots)
    assert_close(belief.task_marginal.mean, truth.mean[:, :3], **CLOSE)
    assert_close(belief.task_marginal.covariance, truth.covariance[:, :3, :3], **CLOSE)


def test_evidence_begins_at_a_given_start_if_that_explains_more() -> None:
    shots = support(3, 3)
    model = line()
    before = model.prior.population().expand(3)
    truth = exact(shots)
    start = Gaussian.around(SEPARATE, truth.mean[:, :3], 1.0)
    far = Gaussian.around(SEPARATE, truth.mean[:, :3] + 1e6, 1.0)
    step = ph.GaussNewton(1, max_step_sd=1e-9)
    near = (before + step(before, shots, model, start=start)).moments()[0]
    assert_close(near, truth.mean[:, :3], **CLOSE)
    rejected = (before + step(before, shots, model, start=far)).moments()[0]
    assert_close(rejected, before.moments()[0], **CLOSE)


def test_a_program_runs_unseen_by_handlers_outside_and_draws_no_random_number() -> None:
    shots = support(2, 2)
    model = line()
    state = torch.get_rng_state()
    with poutine.trace() as trace, pyro.plate("outside", 7, dim=-3):
        run = run_at(model, ph.Episode(None, shots), {})
    assert not set(trace.trace.nodes) & {"slope", "bend", "x"}
    assert list(run.latents) == ["slope", "bend"]
    site = run.observations[0]
    assert site.mean.shape == shots.values.shape
    assert_close(site.scale, torch.full_like(site.scale, NOISE), check_dtype=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_evidence_changes_neither_the_program_nor_its_arguments() -> None:
    shots = support(3, 3, inferred=True)
    model = line(inferred=True)
    before = model.prior.population().expand(3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    values = shots.values.clone()
    attributes = set(vars(model)) | set(vars(model.prior))
    first = ph.GaussNewton(3)(before, shots, model).gaussian()
    second = ph.GaussNewton(3)(before, shots, model).gaussian()
    assert torch.equal(first.task_marginal.precision, second.task_marginal.precision)
    assert torch.equal(shots.values, values)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert set(vars(model)) | set(vars(model.prior)) == attributes


# ---- units: a latent may be measured in any ------------------------------------------------------

UNITS = [1e-8, 1e-3, 1.0, 1e3, 1e8]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])


class Decay(ph.HybridModel):
    """x = exp(-(rate / unit) t) + noise."""

    def __init__(self, family: Family, unit: float = 1.0, noise: float = 0.01) -> None:
        super().__init__()
        self.prior = ph.UnconditionalPrior(rate=family)
        self.unit = unit
        self.noise = noise

    def forward(self, episode: ph.Episode) -> Tensor:
        p = self.prior(episode)
        with episode.plate:
            rate = pyro.sample("rate", p["rate"]) / self.unit
            mean = torch.exp(-rate[..., None, None, :] * episode.query.times.unsqueeze(-1))
            x = dist.Normal(mean, self.noise)
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)


def decays(dtype: torch.dtype, rates: tuple[float, ...] = (0.7, 0.9, 1.1, 1.3)) -> ph.Shots:
    """Noisy decays of tasks with these rates, two shots each."""
    times = torch.linspace(0.0, 3.0, 12, dtype=torch.float64)
    clean = torch.exp(-torch.tensor(rates).double().view(-1, 1, 1, 1) * times.view(-1, 1))
    noise = torch.randn(len(rates), 2, 12, 1, generator=torch.Generator().manual_seed(3))
    return ph.Shots.from_tensors(times.to(dtype), (clean + 0.01 * noise).to(dtype))


def moments_by_quadrature(model: Decay, shots: ph.Shots) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the exact posterior in unconstrained coordinates, by task."""
    family = model.prior.families["rate"]
    grid = torch.linspace(-6.0, 6.0, 40_001, dtype=torch.float64) * family.scale + family.loc
    natural = family.from_raw(torch.zeros(1, 2, dtype=torch.float64))
    rate = family.constrained(grid)
    step = torch.autograd.functional.jvp(family.constrained, grid, torch.ones_like(grid))[1]
    prior = family.distribution(natural).base_dist.log_prob(rate) + step.abs().log()
    mean = torch.exp(-(rate / model.unit).view(-1, 1) * shots.times.double())
    squares = 0.0
    for k in range(shots.shape[1]):
        x = shots.values[:, k, :, 0].double()
        squares = squares + (x.unsqueeze(1) - mean).square().sum(-1)
    log_density = prior - 0.5 * squares / model.noise**2
    weight = log_density.softmax(-1)
    center = (weight * grid).sum(-1)
    return center, (weight * (grid - center.unsqueeze(-1)).square()).sum(-1).sqrt()


def computed_moments(model: Decay, shots: ph.Shots, num_iterations: int = 6) -> Any:
    before = model.prior.population().expand(shots.shape[0])
    after = before + ph.GaussNewton(num_iterations)(before, shots, model)
    mean, scale = after.moments()
    return mean.squeeze(-1).double(), scale.squeeze(-1).double()


@DTYPES
@pytest.mark.parametrize("unit", UNITS)
def test_a_latent_of_any_unit_has_the_exact_posterior(unit: float, dtype: torch.dtype) -> None:
    shots = decays(dtype)
    plain = Decay(Normal(1, loc=1.0, scale=0.3)).double()
    expected_mean, expected_sd = moments_by_quadrature(plain, decays(torch.float64))
    family = Normal(1, loc=unit, scale=0.3 * unit)
    mean, sd = computed_moments(Decay(family, unit).to(dtype), shots)
    assert ((mean / unit - expected_mean) / expected_sd).abs().max() < 0.05
    assert (sd / unit / expected_sd - 1.0).abs().max() < 0.02


@DTYPES
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", [LogNormal, Gamma])
def test_a_positive_latent_of_any_unit_has_the_same_posterior(
    kind: type[Family], unit: float, dtype: torch.dtype
) -> None:
    plain = Decay(kind(1, scale=0.3)).double()
    expected_mean, expected_sd = moments_by_quadrature(plain, decays(torch.float64))
    family = kind(1, loc=math.log(unit), scale=0.3)
    mean, sd = computed_moments(Decay(family, unit).to(dtype), decays(dtype))
    assert ((mean - math.log(unit) - expected_mean) / expected_sd).abs().max() < 0.05
    assert (sd / expected_sd - 1.0).abs().max() < 0.02


@DTYPES
@pytest.mark.parametrize(
    ("family", "unit"),
    [
        (Beta(1, loc=0.0, scale=0.5), 0.5),
        (Beta(1, loc=-9.0, scale=0.5), 1.0 / (1.0 + math.exp(9.0))),
        (VonMises(1, loc=1.0, scale=0.3), 1.0),
        (VonMises(1, loc=-2.0, scale=0.3), -2.0),
    ],
    ids=["half", "one in ten thousand", "one radian", "minus two radians"],
)
def test_fractions_and_angles_have_the_exact_posterior_wherever_they_lie(
    family: Family, unit: float, dtype: torch.dtype
) -> None:
    model = Decay(family, unit)
    expected_mean, expected_sd = moments_by_quadrature(model, decays(torch.float64))
    mean, sd = computed_moments(Decay(family, unit).to(dtype), decays(dtype))
    assert ((mean - expected_mean) / expected_sd).abs().max() < 0.05
    assert (sd / expected_sd - 1.0).abs().max() < 0.02


@DTYPES
@pytest.mark.parametrize("units", [(1e-8, 1e8), (1e8, 1e-8), (1.0, 1e-8), (1e4, 1e-4)])
def test_latents_of_very_different_units_have_the_exact_joint_posterior(
    units: tuple[float, float], dtype: torch.dtype
) -> None:
    """Slope and bend of the linear toy, each in units of its own."""
    scale = torch.tensor([units[0], units[1], units[1]], dtype=torch.float64)
    shots = support(4, 3)
    truth = exact(shots, loc=(0.5, 0.0, 0.0), scale=(2.0, 1.0, 1.0))
    sites = {
        "slope": Normal(1, loc=0.5 * units[0], scale=2.0 * units[0]),
        "bend": Normal(2, scale=units[1]),
    }
    prior = ph.UnconditionalPrior(**sites)

    def program(episode: ph.Episode) -> None:
        p = prior(episode)
        with episode.plate:
            z = torch.cat([pyro.sample(name, p[name]) for name in p], -1)
            z = z / scale.to(dtype)
            grown = features(episode.query.times) - features(episode.query.times[:1])
            mean = episode.query.initial + (grown * z[..., None, None, :]).sum(-1)
            x = dist.Normal(mean.unsqueeze(-1), NOISE).mask(episode.query.scored)
            pyro.sample("x", x.to_event(3), obs=episode.query.values)

    prior = prior.to(dtype)
    if dtype == torch.float32:
        shots = shots.map_all(
            lambda x: x.float() if x.is_floating_point() else x, lambda times: times.float()
        )
    before = prior.population().expand(4)
    belief = (before + ph.GaussNewton(6)(before, shots, program)).gaussian().task_marginal
    sd = truth.covariance.diagonal(dim1=-2, dim2=-1)[:, :3].sqrt()
    assert ((belief.mean / scale - truth.mean[:, :3]) / sd).abs().max() < 0.05
    correlation = truth.covariance[:, :3, :3] / sd.unsqueeze(-1) / sd.unsqueeze(-2)
    relative = belief.covariance / scale / scale.unsqueeze(-1)
    relative = relative / sd.unsqueeze(-1) / sd.unsqueeze(-2)
    assert (relative - correlation).abs().max() < 0.02


def test_the_first_step_in_large_units_is_as_long_as_in_any_other() -> None:
    # A neural latent has the units that training left it with: 0.7 of one unit is 70 of another.
    def proportional(episode: ph.Episode) -> None:
        with episode.plate:
            zero = torch.zeros(1, dtype=torch.float64)
            z = pyro.sample("z", dist.Normal(zero, 100.0).to_event(1))
            mean = (z * FIVE)[..., None, :, None]
            pyro.sample("x", dist.Normal(mean, 0.1).to_event(3), obs=episode.query.values)

    shots = ph.Shots.from_tensors(FIVE, 70.0 * FIVE.view(1, 1, -1, 1))
    zero = torch.zeros(1, 1, dtype=torch.float64)
    belief = Gaussian.around({"z": Normal(1)}, zero, 1e-4)
    increment = ph.GaussNewton(1)(belief, shots, proportional)
    assert_close((belief + increment).moments()[0], zero + 70.0, rtol=2e-3, atol=0.0)


# ---- a nonlinear program, where steps can go wrong -----------------------------------------------


def oscillation(episode: ph.Episode) -> None:
    """x = sin(rate t): many local optima, and Gauss-Newton steps that overshoot."""
    with episode.plate:
        zero = torch.zeros(1, dtype=torch.float64)
        rate = pyro.sample("rate", dist.LogNormal(zero, 1.0).to_event(1))
        mean = torch.sin(rate[..., None, :] * 5.0 * episode.query.times) * episode.query.initial
        x = dist.Normal(mean.unsqueeze(-1), 0.05)
        pyro.sample("x", x.to_event(3), obs=episode.query.values)


def swing(rate: Tensor) -> LeastSquares:
    """Exact oscillations of these rates as a problem, two shots a task."""
    num_tasks = len(rate)
    values = torch.sin(rate.view(-1, 1, 1, 1) * 5.0 * FIVE.view(-1, 1)).expand(-1, 2, -1, -1)
    start = torch.ones(num_tasks, 2, 1, dtype=torch.float64)
    zero = torch.zeros(num_tasks, 1, dtype=torch.float64)
    belief = Gaussian.around({"rate": LogNormal(1)}, zero, 1.0)
    return LeastSquares(oscillation, ph.Shots.from_tensors(FIVE, values, start), belief)


def cost(problem: LeastSquares, task: Tensor) -> Tensor:
    """The cost by task, written down once more."""
    shot = torch.zeros(*problem.shots.shape, 0, dtype=task.dtype)
    squares = problem.residuals(task[None], shot[None])[0].square().sum((1, 2))
    return squares + (task - problem.mean).square().sum(-1)


def minimum(evidence: ph.GaussNewton, problem: LeastSquares, start: Tensor | None = None) -> Tensor:
    """Coordinates of the best iterate."""
    if start is None:
        return evidence.minimize(problem).task
    return evidence.minimize(problem, Gaussian.around(problem.belief.families, start, 1.0)).task


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.2, 4.0), st.floats(-3.0, 3.0)), min_size=1, max_size=6),
    st.integers(1, 4),
    st.sampled_from([1e-9, 1e-3, 1.0]),
)
def test_the_cost_never_ends_higher_than_at_the_start(
    pairs: list[tuple[float, float]], num_iterations: int, damping: float
) -> None:
    rate, start = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    problem = swing(rate)
    start = start.unsqueeze(-1)
    end = minimum(ph.GaussNewton(num_iterations, damping=damping), problem, start)
    assert (cost(problem, end) <= cost(problem, start)).all()
    assert (cost(problem, end) <= cost(problem, problem.mean)).all()


def test_the_optimum_nearby_and_its_curvature_are_those_in_closed_form() -> None:
    rate = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    problem = swing(rate)
    iterate = ph.GaussNewton(6).descend(problem, rate.log().unsqueeze(-1) + 0.05, 6)
    values = problem.values(iterate.task, iterate.shot)["rate"]
    assert (values.squeeze(-1) - rate).abs().max() < 0.02
    phase = rate.view(-1, 1) * 5.0 * FIVE
    slope = phase * torch.cos(phase)  # by u = log rate
    expected = 1.0 + 2 * slope.square().sum(1) / 0.05**2
    after = problem.belief + problem.increment(iterate)
    precision = after.gaussian().task_marginal.precision
    assert_close(precision.flatten(), expected, rtol=0.03, atol=0.0)


def test_no_step_is_longer_than_the_longest_allowed() -> None:
    problem = swing(torch.tensor([0.5, 3.0], dtype=torch.float64))
    for longest in (0.01, 0.1):
        move = minimum(ph.GaussNewton(1, max_step_sd=longest), problem) - problem.mean
        assert (move.abs() <= longest * (1 + 1e-12)).all()
        assert (move.abs() > 0).any()


@pytest.mark.parametrize("num_restarts", [1, 4])
def test_restarts_never_make_a_task_worse_and_are_the_same_every_time(num_restarts: int) -> None:
    rate = torch.tensor([0.3, 1.0, 2.5, 3.5], dtype=torch.float64)
    problem = swing(rate)
    once = minimum(ph.GaussNewton(6), problem)
    evidence = ph.GaussNewton(6, num_restarts=num_restarts)
    more = minimum(evidence, problem)
    assert (cost(problem, more) <= cost(problem, once)).all()
    assert torch.equal(more, minimum(evidence, problem))


def test_restarts_find_optima_that_one_descent_misses() -> None:
    rate = torch.tensor([2.8, 3.5], dtype=torch.float64)
    problem = swing(rate)
    once = minimum(ph.GaussNewton(10), problem)
    more = minimum(ph.GaussNewton(10, num_restarts=16), problem)
    assert (cost(problem, once) > 50.0).any()
    assert (more.exp().squeeze(-1) - rate).abs().max() < 0.02


def runaway(episode: ph.Episode) -> None:
    """y' = z y²: ends in infinity before the last time if z y(0) is large."""
    with episode.plate:
        zero = torch.zeros(1, dtype=torch.float64)
        z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))

        def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (z * state[0] ** 2,)

        shots = episode.query
        states = ph.solve(field, shots.initial.unbind(-1), shots.times, substeps=20)
        pyro.sample("x", dist.Normal(states, 0.1).to_event(3), obs=shots.values)


def escape(z: list[float]) -> LeastSquares:
    """Three tasks whose true latents are 0.3, 0.4 and 0.5, with prior means ``z``."""
    start = torch.ones(len(z), 2, 1, dtype=torch.float64)
    truth = torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64).view(-1, 1, 1, 1)
    values = (1.0 / (1.0 - truth * FIVE.view(-1, 1))).expand(-1, 2, -1, -1).contiguous()
    mean = torch.tensor(z, dtype=torch.float64).unsqueeze(-1)
    belief = Gaussian.around({"z": Normal(1)}, mean, 1.0)
    return LeastSquares(runaway, ph.Shots.from_tensors(FIVE, values, start), belief)


def test_a_task_that_diverges_stays_where_it_is_and_leaves_the_others_alone() -> None:
    fine = escape([0.2, 0.2, 0.2])
    wild = escape([9.0, 0.2, 0.2])
    calm, storm = (ph.GaussNewton(4).minimize(problem) for problem in (fine, wild))
    empty = wild.mean.new_zeros(1, 3, 2, 0)
    assert not torch.isfinite(wild.residuals(wild.mean[None], empty)[0, 0]).all()
    assert torch.equal(calm.task[1:], storm.task[1:])
    assert storm.task[0] == 9.0
    belief = (wild.belief + wild.increment(storm)).gaussian().task_marginal
    assert torch.isfinite(belief.precision).all()
    assert belief.mean[0] == 9.0
    truth = torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64)
    assert (calm.task.flatten() - truth).abs().max() < 0.02


def test_a_step_into_divergence_is_taken_back() -> None:
    problem = escape([0.2, 0.2, 0.2])
    start = torch.full((3, 1), 0.99, dtype=torch.float64)  # just short of the pole
    iterate = ph.GaussNewton(12).descend(problem, start, 12)
    assert torch.isfinite(iterate.task).all()
    assert (iterate.task <= 0.99).all()


def test_a_start_that_diverges_is_replaced_by_the_mean() -> None:
    problem = escape([0.2, 0.2, 0.2])
    start = torch.tensor([[9.0], [0.3], [9.0]], dtype=torch.float64)
    task = minimum(ph.GaussNewton(6), problem, start)
    truth = torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64)
    assert (task.flatten() - truth).abs().max() < 0.02


def test_a_task_that_diverges_at_every_start_keeps_its_prior() -> None:
    problem = escape([9.0, 0.2, 0.2])
    start = torch.tensor([[8.0], [0.3], [0.3]], dtype=torch.float64)
    belief = Gaussian.around(problem.belief.families, start, 1.0)
    iterate = ph.GaussNewton(4).minimize(problem, belief)
    after = (problem.belief + problem.increment(iterate)).gaussian().own
    before = problem.belief.own
    assert torch.equal(after.information[0], before.information[0])
    assert torch.equal(after.precision[0], before.precision[0])


# ---- Fisher information --------------------------------------------------------------------------


def line_problem(
    shots: ph.Shots, *, inferred: bool = False, precision: float = 1.0
) -> LeastSquares:
    zero = torch.zeros(shots.shape[0], 3, dtype=torch.float64)
    belief = Gaussian.around(SEPARATE, zero, precision)
    return LeastSquares(line(inferred=inferred), shots, belief)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inferred", [False, True])
def test_information_is_that_of_least_squares_with_starts_eliminated_by_hand(
    inferred: bool, masked: bool
) -> None:
    shots = support(4, 3, inferred=inferred, mask=random_mask(4, 4, 0.6 if masked else 2.0))
    weight = torch.diag_embed(shots.scored.squeeze(-1).double()) / NOISE**2
    if inferred:  # the Schur complement of each shot's start
        pull = weight.sum(-1, keepdim=True)
        weight = weight - pull @ pull.mT / (weight.sum((-2, -1), keepdim=True) + START_NOISE**-2)
    design = features(TIMES)
    expected = torch.einsum("ni,tsnm,mj->tij", design, weight, design)
    at = torch.randn(4, 3, dtype=torch.float64)
    information = fisher_information(line_problem(shots, inferred=inferred), at)
    assert_close(information, expected, atol=1e-6, rtol=1e-6)


def test_information_depends_neither_on_the_prior_nor_on_the_values_observed() -> None:
    shots = support(3, 3)
    at = torch.zeros(3, 3, dtype=torch.float64)
    faint, strong = (
        fisher_information(line_problem(shots, precision=precision), at)
        for precision in (1e-9, 1e3)
    )
    assert_close(faint, strong, **CLOSE)
    other = replace(shots, values=shots.values + 3.0)
    assert_close(fisher_information(line_problem(other), at), faint, **CLOSE)


def test_information_of_a_nonlinear_program_is_that_of_its_derivative_at_the_point() -> None:
    rate = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).view(-1, 1)
    problem = swing(torch.ones(3, dtype=torch.float64))
    slope = rate * 5.0 * FIVE * torch.cos(rate * 5.0 * FIVE)  # by u = log rate
    expected = 2 * slope.square().sum(1) / 0.05**2
    information = fisher_information(problem, rate.log())
    assert_close(information.flatten(), expected, rtol=1e-5, atol=0.0)


def test_latents_of_shots_are_eliminated_at_the_point_that_is_asked_for() -> None:
    def program(episode: ph.Episode) -> None:
        with episode.plate:
            zero = torch.zeros(2, 1, dtype=torch.float64)
            one = torch.ones(2, 3, 1, dtype=torch.float64)
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            gain = pyro.sample("gain", dist.Normal(one, 1e-6).to_event(2))
            mean = gain.unsqueeze(-1) * z[..., None, None, :] * episode.query.times.unsqueeze(-1)
            pyro.sample("x", dist.Normal(mean, 0.1).to_event(3), obs=episode.query.values)

    shots = ph.Shots.from_tensors(FIVE, torch.zeros(2, 3, 5, 1, dtype=torch.float64))
    one = torch.ones(2, 1, dtype=torch.float64)
    problem = LeastSquares(program, shots, Gaussian.around({"z": Normal(1)}, one, 1.0))
    expected = torch.full((2,), 3.0 * float(FIVE.square().sum()) / 0.01, dtype=torch.float64)
    usual = fisher_information(problem, one)
    doubled = fisher_information(problem, one, torch.full((2, 3, 1), 2.0, dtype=torch.float64))
    assert_close(usual.flatten(), expected, rtol=1e-5, atol=0.0)
    assert_close(doubled.flatten(), 4.0 * expected, rtol=1e-5, atol=0.0)


@DTYPES
@pytest.mark.parametrize("unit", UNITS)
def test_information_in_another_unit_is_the_same_information(
    unit: float, dtype: torch.dtype
) -> None:
    rate = torch.tensor([[0.7], [0.9], [1.1], [1.3]], dtype=dtype)
    shots = decays(dtype)
    times = shots.times.double()
    slope = -times * torch.exp(-rate.double() * times) / 0.01
    model = Decay(Normal(1, loc=unit, scale=0.3 * unit), unit).to(dtype)
    problem = LeastSquares(model, shots, model.prior.population().expand(4))
    information = fisher_information(problem, rate * unit).flatten() * unit**2
    assert_close(information, 2.0 * slope.square().sum(1), rtol=0.01, atol=0.0)


def test_there_is_no_information_where_a_program_diverges() -> None:
    problem = escape([9.0, 0.2, 0.2])
    information = fisher_information(problem, problem.mean)
    assert information[0] == 0.0
    assert (information[1:] > 0.0).all()


# ---- one descent ---------------------------------------------------------------------------------

LONG_STEPS = ph.GaussNewton(max_step_sd=100.0)


def cost_without_prior(problem: LeastSquares, iterate: Iterate) -> Tensor:
    squares = problem.residuals(iterate.task[None], iterate.shot[None])[0].square().sum((1, 2))
    offset = iterate.shot - problem.shot_mean
    return squares + (offset.square() * problem.shot_precision).sum((1, 2))


@pytest.mark.parametrize("inferred", [False, True])
def test_a_descent_ends_at_the_optimum_with_its_cost(inferred: bool) -> None:
    shots = support(4, 3, inferred=inferred)
    problem = line_problem(shots, inferred=inferred, precision=1e-9)
    start = torch.ones(4, 3, dtype=torch.float64)
    end = LONG_STEPS.descend(problem, start, 8)
    flat = exact(shots, inferred=inferred, scale=(1e4,) * 3)
    assert_close(end.task, flat.mean[:, :3], **CLOSE)
    assert_close(end.cost, cost_without_prior(problem, end), rtol=1e-7, atol=1e-7)
    if inferred:
        assert_close(end.shot.squeeze(-1), flat.mean[:, 3:], **CLOSE)


def test_a_descent_continues_where_it_is_told_to_latents_of_shots_included() -> None:
    problem = line_problem(support(4, 3, inferred=True), inferred=True)
    end = LONG_STEPS.descend(problem, problem.mean, 8)
    again = LONG_STEPS.descend(problem, end.task, 1, end.shot)
    forgetful = LONG_STEPS.descend(problem, end.task, 1)
    assert (again.cost <= end.cost).all()
    assert (forgetful.cost >= again.cost).all()
    assert_close(again.shot, end.shot, **CLOSE)


def test_a_descent_judges_its_last_step_and_takes_it_back_where_it_fails() -> None:
    problem = swing(torch.tensor([1.0, 1.0], dtype=torch.float64))
    start = torch.tensor([[0.05], [0.9]], dtype=torch.float64)
    for num_iterations in (1, 2, 3, 4):
        end = ph.GaussNewton(damping=1e-12).descend(problem, start, num_iterations)
        assert (end.cost <= cost(problem, start) + 1e-12).all()
        assert_close(end.cost, cost(problem, end.task), rtol=1e-9, atol=1e-9)


def test_each_task_descends_by_itself() -> None:
    rate = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    start = rate.log().unsqueeze(-1) + 0.3
    together = ph.GaussNewton().descend(swing(rate), start, 5)
    single = [
        ph.GaussNewton().descend(swing(rate[i : i + 1]), start[i : i + 1], 5).task for i in range(3)
    ]
    assert_close(together.task, torch.cat(single), rtol=1e-12, atol=1e-12)


# ---- settings ------------------------------------------------------------------------------------


def test_settings_compare_by_value_and_are_frozen() -> None:
    one = ph.GaussNewton(3, segments=(7, 7), num_restarts=2)
    same = ph.GaussNewton(num_iterations=3, segments=(7, 7), num_restarts=2)
    assert one == same
    assert hash(one) == hash(same)
    assert one != ph.GaussNewton(3, segments=(7,), num_restarts=2)
    with pytest.raises(AttributeError):
        one.num_iterations = 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iterations": 0}, r"expected num_iterations as a whole number of 1 or more; got 0\."),
        ({"num_iterations": 1.5}, r"num_iterations as a whole number of 1 or more; got 1\.5\."),
        ({"num_iterations": True}, r"num_iterations as a whole number of 1 or more; got True\."),
        ({"num_restarts": -1}, r"expected num_restarts as a whole number of 0 or more; got -1\."),
        ({"num_restarts": 2.0}, r"num_restarts as a whole number of 0 or more; got 2\.0\."),
        ({"segments": [7]}, r"expected segments as a tuple of whole numbers.*; got \[7\]\."),
        ({"segments": 7}, r"expected segments as a tuple of whole numbers.*; got 7\."),
        ({"segments": (0,)}, r"segments as a tuple of whole numbers of 1 or more; got \(0,\)\."),
        ({"segments": (2.5,)}, r"segments as a tuple of whole numbers.*; got \(2\.5,\)\."),
        ({"damping": -1.0}, r"expected damping as a positive finite number; got -1\.0\."),
        ({"damping": 0.0}, r"expected damping as a positive finite number; got 0\.0\."),
        ({"damping": math.nan}, r"expected damping as a positive finite number; got nan\."),
        ({"damping": "1"}, r"expected damping as a positive finite number; got '1'\."),
        ({"max_step_sd": math.inf}, r"expected max_step_sd as a positive finite number; got inf\."),
        ({"max_step_sd": 0}, r"expected max_step_sd as a positive finite number; got 0\."),
        ({"max_step_sd": -1}, r"expected max_step_sd as a positive finite number; got -1\."),
        ({"max_step_sd": math.nan}, r"expected max_step_sd as a positive finite number; got nan\."),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with without_type_checks(), pytest.raises(ValueError, match=message):
        ph.GaussNewton(**options)


# ---- what it refuses -----------------------------------------------------------------------------


def test_a_program_that_observes_nothing_is_refused() -> None:
    message = r"expected a program that observes something.*obs=episode\.query\.values"
    with pytest.raises(ValueError, match=message):
        posterior(line(), support(2, 1).simulation())


@pytest.mark.parametrize("event", [1, 3])
def test_a_latent_of_an_unknown_shape_is_refused_by_name(event: int) -> None:
    def program(episode: ph.Episode) -> None:
        with episode.plate:
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            odd = pyro.sample("odd", dist.Normal(torch.zeros([3] * event), 1.0).to_event(event))
            mean = z[..., None, None, :] + odd.sum() + torch.zeros(2, 2, 6, 1)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(3), obs=episode.query.values)

    belief = Gaussian.around({"z": Normal(1)}, torch.zeros(2, 1), 1.0)
    message = r"latent site 'odd' of shape \(task, shot, component\).*SupportPrior"
    with pytest.raises(ValueError, match=message):
        LeastSquares(program, support(2, 2), belief)


def test_computed_evidence_without_a_program_is_refused() -> None:
    before: Belief = line().prior.population().expand(2)
    with pytest.raises(ValueError, match="expected a program to linearize; got none"):
        ph.GaussNewton()(before, support(2, 2), None)
