"""AmortizedGuide: the prior plus the query's evidence, with standard deviations that mean something."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.testing import assert_close
from toys import (
    POINTS,
    SEPARATE,
    TOGETHER,
    Line,
    encoder,
    exact,
    in_float32,
    make_tasks,
    with_query,
    without_type_checks,
)

import pyro_hybrid as ph
from pyro_hybrid.beliefs.belief import Belief, Gaussian
from pyro_hybrid.beliefs.families import Family, LogNormal, Normal
from pyro_hybrid.evidence.protocol import Evidence
from pyro_hybrid.programs.run import Program

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
COMPUTED = ph.GaussNewton(8)
EVIDENCE: Mapping[str, Callable[[], Evidence]] = {
    "encoder": lambda: ph.Encoder(encoder()),
    "gauss_newton": lambda: COMPUTED,
    "encoder, gauss_newton": lambda: ph.Encoder(encoder()).then(COMPUTED),
}
KINDS = pytest.mark.parametrize("kind", EVIDENCE)


def pair(
    kind: str, *, inferred: bool = False, sites: dict[str, Family] | None = None
) -> tuple[Line, ph.AmortizedGuide]:
    """A model and its guide, both with this kind of evidence, untrained, in float64."""
    torch.manual_seed(0)
    model = Line(None if kind == "encoder" else COMPUTED, inferred=inferred, sites=sites)
    return model.double(), ph.AmortizedGuide(model, EVIDENCE[kind]()).double()


def unconditional(evidence: Evidence, **sites: Family) -> tuple[Line, ph.AmortizedGuide]:
    torch.manual_seed(0)
    model = Line(prior=ph.UnconditionalPrior(**(sites or SEPARATE))).double()
    return model, ph.AmortizedGuide(model, evidence).double()


def divergence(guide: ph.AmortizedGuide, episode: ph.Episode) -> Tensor:
    """KL(guide || prior) by site and task."""
    posterior = guide.belief(episode).distributions()
    p = guide.prior.belief(episode.support, guide.model).distributions()
    return torch.stack([kl_divergence(posterior[name], p[name]) for name in p])


# ---- zero evidence -------------------------------------------------------------------------------


@KINDS
def test_without_values_the_guide_is_the_prior_exactly(kind: str) -> None:
    model, guide = pair(kind)
    episode = make_tasks(3, 4, num_support=2).episode().simulation()
    assert (divergence(guide, episode) == 0.0).all()
    posterior = guide.belief(episode).factorized().natural
    prior = model.prior.belief(episode.support, model).factorized().natural
    assert all(torch.equal(posterior[name], prior[name]) for name in prior)


@KINDS
def test_a_query_that_is_masked_entirely_adds_nothing(kind: str) -> None:
    _, guide = pair(kind)
    episode = make_tasks(3, 4, num_support=2).episode()
    silent = with_query(episode, scored=torch.zeros_like(episode.query.scored))
    assert divergence(guide, silent).abs().max() < 1e-10
    assert (divergence(guide, episode) > 1e-3).all()


@KINDS
def test_an_unconditional_prior_is_matched_too_if_nothing_is_observed(kind: str) -> None:
    _, guide = unconditional(EVIDENCE[kind](), omega=LogNormal(1), unknown=Normal(2))
    assert (divergence(guide, make_tasks(3, 4).episode().simulation()) == 0.0).all()


@KINDS
@pytest.mark.parametrize("plates", [0, 1])
def test_without_values_the_guide_draws_latents_and_no_data(kind: str, plates: int) -> None:
    _, guide = pair(kind, inferred=True)
    with contextlib.ExitStack() as stack:
        if plates:
            stack.enter_context(pyro.plate("draw", 5, dim=-2))
        values = guide(make_tasks(3, 5, num_support=2).episode().simulation())
    drawn = {name: tuple(value.shape[-3:]) for name, value in values.items()}
    assert drawn.keys() == {"slope", "bend", "start"}
    assert drawn["start"] == (3, 3, 1)  # the query's three shots, not the support's two
    assert values["slope"].shape == ((5, 3, 1) if plates else (3, 1))


def test_an_unconditional_guide_needs_no_support() -> None:
    model, guide = unconditional(COMPUTED, slope=Normal(1), bend=Normal(2))
    episode = make_tasks(3, 4, num_support=2).episode()
    without = guide.belief(replace(episode, support=None)).factorized().natural
    expected = guide.belief(episode).factorized().natural
    assert all(torch.equal(without[name], expected[name]) for name in expected)
    draws = ph.draws(model, guide, replace(episode, support=None), 7)
    assert draws["bend"].shape == (7, 3, 2)


# ---- laws of every evidence ----------------------------------------------------------------------


@KINDS
def test_the_guide_is_the_belief_given_the_support_plus_an_increment(kind: str) -> None:
    model, guide = pair(kind)
    episode = make_tasks(3, 4).episode()
    before = model.prior.belief(episode.support, model)
    increment = guide.evidence(before, episode.query, model, given=episode.support)
    expected = (before + increment).factorized().natural
    belief = guide.belief(episode).factorized().natural
    for name in expected:
        assert_close(belief[name], expected[name])


@KINDS
def test_order_of_shots_does_not_matter(kind: str) -> None:
    _, guide = pair(kind)
    episode = make_tasks(3, 7, num_support=3).episode()
    backwards = replace(
        episode,
        query=episode.query.select_shots(torch.arange(3, -1, -1).expand(3, -1)),
        support=episode.support.select_shots(torch.arange(2, -1, -1).expand(3, -1)),
    )
    first = guide.belief(episode).factorized().natural
    second = guide.belief(backwards).factorized().natural
    for name in first:
        assert_close(first[name], second[name], rtol=1e-6, atol=1e-6)


@KINDS
def test_one_task_never_disturbs_another(kind: str) -> None:
    _, guide = pair(kind)
    episode = make_tasks(3, 4).episode()
    values = episode.query.values.clone()
    values[1] *= -30.0
    first = guide.belief(episode).factorized().natural
    second = guide.belief(with_query(episode, values=values)).factorized().natural
    for name in first:
        assert torch.equal(first[name][[0, 2]], second[name][[0, 2]])
        assert not torch.equal(first[name][1], second[name][1])


@KINDS
def test_a_belief_that_the_episode_has_is_not_computed_again(kind: str) -> None:
    model, guide = pair(kind)
    episode = make_tasks(3, 4).episode()
    expected = guide.belief(episode).moments()[0]
    belief = model.with_belief(episode)
    assert_close(guide.belief(belief).moments()[0], expected)
    far = Gaussian.around(SEPARATE, torch.full((3, 3), 50.0).double(), 1e8)
    assert_close(
        guide.belief(replace(episode, belief=far)).moments()[0],
        far.moments()[0],
        rtol=1e-3,
        atol=0.0,
    )


@KINDS
def test_swapping_the_model_s_evidence_changes_the_guide_at_once(kind: str) -> None:
    model, guide = pair(kind)
    episode = make_tasks(3, 4).episode()
    before = guide.belief(episode).moments()[1]
    model.prior.evidence = ph.GaussNewton(1, max_step_sd=1e-6)
    model.prior.interval_scale.fill_(3.0)
    after = guide.belief(episode).moments()[1]
    assert not torch.equal(before, after)
    assert torch.equal(after, guide.belief(episode).moments()[1])


def test_interval_scale_widens_the_evidence_of_support_and_query_once_each() -> None:
    model, guide = pair("gauss_newton")
    episode = make_tasks(3, 6, num_support=3).episode()
    mean, plain = guide.belief(episode).moments()
    population = model.prior.population().gaussian().own.precision
    evidence = guide.belief(episode).gaussian().task_marginal.precision - population
    model.prior.interval_scale.fill_(2.0)
    wide = guide.belief(episode).gaussian().task_marginal.precision
    assert_close(wide, population + evidence / 4.0)
    assert (guide.belief(episode).moments()[1] > plain).all()
    assert mean.isfinite().all()


@KINDS
def test_model_and_guide_copied_together_stay_a_pair(kind: str) -> None:
    both = pair(kind)
    episode = make_tasks(3, 4).episode()
    expected = both[1].belief(episode).moments()[0]
    model, guide = copy.deepcopy(both)
    assert guide.model is model
    with torch.no_grad():
        for parameter in {*model.parameters(), *guide.parameters()}:
            parameter.add_(0.1)
    assert torch.equal(both[1].belief(episode).moments()[0], expected)
    assert not torch.equal(guide.belief(episode).moments()[0], expected)


# ---- computed evidence ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gauss_newton", "encoder, gauss_newton"])
@pytest.mark.parametrize("inferred", [False, True])
def test_computed_evidence_gives_the_exact_marginals(kind: str, inferred: bool) -> None:
    _, guide = pair(kind, inferred=inferred)
    episode = make_tasks(4, 6, num_support=2, inferred=inferred).episode()
    mean, scale = guide.belief(episode).moments()
    truth = exact(episode.support, episode, inferred=inferred)
    assert_close(mean, truth.mean[:, :3], **CLOSE)
    assert_close(scale, truth.covariance.diagonal(dim1=-2, dim2=-1)[:, :3].sqrt(), **CLOSE)


def test_a_declared_full_normal_gives_the_exact_posterior() -> None:
    _, guide = pair("gauss_newton", sites=TOGETHER)
    episode = make_tasks(4, 6, num_support=2).episode()
    q = guide.belief(episode).distributions()["both"]
    truth = exact(episode.support, episode, loc=(0.0, 0.0, 0.0), scale=(1.0, 1.0, 1.0))
    assert_close(q.mean, truth.mean[:, :3], **CLOSE)
    assert_close(q.covariance_matrix, truth.covariance[:, :3, :3], **CLOSE)


@pytest.mark.parametrize("num_support", [1, 3])
def test_computed_standard_deviations_are_exact_and_shrink_as_shots_are_added(
    num_support: int,
) -> None:
    model, guide = pair("gauss_newton")
    everything = make_tasks(4, num_support + 20, num_support=num_support).episode()
    before = model.prior.belief(everything.support, model).moments()[1][:, :1]
    for num_shots in (1, 2, 5, 20):
        shots = everything.query.select_shots(torch.arange(num_shots).expand(4, -1))
        episode = replace(everything, query=shots)
        scale = guide.belief(episode).moments()[1][:, :1]
        expected = exact(episode.support, episode).covariance[:, :1, 0].sqrt()
        assert ((scale / expected - 1.0).abs() < 1e-3).all()
        assert (scale < before).all()
        before = scale


def test_with_an_unconditional_prior_only_the_query_counts() -> None:
    _, guide = unconditional(COMPUTED)
    episode = make_tasks(4, 5, num_support=2).episode()
    q = guide.belief(episode).distributions()["bend"]
    assert_close(q.mean, exact(episode).mean[:, 1:3], **CLOSE)


def test_starts_are_drawn_from_their_exact_joint_posterior_with_the_task_s_latents() -> None:
    _, guide = pair("gauss_newton", inferred=True, sites=TOGETHER)
    episode = make_tasks(2, 4, num_support=1, inferred=True).episode()
    torch.manual_seed(1)
    with torch.no_grad(), pyro.plate("draw", 40_000, dim=-2):
        values = guide(episode)
    assert values["start"].shape == (40_000, 2, 3, 1)
    joint = torch.cat([values["both"], values["start"].squeeze(-1)], -1)
    # The support's start is a latent too; the exact posterior has it before those of the query.
    truth = exact(
        episode.support, episode, inferred=True, loc=(0.0, 0.0, 0.0), scale=(1.0, 1.0, 1.0)
    )
    rows = torch.tensor([0, 1, 2, 4, 5, 6])
    for task in range(2):
        goal = truth.covariance[task][rows][:, rows]
        assert_close(joint[:, task].mean(0), truth.mean[task, rows], atol=0.01, rtol=0.0)
        ratio = torch.linalg.solve(goal, torch.cov(joint[:, task].T))
        assert (ratio - torch.eye(6)).abs().max() < 0.15


class Offsets(ph.HybridModel):
    """x = z + a + b t for every shot: a and b share the information of a short trajectory."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = ph.UnconditionalPrior(z=Normal(1))

    def forward(self, episode: ph.Episode) -> None:
        p = self.prior(episode)
        with episode.plate:
            z = pyro.sample("z", p["z"])
            wide = torch.zeros(*episode.query.shape, 1, dtype=torch.float64)
            a = pyro.sample("a", dist.Normal(wide, 1.0).to_event(2))
            b = pyro.sample("b", dist.Normal(wide + 0.5, 2.0).to_event(2))
            mean = z[..., None, :] + a + b * episode.query.times
            x = dist.Normal(mean.unsqueeze(-1), 0.5)
            pyro.sample("x", x.to_event(3), obs=episode.query.values)


