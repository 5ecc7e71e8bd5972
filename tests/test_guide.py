"""AmortizedGuide: the prior plus the query's evidence, with standard deviations that mean something."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import kl_divergence
from torch.testing import assert_close
from toys import POINTS, TOGETHER, Line, alone, exact, in_float32, make_tasks, with_query

import pyro_hybrid as ph
from pyro_hybrid.beliefs.families import LogNormal, Normal
from pyro_hybrid.evidence.gauss_newton import Belief, Problem

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
EVIDENCE = ph.Linearised(8)
READINGS = pytest.mark.parametrize("reading", ["learned", "computed"])


def encoder() -> ph.SetEncoder:
    return ph.SetEncoder(1, POINTS, 8, width=16)


def pair(
    reading: str, *, inferred: bool = False, sites: dict | None = None
) -> tuple[Line, ph.AmortizedGuide]:
    torch.manual_seed(0)
    evidence = EVIDENCE if reading == "computed" else None
    model = Line(evidence, inferred=inferred, sites=sites).double()
    return model, ph.AmortizedGuide(model.prior, None if evidence else encoder(), evidence).double()


def divergence(guide: ph.AmortizedGuide, episode: ph.Episode) -> Tensor:
    naturals, p = guide.natural(episode), guide.prior(episode.support)
    sites = guide.prior.sites
    return torch.stack(
        [kl_divergence(sites[name].distribution(naturals[name]), p[name]) for name in p]
    )


# ---- zero evidence -------------------------------------------------------------------------------


def test_a_deaf_prior_needs_no_support_for_its_guide_to_read_by() -> None:
    model = Line(prior=ph.UnconditionalPrior(slope=Normal(1), bend=Normal(2))).double()
    guide = ph.AmortizedGuide(model.prior, evidence=EVIDENCE)
    episode = make_tasks(3, 4, num_support=2).episode()
    alone, with_support = (
        guide.natural(replace(episode, support=s)) for s in (None, episode.support)
    )
    assert all(torch.equal(alone[name], with_support[name]) for name in alone)
    assert ph.draws(model, guide, replace(episode, support=None), 7)["bend"].shape == (7, 3, 2)


@READINGS
def test_with_nothing_to_explain_the_guide_is_the_prior_exactly(reading: str) -> None:
    model, guide = pair(reading)
    episode = make_tasks(3, 4, num_support=2).episode().simulation()
    assert (divergence(guide, episode) == 0.0).all()
    naturals, prior = guide.natural(episode), model.prior.natural(episode.support)
    assert all(torch.equal(naturals[name], prior[name]) for name in prior)


def test_a_query_that_is_masked_entirely_adds_nothing() -> None:
    _, guide = pair("computed")
    episode = make_tasks(3, 4, num_support=2).episode()
    silent = with_query(episode, scored=torch.zeros_like(episode.query.scored))
    assert divergence(guide, silent).abs().max() < 1e-12
    assert (divergence(guide, episode) > 1e-3).all()


@READINGS
def test_an_unconditional_prior_with_nothing_to_explain_is_matched_too(reading: str) -> None:
    prior = ph.UnconditionalPrior(omega=LogNormal(1), unknown=Normal(2)).double()
    guide = ph.AmortizedGuide(
        prior, *((encoder(), None) if reading == "learned" else (None, EVIDENCE))
    )
    assert (divergence(guide, make_tasks(3, 4).episode().simulation()) == 0.0).all()


@READINGS
@pytest.mark.parametrize("plates", [0, 1])
def test_with_nothing_to_explain_the_guide_draws_latents_and_no_data(
    reading: str, plates: int
) -> None:
    _, guide = pair(reading, inferred=True)
    with contextlib.ExitStack() as stack:
        if plates:
            stack.enter_context(pyro.plate("draw", 5, dim=-2))
        values = guide(make_tasks(3, 4, num_support=2).episode().simulation())
    drawn = {name: tuple(value.shape[-3:]) for name, value in values.items()}
    assert drawn.keys() == {"slope", "bend", "start"} and drawn["start"] == (3, 2, 1)
    assert values["slope"].shape == (5, 3, 1) if plates else (3, 1)


# ---- computed evidence ---------------------------------------------------------------------------


@pytest.mark.parametrize("inferred", [False, True])
def test_computed_evidence_gives_the_exact_marginals(inferred: bool) -> None:
    _, guide = pair("computed", inferred=inferred)
    episode = make_tasks(4, 6, num_support=2, inferred=inferred).episode()
    naturals, truth = guide.natural(episode), exact(episode.support, episode, inferred=inferred)
    mean, scale = (
        torch.cat(x, -1)
        for x in zip(*(guide.prior.sites[n].gaussian(v) for n, v in naturals.items()), strict=True)
    )
    assert_close(mean, truth.mean[:, :3], **CLOSE)
    assert_close(scale, truth.covariance.diagonal(dim1=-2, dim2=-1)[:, :3].sqrt(), **CLOSE)


def test_a_declared_full_normal_gives_the_exact_posterior() -> None:
    _, guide = pair("computed", sites=TOGETHER)
    episode = make_tasks(4, 6, num_support=2).episode()
    q = TOGETHER["both"].distribution(guide.natural(episode)["both"])
    truth = exact(episode.support, episode, loc=(0.0, 0.0, 0.0), scale=(1.0, 1.0, 1.0))
    assert_close(q.mean, truth.mean[:, :3], **CLOSE)
    assert_close(q.covariance_matrix, truth.covariance[:, :3, :3], **CLOSE)


@pytest.mark.parametrize("support", [1, 3])
def test_computed_standard_deviations_are_exact_and_shrink_as_shots_are_added(support: int) -> None:
    _, guide = pair("computed")
    everything = make_tasks(4, support + 20, num_support=support).episode()
    before = guide.prior(everything.support)["slope"].stddev
    for shots in (1, 2, 5, 20):
        query = everything.query.select_shots(torch.arange(shots).expand(4, -1))
        episode = ph.Episode(everything.support, query)
        scale = guide.prior.sites["slope"].distribution(guide.natural(episode)["slope"]).stddev
        expected = exact(episode.support, episode).covariance[:, :1, 0].sqrt()
        assert ((scale / expected - 1.0).abs() < 1e-3).all() and (scale < before).all()
        before = scale


def test_an_unconditional_prior_leaves_the_query_to_speak_alone() -> None:
    prior = ph.UnconditionalPrior(slope=Normal(1, loc=0.5, scale=2.0), bend=Normal(2))
    model = Line(prior=prior).double()
    guide = ph.AmortizedGuide(model.prior, evidence=EVIDENCE)
    episode = make_tasks(4, 5, num_support=2).episode()
    q = prior.sites["bend"].distribution(guide.natural(episode)["bend"])
    assert_close(q.mean, exact(episode).mean[:, 1:3], **CLOSE)


def test_starts_are_drawn_from_their_exact_joint_posterior_with_the_tasks_latents() -> None:
    _, guide = pair("computed", inferred=True, sites=TOGETHER)
    episode = make_tasks(2, 4, num_support=1, inferred=True).episode()
    torch.manual_seed(1)
    with torch.no_grad(), pyro.plate("draw", 40_000, dim=-2):
        values = guide(episode)
    assert values["start"].shape == (40_000, 2, 3, 1)
    joint = torch.cat(
        [values["both"], values["start"].squeeze(-1)], -1
    )  # (draw, task, latents and starts)
    # the support's starts are latents of its own, which the exact posterior has first
    truth = exact(
        episode.support, episode, inferred=True, loc=(0.0, 0.0, 0.0), scale=(1.0, 1.0, 1.0)
    )
    rows = torch.tensor([0, 1, 2, 4, 5, 6])
    for task in range(2):
        goal = truth.covariance[task][rows][:, rows]
        assert_close(joint[:, task].mean(0), truth.mean[task, rows], atol=0.01, rtol=0.0)
        assert (
            torch.linalg.solve(goal, torch.cov(joint[:, task].T)) - torch.eye(6)
        ).abs().max() < 0.15


def test_several_latents_of_a_shot_are_drawn_jointly() -> None:
    def program(episode: ph.Episode) -> None:
        """x = z + a + b t for every shot: a and b share what a short trajectory says."""
        with episode.plate:
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
            wide = torch.zeros(*episode.query.shape, 1, dtype=torch.float64)
            a = pyro.sample("a", dist.Normal(wide, 1.0).to_event(2))
            b = pyro.sample("b", dist.Normal(wide + 0.5, 2.0).to_event(2))
            mean = z[..., None, :] + a + b * episode.query.times
            pyro.sample(
                "x", dist.Normal(mean.unsqueeze(-1), 0.5).to_event(3), obs=episode.query.values
            )

    prior = ph.UnconditionalPrior(z=Normal(1)).double()
    prior.bind(program)
    guide = ph.AmortizedGuide(prior, evidence=EVIDENCE)
    two_shots = make_tasks(1, 3).episode().query
    episode = alone(two_shots.times, two_shots.values, two_shots.initial)
    torch.manual_seed(2)
    with torch.no_grad(), pyro.plate("draw", 40_000, dim=-2):
        values = guide(episode)
    drawn = torch.cat(
        [values["z"].squeeze(1), *(values[n][:, 0, :, 0] for n in "ab")], -1
    )  # z, a1, a2, b1, b2
    t, one, nil = (
        episode.query.times,
        torch.ones(POINTS, dtype=torch.float64),
        torch.zeros(POINTS, dtype=torch.float64),
    )
    design = torch.cat(
        [torch.stack([one, one, nil, t, nil], -1), torch.stack([one, nil, one, nil, t], -1)]
    )
    weight = torch.tensor([1.0, 1.0, 1.0, 0.25, 0.25], dtype=torch.float64)
    precision = torch.diag(weight) + design.T @ design / 0.25
    right = (
        weight * torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5])
        + design.T @ episode.query.values.flatten() / 0.25
    )
    assert_close(drawn.mean(0), torch.linalg.solve(precision, right), atol=0.03, rtol=0.0)
    assert (precision @ torch.cov(drawn.T) - torch.eye(5)).abs().max() < 0.2


def test_no_gradient_flows_through_the_computed_guide() -> None:
    _, guide = pair("computed", inferred=True)
    values = guide(make_tasks(3, 4).episode())
    assert not any(value.requires_grad for value in values.values())


class Start(ph.Linearised):
    """Computed evidence that remembers where it began."""

    def __call__(self, problem: Problem, start: Tensor) -> Belief:
        self.start = start
        return super().__call__(problem, start)


def test_computed_evidence_begins_where_the_encoder_points_and_ends_at_the_same_posterior() -> None:
    model, guide = pair("learned")
    episode = make_tasks(4, 6, num_support=2).episode()
    pointed = torch.cat(
        [
            model.prior.sites[name].gaussian(natural)[0]
            for name, natural in guide.natural(episode).items()
        ],
        -1,
    )
    guide.evidence = model.prior.evidence = Start(8)
    naturals = guide.natural(episode)
    reference = pair("computed")[1].natural(episode)
    assert (pointed - model.prior.gaussian(episode.support)[0]).abs().max() > 0.01
    model.prior.evidence = None
    guide.natural(episode)
    assert_close(guide.evidence.start, pointed)
    for name, natural in naturals.items():
        one, other = (model.prior.sites[name].distribution(x) for x in (natural, reference[name]))
        assert_close(one.mean, other.mean, **CLOSE)
        assert_close(one.stddev, other.stddev, **CLOSE)
    assert not any(value.requires_grad for value in guide(episode).values())


# ---- the encoder alone ---------------------------------------------------------------------------


def test_a_learned_guide_is_the_priors_natural_parameters_plus_what_the_encoder_says() -> None:
    model, guide = pair("learned")
    episode = make_tasks(3, 4).episode()
    naturals, prior = guide.natural(episode), model.prior.natural(episode.support)
    features = torch.cat(
        [
            guide.encoder(episode.query.sorted_shots),
            model.prior.encoder(episode.support.sorted_shots),
        ],
        -1,
    )
    raw = dict(zip(prior, guide.head(features).split([2, 4], -1), strict=True))
    for name, family in model.prior.sites.items():
        evidence = family.evidence(raw[name].unflatten(-1, (family.n, 2)))
        assert torch.equal(naturals[name], prior[name] + evidence)


def test_a_learned_guide_does_not_depend_on_the_order_of_shots() -> None:
    _, guide = pair("learned")
    episode = make_tasks(3, 7, num_support=3).episode()
    backwards = episode.map_shots(
        lambda shots: shots.select_shots(torch.arange(shots.shape[1] - 1, -1, -1).expand(3, -1))
    )
    first, second = guide.natural(episode), guide.natural(backwards)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_learned_guide_leaves_the_starts_their_prior() -> None:
    model, guide = pair("learned", inferred=True)
    episode = make_tasks(3, 4).episode()
    nodes = poutine.trace(guide).get_trace(episode).nodes
    theirs = poutine.trace(model).get_trace(episode).nodes["start"]["fn"]
    assert (kl_divergence(nodes["start"]["fn"], theirs) == 0.0).all()


def test_gradients_reach_every_parameter_of_a_learned_guide() -> None:
    _, guide = pair("learned")
    sum(value.sum() for value in guide(make_tasks(3, 4).episode()).values()).backward()
    without = {
        name for name, p in guide.named_parameters() if p.grad is None or p.grad.abs().max() == 0
    }
    assert without == {"prior.base"}  # the population is the model's business


@pytest.fixture(scope="module")
def trained() -> tuple[Line, ph.AmortizedGuide]:
    """A purely amortised guide on one latent, trained with one to four support shots of eight."""
    torch.manual_seed(0)
    model = Line(sites={"slope": Normal(1, loc=0.5, scale=2.0)}, noise=2.0)
    guide = ph.AmortizedGuide(model.prior, encoder())
    tasks = in_float32(make_tasks(4000, 8, latents=1, noise=2.0))
    for each in (guide.encoder, model.prior.encoder):
        each.standardise(tasks.values, True)
    optim = torch.optim.Adam({*model.parameters(), *guide.parameters()}, 1e-2)
    svi = ph.SVI(model, guide, optim)
    schedule = torch.optim.lr_scheduler.LinearLR(optim, 1.0, 0.01, total_iters=700)
    streams = [replace(tasks, num_support=k).batches(128, seed=k) for k in (1, 2, 4)]
    for i in range(700):
        svi.step(next(streams[i % 3]))
        schedule.step()
    return model, guide


def ratios(guide: ph.AmortizedGuide, support: int, query: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standard deviation of the guide and of the exact posterior, and the error in exact standard deviations."""
    tasks = make_tasks(300, support + query, seed=99, num_support=support, latents=1, noise=2.0)
    double = tasks.episode()
    truth = exact(double.support, double, loc=(0.5,), scale=(2.0,), noise=2.0)
    with torch.no_grad():
        q = guide.prior.sites["slope"].distribution(
            guide.natural(in_float32(tasks).episode())["slope"]
        )
    expected = truth.covariance[:, 0, 0].sqrt()
    return q.stddev.squeeze(-1), expected, (q.mean.squeeze(-1) - truth.mean[:, 0]) / expected