def test_several_latents_of_a_shot_are_drawn_jointly() -> None:
    model = Offsets().double()
    guide = ph.AmortizedGuide(model, COMPUTED)
    episode = replace(make_tasks(1, 3).episode(), support=None)  # two shots
    torch.manual_seed(2)
    with torch.no_grad(), pyro.plate("draw", 40_000, dim=-2):
        values = guide(episode)
    parts = [values["z"].squeeze(-2), values["a"][..., 0, :, 0], values["b"][..., 0, :, 0]]
    draws = torch.cat(parts, -1)  # z, a1, a2, b1, b2
    t = episode.query.times
    one = torch.ones(POINTS, dtype=torch.float64)
    zero = torch.zeros(POINTS, dtype=torch.float64)
    first = torch.stack([one, one, zero, t, zero], -1)
    second = torch.stack([one, zero, one, zero, t], -1)
    design = torch.cat([first, second])
    weight = torch.tensor([1.0, 1.0, 1.0, 0.25, 0.25], dtype=torch.float64)
    precision = torch.diag(weight) + design.T @ design / 0.25
    center = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5], dtype=torch.float64)
    right = weight * center + design.T @ episode.query.values.flatten() / 0.25
    assert_close(draws.mean(0), torch.linalg.solve(precision, right), atol=0.03, rtol=0.0)
    assert (precision @ torch.cov(draws.T) - torch.eye(5)).abs().max() < 0.2


def test_no_gradient_flows_through_the_computed_guide() -> None:
    _, guide = pair("gauss_newton", inferred=True)
    values = guide(make_tasks(3, 4).episode())
    assert not any(value.requires_grad for value in values.values())


@dataclass(frozen=True)
class Recorded:
    """Gauss-Newton that remembers where it was told to begin."""

    evidence: ph.GaussNewton
    starts: list[Tensor] = field(default_factory=list)

    @property
    def network(self) -> nn.Module | None:
        return None

    def __call__(
        self,
        belief: Belief,
        shots: ph.Shots,
        program: Program | None,
        *,
        start: Belief | None = None,
        given: ph.Shots | None = None,
    ) -> Belief:
        assert start is not None
        self.starts.append(start.moments()[0])
        return self.evidence(belief, shots, program, start=start, given=given)

    def bind(self, families: Mapping[str, Family], context: nn.Module | None = None) -> Recorded:
        return self


def test_computed_evidence_begins_where_the_encoder_points_and_ends_at_the_same_posterior() -> None:
    torch.manual_seed(0)
    model = Line(COMPUTED)
    recorded = Recorded(COMPUTED)
    guide = ph.AmortizedGuide(model, ph.Encoder(encoder()).then(recorded)).double()
    episode = make_tasks(4, 6, num_support=2).episode()
    mean, scale = guide.belief(episode).moments()
    before = model.prior.belief(episode.support, model)
    proposal = guide.evidence.first.propose(before, episode.query, episode.support)
    assert_close(recorded.starts[0], proposal.moments()[0])
    assert (recorded.starts[0] - before.moments()[0]).abs().max() > 0.01
    truth = exact(episode.support, episode)
    assert_close(mean, truth.mean[:, :3], **CLOSE)
    assert_close(scale, truth.covariance.diagonal(dim1=-2, dim2=-1)[:, :3].sqrt(), **CLOSE)