@pytest.mark.parametrize(("support", "query"), [(1, 7), (2, 6), (4, 4)])
def test_learned_standard_deviations_are_within_a_tenth_of_the_exact_ones(
    trained: tuple[Line, ph.AmortizedGuide], support: int, query: int
) -> None:
    scale, expected, error = ratios(trained[1], support, query)
    assert 0.9 < (scale / expected).mean() < 1.1
    assert ((scale / expected - 1.0).abs() < 0.1).double().mean() > 0.8
    assert error.square().mean() < 0.3  # the mean is off by little, against the spread


def test_learned_standard_deviations_shrink_as_shots_are_added(
    trained: tuple[Line, ph.AmortizedGuide],
) -> None:
    guide, shots = (
        trained[1],
        in_float32(make_tasks(100, 9, seed=98, num_support=4, latents=1, noise=2.0)).episode(),
    )
    scales = []
    with torch.no_grad():
        for size in (1, 2, 3, 4):
            support = shots.support.select_shots(torch.arange(size).expand(100, -1))
            scales.append(guide.prior(support)["slope"].stddev.squeeze(-1))
        scales.append(
            guide.prior.sites["slope"]
            .distribution(guide.natural(shots)["slope"])
            .stddev.squeeze(-1)
        )
    for before, after in zip(scales, scales[1:], strict=False):
        assert (after < before).double().mean() > 0.95 and after.mean() < before.mean()