# ---- the encoder alone ---------------------------------------------------------------------------


def test_a_learned_guide_adds_its_head_s_increment_of_query_and_support() -> None:
    model, guide = pair("encoder")
    episode = make_tasks(3, 4).episode()
    belief = guide.belief(episode).natural
    prior = model.prior.belief(episode.support).natural
    network = guide.network
    query = network.encoder(episode.query.sorted_shots)
    context = model.prior.network.encoder(episode.support.sorted_shots)
    assert network.context is model.prior.network.encoder
    raw = network.head(torch.cat([query, context], -1))
    pieces = dict(zip(prior, raw.split([2, 4], -1), strict=True))
    for name, family in SEPARATE.items():
        increment = family.evidence(pieces[name].unflatten(-1, (family.n, 2)))
        assert torch.equal(belief[name], prior[name] + increment)


def test_a_learned_guide_depends_on_the_order_of_shots_in_no_bit() -> None:
    _, guide = pair("encoder")
    episode = make_tasks(3, 7, num_support=3).episode()
    order = torch.tensor([2, 0, 3, 1]).expand(3, -1)
    shuffled = replace(episode, query=episode.query.select_shots(order))
    first, second = (guide.belief(e).factorized().natural for e in (episode, shuffled))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_learned_guide_leaves_the_starts_their_prior() -> None:
    model, guide = pair("encoder", inferred=True)
    episode = make_tasks(3, 4).episode()
    nodes = poutine.trace(guide).get_trace(episode).nodes
    expected = poutine.trace(model).get_trace(episode).nodes["start"]["fn"]
    assert (kl_divergence(nodes["start"]["fn"], expected) == 0.0).all()


def test_a_learned_guide_without_a_support_is_refused_if_it_reads_one() -> None:
    _, guide = pair("encoder")
    episode = replace(make_tasks(3, 4).episode(), support=None)
    message = r"expected the support, which this encoder's evidence depends on; got none"
    with pytest.raises(ValueError, match=message):
        guide(episode)


def test_gradients_reach_every_parameter_of_a_learned_guide() -> None:
    _, guide = pair("encoder")
    sum(value.sum() for value in guide(make_tasks(3, 4).episode()).values()).backward()
    missing = {name for name, p in guide.named_parameters() if p.grad is None or not p.grad.any()}
    # The population is trained by the model's amortization loss, the noise by the likelihood.
    assert missing == {"model.prior.raw", "model.noise_unconstrained"}


@pytest.fixture(scope="module")
def trained() -> tuple[Line, ph.AmortizedGuide]:
    """A learned guide on one latent, trained with one to four support shots of eight."""
    torch.manual_seed(0)
    model = Line(sites={"slope": Normal(1, loc=0.5, scale=2.0)}, noise=2.0)
    guide = ph.AmortizedGuide(model, encoder())
    tasks = in_float32(make_tasks(4000, 8, latents=1, noise=2.0))
    for network in (guide.network, model.prior.network):
        network.encoder.standardize(tasks.values, tasks.observed)
    optim = torch.optim.Adam({*model.parameters(), *guide.parameters()}, 1e-2)
    svi = ph.SVI(model, guide, optim)
    schedule = torch.optim.lr_scheduler.LinearLR(optim, 1.0, 0.01, total_iters=700)
    streams = [replace(tasks, num_support=k).batches(128, seed=k) for k in (1, 2, 4)]
    for i in range(700):
        svi.step(next(streams[i % 3]))
        schedule.step()
    return model, guide