def test_the_learned_noise_is_the_true_one(trained: tuple[Line, ph.AmortizedGuide]) -> None:
    assert 1.9 < trained[0].noise.item() < 2.1


# ---- as a Pyro guide -----------------------------------------------------------------------------


@READINGS
@pytest.mark.parametrize("inferred", [False, True])
def test_the_guide_samples_every_latent_of_the_program_and_nothing_else(
    reading: str, inferred: bool
) -> None:
    model, guide = pair(reading, inferred=inferred)
    episode = make_tasks(3, 4).episode()
    with pyro.plate("particles", 5, dim=-2):
        ours = poutine.trace(guide).get_trace(episode)
        theirs = poutine.trace(poutine.replay(model, trace=ours)).get_trace(episode)
    latent = set(theirs.stochastic_nodes) - {"task", "particles"}
    assert set(ours.stochastic_nodes) - {"task", "particles"} == latent
    assert latent == {"slope", "bend"} | ({"start"} if inferred else set())
    ours.compute_log_prob(), theirs.compute_log_prob()
    for name in latent:
        assert ours.nodes[name]["value"].shape[:2] == (5, 3)
        assert ours.nodes[name]["log_prob"].shape == theirs.nodes[name]["log_prob"].shape == (5, 3)


def test_a_guide_is_pickier_than_its_prior_on_the_truth() -> None:
    _, guide = pair("computed", sites=TOGETHER)
    tasks = make_tasks(200, 6)
    episode = tasks.episode()
    truth = torch.cat(list(tasks.true_latents.values()), -1)
    q = TOGETHER["both"].distribution(guide.natural(episode)["both"])
    assert (
        q.log_prob(truth).mean() > guide.prior(episode.support)["both"].log_prob(truth).mean() + 0.5
    )


def test_a_guide_that_cannot_read_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"an encoder or evidence=ph\.Linearised\(\.\.\.\); got neither"
    ):
        ph.AmortizedGuide(Line().prior)