def ratios(
    guide: ph.AmortizedGuide, num_support: int, num_query: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard deviations of guide and exact posterior, and the guide's error in units of the latter."""
    tasks = make_tasks(
        300, num_support + num_query, seed=99, num_support=num_support, latents=1, noise=2.0
    )
    episode = tasks.episode()
    truth = exact(episode.support, episode, loc=(0.5,), scale=(2.0,), noise=2.0)
    with torch.no_grad():
        q = guide.belief(in_float32(tasks).episode()).distributions()["slope"]
    expected = truth.covariance[:, 0, 0].sqrt()
    error = (q.mean.squeeze(-1) - truth.mean[:, 0]) / expected
    return q.stddev.squeeze(-1), expected, error


@pytest.mark.slow
@pytest.mark.parametrize(("num_support", "num_query"), [(1, 7), (2, 6), (4, 4)])
def test_learned_standard_deviations_are_within_a_tenth_of_the_exact_ones(
    trained: tuple[Line, ph.AmortizedGuide], num_support: int, num_query: int
) -> None:
    scale, expected, error = ratios(trained[1], num_support, num_query)
    assert 0.9 < (scale / expected).mean() < 1.1
    assert ((scale / expected - 1.0).abs() < 0.1).double().mean() > 0.8
    assert error.square().mean() < 0.3  # small against the posterior's standard deviation


@pytest.mark.slow
def test_learned_standard_deviations_shrink_as_shots_are_added(
    trained: tuple[Line, ph.AmortizedGuide],
) -> None:
    model, guide = trained
    tasks = in_float32(make_tasks(100, 9, seed=98, num_support=4, latents=1, noise=2.0))
    episode = tasks.episode()
    scales = []
    with torch.no_grad():
        for size in (1, 2, 3, 4):
            support = episode.support.select_shots(torch.arange(size).expand(100, -1))
            scales.append(model.prior.belief(support).moments()[1])
        scales.append(guide.belief(episode).moments()[1])
    for before, after in zip(scales, scales[1:], strict=False):
        assert (after < before).double().mean() > 0.95
        assert after.mean() < before.mean()


@pytest.mark.slow
def test_the_learned_noise_is_the_true_one(trained: tuple[Line, ph.AmortizedGuide]) -> None:
    assert 1.9 < trained[0].noise.item() < 2.1


# ---- as a Pyro guide -----------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("inferred", [False, True])
def test_the_guide_samples_every_latent_of_the_program_and_nothing_else(
    kind: str, inferred: bool
) -> None:
    model, guide = pair(kind, inferred=inferred)
    episode = make_tasks(3, 4).episode()
    with pyro.plate("particles", 5, dim=-2):
        ours = poutine.trace(guide).get_trace(episode)
        theirs = poutine.trace(poutine.replay(model, trace=ours)).get_trace(episode)
    latent = set(theirs.stochastic_nodes) - {"task", "particles"}
    assert set(ours.stochastic_nodes) - {"task", "particles"} == latent
    assert latent == {"slope", "bend"} | ({"start"} if inferred else set())
    ours.compute_log_prob()
    theirs.compute_log_prob()
    for name in latent:
        assert ours.nodes[name]["value"].shape[:2] == (5, 3)
        assert ours.nodes[name]["log_prob"].shape == (5, 3)
        assert theirs.nodes[name]["log_prob"].shape == (5, 3)


def test_a_guide_gives_the_truth_more_density_than_its_prior() -> None:
    model, guide = pair("gauss_newton", sites=TOGETHER)
    tasks = make_tasks(200, 6)
    episode = tasks.episode()
    truth = torch.cat(list(tasks.true_latents.values()), -1)
    q = guide.belief(episode).distributions()["both"]
    p = model.prior.belief(episode.support, model).distributions()["both"]
    assert q.log_prob(truth).mean() > p.log_prob(truth).mean() + 0.5


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize("evidence", [None, "encoder", ph.Encoder])
def test_what_is_no_evidence_is_refused(evidence: object) -> None:
    message = r"expected evidence: an encoder, ph\.GaussNewton\(\.\.\.\), or .*; got \w+\. Pass"
    with without_type_checks(), pytest.raises(TypeError, match=message):
        ph.AmortizedGuide(Line(), evidence)


def test_a_model_without_a_prior_is_refused() -> None:
    message = r"a model whose attribute `prior` is a SupportPrior or .*; got Linear with prior = No"
    with pytest.raises(TypeError, match=message):
        ph.AmortizedGuide(nn.Linear(2, 2), COMPUTED)


def test_a_prior_in_place_of_its_model_is_refused() -> None:
    message = (
        r"a model whose attribute `prior` .*; got SupportPrior with prior = NoneType\. Pass the"
    )
    with pytest.raises(TypeError, match=message):
        ph.AmortizedGuide(Line().prior, COMPUTED)
