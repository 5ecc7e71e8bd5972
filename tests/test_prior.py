"""SupportPrior: what it may depend on, what it returns, and what trains it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
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
    without_type_checks,
)

import pyro_hybrid as ph
from pyro_hybrid.beliefs.belief import Belief, Factorized, Gaussian
from pyro_hybrid.beliefs.families import Family, FullNormal, LogNormal, Normal
from pyro_hybrid.data.segments import to_segments
from pyro_hybrid.evidence.encoder import Then
from pyro_hybrid.evidence.protocol import Evidence
from pyro_hybrid.programs.run import Program

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
EVIDENCE: Mapping[str, Callable[[], Evidence]] = {
    "encoder": lambda: ph.Encoder(encoder()),
    "gauss_newton": lambda: Alone(ph.GaussNewton(2)),
    "encoder, gauss_newton": lambda: ph.Encoder(encoder()).then(ph.GaussNewton(2)),
}
KINDS = pytest.mark.parametrize("kind", EVIDENCE)


@dataclass(frozen=True)
class Alone:
    """Another evidence, whose calls are counted; the toy puts no encoder before it."""

    evidence: Evidence
    calls: list[int] = field(default_factory=list)

    @property
    def network(self) -> nn.Module | None:
        return self.evidence.network

    def __call__(
        self,
        belief: Belief,
        shots: ph.Shots,
        program: Program | None,
        *,
        start: Belief | None = None,
        given: ph.Shots | None = None,
    ) -> Belief:
        self.calls.append(shots.shape[0])
        return self.evidence(belief, shots, program, start=start, given=given)

    def bind(self, families: Mapping[str, Family], context: nn.Module | None = None) -> Alone:
        return Alone(self.evidence.bind(families, context), self.calls)


def support(num_shots: int, num_tasks: int = 3, seed: int = 0) -> ph.Shots:
    tasks = in_float32(make_tasks(num_tasks, num_shots + 1, seed, num_support=num_shots))
    shots = tasks.episode().support
    assert shots is not None
    return shots


def line(
    evidence: Evidence | None = None,
    *,
    inferred: bool = False,
    sites: dict[str, Family] | None = None,
    seed: int = 0,
) -> Line:
    """Build the toy, untrained, with an encoder whose increments differ from zero."""
    torch.manual_seed(seed)
    return Line(evidence, inferred=inferred, sites=sites)


def build(kind: str, *, inferred: bool = False) -> Line:
    torch.manual_seed(0)
    return Line(EVIDENCE[kind](), inferred=inferred)


def natural(model: Line, shots: ph.Shots | None) -> Tensor:
    """Natural parameters of all sites given a support, (task, number)."""
    belief = model.prior.belief(shots, model).factorized()
    return torch.cat([x.flatten(-2) for x in belief.natural.values()], -1)


def reverse(shots: ph.Shots) -> ph.Shots:
    num_tasks, num_shots = shots.shape
    return shots.select_shots(torch.arange(num_shots - 1, -1, -1).expand(num_tasks, -1))


# ---- laws of every evidence ----------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("inferred", [False, True])
@pytest.mark.parametrize("num_shots", [2, 5, 33])
def test_order_of_shots_does_not_matter_to_the_last_bit(
    kind: str, inferred: bool, num_shots: int
) -> None:
    model = build(kind, inferred=inferred)
    shots = support(num_shots)
    expected = natural(model, shots)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(3, num_shots, generator=generator).argsort(1)
        assert torch.equal(natural(model, shots.select_shots(order)), expected)


@KINDS
def test_order_of_shots_does_not_matter_if_observations_are_missing(kind: str) -> None:
    mask = torch.rand(3, 6, POINTS, 1, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, :, 0] = True
    shots = make_tasks(3, 6, num_support=5, mask=mask).episode().support
    model = build(kind).double()
    backwards = reverse(shots)
    assert not torch.equal(backwards.observed, shots.observed)
    assert torch.equal(natural(model, backwards), natural(model, shots))


@KINDS
def test_order_of_shots_does_not_matter_if_they_are_cut_into_segments(kind: str) -> None:
    model = build(kind)
    shots = support(4)
    segments = to_segments(shots, 2)
    assert torch.equal(natural(model, to_segments(reverse(shots), 2)), natural(model, segments))


@KINDS
@pytest.mark.parametrize("num_shots", [1, 2, 7, 100])
def test_any_number_of_shots_from_one_to_a_hundred_is_read(kind: str, num_shots: int) -> None:
    model = build(kind)
    p = model.prior.belief(support(num_shots), model).distributions()
    assert p["slope"].batch_shape == p["bend"].batch_shape == (3,)
    assert p["slope"].event_shape == (1,)
    assert p["bend"].event_shape == (2,)
    assert torch.isfinite(natural(model, support(num_shots))).all()


@KINDS
def test_one_task_never_disturbs_another(kind: str) -> None:
    model = build(kind)
    shots = support(3)
    values = shots.values.clone()
    values[1] *= -30.0
    spoiled = replace(shots, values=values)
    before, after = natural(model, shots), natural(model, spoiled)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])
    alone = natural(model, shots.select_tasks(torch.tensor([2])))
    assert_close(alone[0], before[2], rtol=1e-4, atol=1e-4)


@KINDS
def test_support_without_any_observation_leaves_the_population(kind: str) -> None:
    model = build(kind)
    shots = support(3)
    nothing = torch.zeros_like(shots.scored)
    silent = replace(shots, observed=nothing, scored=nothing)
    belief = model.prior.belief(silent, model).factorized()
    population = model.prior.population()
    for name, expected in population.natural.items():
        assert_close(belief.natural[name], expected.expand(3, -1, -1), rtol=1e-5, atol=1e-6)
    assert not torch.equal(natural(model, shots), natural(model, silent))


@KINDS
def test_a_task_without_any_observation_has_the_population_and_its_neighbors_don_t(
    kind: str,
) -> None:
    model = build(kind)
    shots = support(3)
    is_known = torch.tensor([True, False, True]).view(-1, 1, 1, 1)
    spoiled = replace(shots, observed=shots.observed & is_known, scored=shots.scored & is_known)
    belief = natural(model, spoiled)
    assert_close(belief[1], natural(model, None), rtol=1e-5, atol=1e-6)
    assert torch.equal(belief[[0, 2]], natural(model, shots)[[0, 2]])


@KINDS
def test_belief_is_the_population_plus_an_increment(kind: str) -> None:
    model = build(kind).double()
    shots = make_tasks(3, 4, num_support=3).episode().support
    before = model.prior.population().expand(3)
    increment = model.prior.evidence(before, shots.sorted_shots, model)
    expected = (before + increment).factorized().natural
    belief = model.prior.belief(shots, model).factorized().natural
    for name in SEPARATE:
        assert_close(belief[name], expected[name])


@KINDS
def test_distributions_have_the_natural_parameters_of_the_belief(kind: str) -> None:
    torch.manual_seed(0)
    sites = {"slope": LogNormal(1), "bend": Normal(2)}
    model = Line(EVIDENCE[kind](), sites=sites)
    belief = model.prior.belief(support(3), model).factorized()
    for name, fn in belief.distributions().items():
        assert_close(sites[name].natural(fn), belief.natural[name])


@KINDS
def test_without_a_support_the_prior_is_the_population(kind: str) -> None:
    model = build(kind)
    episode = in_float32(make_tasks(3, 4)).episode()
    p = model.prior(replace(episode, support=None))
    assert p["slope"].batch_shape == ()
    assert p["slope"].mean.item() == 0.5
    assert p["slope"].stddev.item() == 2.0
    assert isinstance(model.prior.belief(None, model), Factorized)


@KINDS
def test_a_prior_trained_on_some_shots_reads_other_numbers_of_them(kind: str) -> None:
    model = build(kind)
    guide = ph.AmortizedGuide(model, encoder())
    tasks = in_float32(make_tasks(8, 5, num_support=2))
    svi = ph.SVI(model, guide, torch.optim.Adam(model.parameters(), 1e-3))
    for episode in [tasks.episode(1), tasks.episode(2), tasks.episode(4)]:
        svi.step(episode)
    for num_shots in (1, 4, 50):
        assert torch.isfinite(natural(model, support(num_shots))).all()


@KINDS
def test_a_copy_has_evidence_of_its_own(kind: str) -> None:
    model = build(kind)
    shots = support(3)
    other = copy.deepcopy(model)
    assert torch.equal(natural(other, shots), natural(model, shots))
    before = natural(model, shots)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3)
    assert torch.equal(natural(model, shots), before)
    assert not torch.equal(natural(other, shots), before)


# ---- nothing is remembered -----------------------------------------------------------------------


def test_swapping_evidence_changes_the_belief_at_once() -> None:
    shots = make_tasks(3, 4, num_support=3).episode().support
    model = line(Alone(ph.GaussNewton(8))).double()
    right = natural(model, shots)
    wrong = []
    for _ in range(20):
        model.prior.evidence = ph.GaussNewton(1, max_step_sd=1e-6)
        wrong.append(natural(model, shots))
        model.prior.evidence = ph.GaussNewton(8)
        assert torch.equal(natural(model, shots), right)
    assert all(torch.equal(x, wrong[0]) for x in wrong)
    assert (wrong[0] - right).abs().max() > 0.1


@KINDS
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_the_optimizer_changes_the_belief_at_once(kind: str, fused: bool) -> None:
    model = build(kind)
    shots = support(3)
    before = natural(model, shots)
    optim = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.step()
    after = natural(model, shots)
    assert torch.equal(after, natural(copy.deepcopy(model), shots))
    assert not torch.equal(after, before)


def test_evidence_compares_by_value() -> None:
    net = encoder()
    assert ph.Encoder(net) == ph.Encoder(net)
    assert ph.Encoder(net) != ph.Encoder(encoder())
    chain = ph.Encoder(net).then(ph.GaussNewton(3))
    assert chain == ph.Encoder(net).then(ph.GaussNewton(3))
    assert chain != ph.Encoder(net).then(ph.GaussNewton(4))
    assert chain == Then(ph.Encoder(net), ph.GaussNewton(3))
    assert hash(chain) == hash(Then(ph.Encoder(net), ph.GaussNewton(3)))


@KINDS
def test_reading_a_support_leaves_no_attribute_behind(kind: str) -> None:
    model = build(kind)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.prior.belief(support(3), model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# ---- who computes the belief ---------------------------------------------------------------------


def counted() -> tuple[Line, ph.AmortizedGuide, list[int], list[int]]:
    """A model and its guide, and the lists that count the calls of their evidence."""
    support_evidence = Alone(ph.Encoder(encoder()).then(ph.GaussNewton(1)))
    query_evidence = Alone(ph.GaussNewton(1))
    model = line(support_evidence)
    guide = ph.AmortizedGuide(model, query_evidence)
    return model, guide, support_evidence.calls, query_evidence.calls


@pytest.mark.parametrize(
    "loss",
    [
        TraceMeanField_ELBO(),
        TraceMeanField_ELBO(num_particles=3, vectorize_particles=True),
        Trace_ELBO(num_particles=3),
    ],
    ids=["one particle", "particles at once", "particles one by one"],
)
def test_a_step_of_svi_computes_the_belief_once(loss: object) -> None:
    model, guide, calls, _ = counted()
    episode = in_float32(make_tasks(3, 4)).episode()
    svi = ph.SVI(model, guide, torch.optim.Adam(model.parameters(), 1e-3), loss)
    svi.step(episode)
    assert calls == [3]
    svi.evaluate_loss(episode)
    assert calls == [3, 3]


def test_running_a_model_computes_the_belief_once_and_only_if_it_is_not_there() -> None:
    model, _, calls, _ = counted()
    episode = in_float32(make_tasks(3, 4)).episode()
    model(episode)
    assert calls == [3]
    model(replace(episode, belief=model.prior.population().expand(3)))
    model(replace(episode, support=None))
    assert calls == [3]
    assert episode.belief is None


def test_draws_predictions_and_arviz_compute_the_belief_once_each() -> None:
    model, guide, calls, query_calls = counted()
    episode = in_float32(make_tasks(3, 4)).episode()
    ph.draws(model, guide, episode, 5)
    assert (len(calls), len(query_calls)) == (1, 1)
    ph.predict(model, episode, 5)
    assert (len(calls), len(query_calls)) == (2, 1)
    ph.to_arviz(model, guide, episode, 5)
    assert (len(calls), len(query_calls)) == (3, 2)


def test_a_given_belief_is_what_the_program_samples_from() -> None:
    model = line()
    episode = in_float32(make_tasks(3, 4)).episode()
    mean = torch.full((3, 3), 7.0)
    belief = Gaussian.around(SEPARATE, mean, 1e8)
    p = model.prior(replace(episode, belief=belief))
    assert_close(p["slope"].mean, mean[:, :1])
    trace = poutine.trace(model).get_trace(replace(episode, belief=belief))
    assert_close(trace.nodes["bend"]["value"], mean[:, 1:], atol=1e-2, rtol=0.0)


def test_changing_an_episode_drops_its_belief() -> None:
    model = line()
    episode = model.with_belief(in_float32(make_tasks(3, 4)).episode())
    assert episode.belief is not None
    assert episode.select_tasks(torch.tensor([1])).belief is None
    assert episode.double().belief is None
    assert episode.simulation().belief is episode.belief  # the support stays as it is


# ---- computed evidence ---------------------------------------------------------------------------


@pytest.mark.parametrize("inferred", [False, True])
def test_declared_families_get_the_marginals_of_the_exact_posterior(inferred: bool) -> None:
    shots = make_tasks(4, 4, num_support=3, inferred=inferred).episode().support
    model = line(ph.GaussNewton(8), inferred=inferred).double()
    p = model.prior.belief(shots, model).distributions()
    truth = exact(shots, inferred=inferred)
    sd = truth.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert_close(p["slope"].mean, truth.mean[:, :1], **CLOSE)
    assert_close(p["bend"].mean, truth.mean[:, 1:3], **CLOSE)
    assert_close(p["slope"].stddev, sd[:, :1], **CLOSE)
    assert_close(p["bend"].stddev, sd[:, 1:3], **CLOSE)


def test_a_belief_given_a_support_holds_no_latents_of_its_shots() -> None:
    shots = make_tasks(4, 4, num_support=3, inferred=True).episode().support
    model = line(ph.GaussNewton(8), inferred=True).double()
    assert model.prior.belief(shots, model).gaussian().shots is None


def test_a_declared_full_normal_gets_the_full_covariance() -> None:
    shots = make_tasks(4, 4, num_support=3).episode().support
    model = line(ph.GaussNewton(8), sites=TOGETHER).double()
    p = model.prior.belief(shots, model).distributions()["both"]
    truth = exact(shots, loc=(0.0, 0.0, 0.0), scale=(1.0, 1.0, 1.0))
    assert_close(p.covariance_matrix, truth.covariance[:, :3, :3], **CLOSE)
    assert_close(p.mean, truth.mean[:, :3], **CLOSE)
    assert (truth.covariance[:, 0, 1].abs() > 1e-3).all()


def test_a_full_normal_beside_another_site_gets_its_own_block() -> None:
    shots = make_tasks(4, 4, num_support=3).episode().support
    sites = {"slope": Normal(1), "bend": FullNormal(2)}
    model = line(ph.GaussNewton(8), sites=sites).double()
    p = model.prior.belief(shots, model).distributions()
    truth = exact(shots, loc=(0.0, 0.0, 0.0), scale=(1.0, 1.0, 1.0))
    assert_close(p["bend"].covariance_matrix, truth.covariance[:, 1:3, 1:3], **CLOSE)
    assert_close(p["slope"].stddev, truth.covariance[:, 0, 0].sqrt().unsqueeze(-1), **CLOSE)


def test_natural_parameters_are_the_population_plus_increments_of_each_set_of_shots() -> None:
    everything = make_tasks(3, 6, num_support=5).episode().support
    model = line(ph.GaussNewton(8), sites=TOGETHER).double()
    population = natural(model, None)

    def gain(*rows: int) -> Tensor:
        shots = everything.select_shots(torch.tensor(rows).expand(3, -1))
        return natural(model, shots) - population

    assert_close(gain(0, 1, 2, 3, 4), gain(0, 1) + gain(2, 3, 4), atol=1e-4, rtol=1e-5)


def test_computed_evidence_is_added_to_the_population() -> None:
    shots = make_tasks(3, 4, num_support=3).episode().support
    model = line(ph.GaussNewton(8)).double()
    with torch.no_grad():
        model.prior.raw.copy_(torch.tensor([0.7, -0.4, -0.2, 0.1, 0.5, -0.3]))
    mean, scale = (x.detach() for x in model.prior.population().moments())
    truth = exact(shots, loc=tuple(mean.tolist()), scale=tuple(scale.tolist()))
    p = model.prior.belief(shots, model).distributions()
    assert_close(p["bend"].mean, truth.mean[:, 1:3], **CLOSE)
    assert not torch.equal(mean, torch.tensor([0.5, 0.0, 0.0], dtype=mean.dtype))


def test_more_shots_make_a_computed_prior_narrower() -> None:
    everything = make_tasks(3, 101, num_support=100).episode().support
    model = line(ph.GaussNewton(6)).double()
    scales = []
    for num_shots in (1, 3, 10, 100):
        shots = everything.select_shots(torch.arange(num_shots).expand(3, -1))
        scales.append(model.prior.belief(shots, model).moments()[1])
    assert all((after < before).all() for before, after in zip(scales, scales[1:], strict=False))


def test_an_encoder_only_proposes_where_gauss_newton_begins() -> None:
    shots = make_tasks(4, 4, num_support=3).episode().support
    alone = line(Alone(ph.GaussNewton(8))).double()
    expected = natural(alone, shots)
    for seed in range(3):
        model = line(ph.GaussNewton(8), seed=seed).double()
        assert_close(natural(model, shots), expected, **CLOSE)


def test_interval_scale_widens_the_evidence_and_moves_no_mean() -> None:
    shots = make_tasks(4, 4, num_support=3).episode().support
    model = line(ph.GaussNewton(8)).double()
    before = model.prior.belief(shots, model)
    model.prior.interval_scale.fill_(2.0)
    after = model.prior.belief(shots, model)
    assert_close(after.moments()[0], before.moments()[0])
    population = model.prior.population().gaussian().own.precision
    evidence = before.gaussian().task_marginal.precision - population
    expected = population + evidence / 4.0
    assert_close(after.gaussian().task_marginal.precision, expected)
    assert (after.moments()[1] > before.moments()[1]).all()


def test_interval_scale_leaves_a_learned_belief_alone() -> None:
    model = line()
    before = natural(model, support(3))
    model.prior.interval_scale.fill_(2.0)
    assert torch.equal(natural(model, support(3)), before)


def test_interval_scale_is_saved_with_the_model() -> None:
    model = line(ph.GaussNewton(2))
    model.prior.interval_scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
    other = line(ph.GaussNewton(2))
    other.load_state_dict(model.state_dict())
    assert other.prior.interval_scale.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("kind", ["gauss_newton", "encoder, gauss_newton"])
def test_no_gradient_flows_through_computed_evidence(kind: str) -> None:
    model = build(kind)
    assert not natural(model, support(3)).requires_grad


# ---- what trains population and encoder ----------------------------------------------------------


def gradients(svi: ph.SVI, episode: ph.Episode) -> dict[str, Tensor]:
    torch.manual_seed(3)
    svi.backward(episode)
    return {
        name: parameter.grad.clone()
        for name, parameter in svi.model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }


@KINDS
def test_amortization_leaves_the_value_of_the_elbo_as_it_is(kind: str) -> None:
    model = build(kind)
    guide = ph.AmortizedGuide(model, ph.GaussNewton(1))
    episode = in_float32(make_tasks(3, 4)).episode()
    svi = ph.SVI(model, guide, torch.optim.Adam(model.parameters()))
    torch.manual_seed(3)
    elbo = TraceMeanField_ELBO()(model, guide)(model.with_belief(episode))
    torch.manual_seed(3)
    assert svi.backward(episode).item() == elbo.item()
    torch.manual_seed(3)
    assert svi.evaluate_loss(episode) == elbo.item()


@KINDS
def test_amortization_trains_the_population_and_an_encoder_that_only_proposes(kind: str) -> None:
    model = build(kind)
    guide = ph.AmortizedGuide(model, ph.GaussNewton(1))
    svi = ph.SVI(model, guide, torch.optim.Adam(model.parameters()))
    trained = gradients(svi, in_float32(make_tasks(3, 4)).episode())
    assert set(trained) == {name for name, _ in model.named_parameters()}


@KINDS
def test_gradients_of_amortization_are_those_of_its_loss_alone(kind: str) -> None:
    model = build(kind)
    shots = support(3)
    loss = model.prior.amortization_loss(shots, model.prior.belief(shots, model))
    loss.backward()
    trained = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    proposing = {name for name, _ in model.named_parameters() if name.startswith("prior.network")}
    assert trained == {"prior.raw"} | (proposing if kind == "encoder, gauss_newton" else set())


def test_an_unconditional_prior_has_no_amortization_loss() -> None:
    prior = ph.UnconditionalPrior(**SEPARATE)
    assert prior.amortization_loss(support(3), prior.belief(support(3))).item() == 0.0


def test_without_a_support_there_is_no_amortization_loss() -> None:
    model = build("encoder, gauss_newton")
    assert model.prior.amortization_loss(None, model.prior.belief(None)).item() == 0.0


def test_training_moves_the_proposal_towards_the_computed_evidence() -> None:
    model = line(ph.GaussNewton(2))
    shots = support(3, num_tasks=16)
    belief = model.prior.belief(shots, model)
    goal = belief.moments()[0]

    def distance() -> float:
        with torch.no_grad():
            proposal = model.prior.evidence.first.propose(model.prior.population(), shots)
            return float((proposal.moments()[0] - goal).square().mean())

    first = distance()
    optim = torch.optim.Adam(model.prior.parameters(), 3e-2)
    for _ in range(40):
        optim.zero_grad()
        model.prior.amortization_loss(shots, model.prior.belief(shots, model)).backward()
        optim.step()
    assert distance() < 0.5 * first


def test_training_fits_the_population_to_what_an_encoder_infers_of_its_tasks() -> None:
    model = line()
    shots = support(3, num_tasks=16)
    with torch.no_grad():
        belief = model.prior.belief(shots)  # held fixed: the encoder isn't trained here
        mean, scale = belief.moments()
    optim = torch.optim.Adam([model.prior.raw], 0.05)
    for _ in range(200):
        optim.zero_grad()
        model.prior.amortization_loss(shots, belief).backward()
        optim.step()
    center, width = (x.detach() for x in model.prior.population().moments())
    # The Normal that is nearest to a mixture has its moments.
    assert_close(center, mean.mean(0), atol=0.02, rtol=0.0)
    variance = scale.square().mean(0) + mean.var(0, correction=0)
    assert_close(width.square(), variance, atol=0.0, rtol=0.1)


def test_a_population_is_fitted_to_the_moments_of_what_was_inferred() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(200, 3, generator=generator) * torch.tensor([1.0, 0.3, 2.0]) + 1.5
    scale = 0.1 + torch.rand(200, 3, generator=generator)
    mean[7] = torch.nan  # a task that could not be read doesn't count
    prior = line().prior
    prior.fit_population(mean, scale)
    center, width = (x.detach() for x in prior.population().moments())
    usable = torch.arange(200) != 7
    assert_close(center, mean[usable].mean(0), atol=1e-3, rtol=1e-3)
    variance = scale[usable].square().mean(0) + mean[usable].var(0, correction=0)
    assert_close(width.square(), variance, atol=1e-3, rtol=1e-2)
    assert prior.raw.grad is None


def test_a_population_without_any_usable_task_stays_as_it_is() -> None:
    prior = line().prior
    before = prior.raw.detach().clone()
    prior.fit_population(torch.full((4, 3), torch.nan), torch.ones(4, 3))
    assert torch.equal(prior.raw, before)


# ---- the encoder alone ---------------------------------------------------------------------------


def test_an_encoder_adds_its_head_s_increment_to_the_population() -> None:
    model = line()
    shots = support(3).sorted_shots
    network = model.prior.network
    raw = network.head(network.encoder(shots))
    pieces = dict(zip(SEPARATE, raw.split([2, 4], -1), strict=True))
    belief = model.prior.belief(shots).natural
    population = model.prior.population().natural
    for name, family in SEPARATE.items():
        increment = family.evidence(pieces[name].unflatten(-1, (family.n, 2)))
        assert torch.equal(belief[name], population[name] + increment)


def test_gradients_reach_an_encoder_through_the_distributions() -> None:
    model = line()
    model.prior.belief(support(3)).distributions()["slope"].mean.sum().backward()
    assert all(p.grad is not None for p in model.prior.network.encoder.parameters())


def test_a_bare_encoder_is_evidence() -> None:
    torch.manual_seed(0)
    bare = ph.SupportPrior(encoder(), **SEPARATE)
    torch.manual_seed(0)
    wrapped = ph.SupportPrior(ph.Encoder(encoder()), **SEPARATE)
    one, other = (prior.belief(support(3)).natural for prior in (bare, wrapped))
    assert all(torch.equal(one[name], other[name]) for name in SEPARATE)


# ---- the negative control ------------------------------------------------------------------------


def test_an_unconditional_prior_ignores_the_support() -> None:
    prior = ph.UnconditionalPrior(**SEPARATE)
    first, second, nothing = (
        prior.belief(shots).natural for shots in (support(3, seed=1), support(5, seed=2), None)
    )
    for name in SEPARATE:
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name], nothing[name])
    assert [name for name, _ in prior.named_parameters()] == ["raw"]


def test_an_unconditional_prior_still_draws_latents_for_each_task() -> None:
    episode = in_float32(make_tasks(3, 4)).episode()
    model = Line(prior=ph.UnconditionalPrior(**SEPARATE))
    slope = poutine.trace(model).get_trace(episode).nodes["slope"]["value"]
    assert slope.shape == (3, 1)
    assert len(set(slope.flatten().tolist())) == 3


# ---- names, and what it refuses ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evidence", "families", "raw", "network", "self", "program"])
@pytest.mark.parametrize("kind", [ph.SupportPrior, ph.UnconditionalPrior])
def test_a_site_may_have_any_name(kind: type[nn.Module], name: str) -> None:
    arguments = [encoder()] if kind is ph.SupportPrior else []
    prior = kind(*arguments, **{name: Normal(1)})
    assert list(prior.belief(support(3)).distributions()) == [name]


def test_a_prior_without_sites_is_refused_with_an_example() -> None:
    message = r"at least one site; got none.*omega=ph\.families\.LogNormal\(1\)"
    with pytest.raises(ValueError, match=message):
        ph.SupportPrior(encoder())


def test_a_site_without_a_family_is_refused() -> None:
    message = r"expected a family from ph\.families for 'omega'; got int.*omega=ph\.families"
    with without_type_checks(), pytest.raises(TypeError, match=message):
        ph.SupportPrior(encoder(), omega=1)


@pytest.mark.parametrize("evidence", [None, 3, "encoder", ph.GaussNewton], ids=str)
def test_what_is_no_evidence_is_refused(evidence: object) -> None:
    message = r"expected evidence: an encoder, ph\.GaussNewton\(\.\.\.\), or .*; got \w+\. Pass"
    with without_type_checks(), pytest.raises(TypeError, match=message):
        ph.SupportPrior(evidence, **SEPARATE)


def test_a_module_that_is_no_encoder_is_refused() -> None:
    message = r"expected an encoder: a module with the attribute `num_features`.*; got Linear"
    with pytest.raises(TypeError, match=message):
        ph.SupportPrior(nn.Linear(3, 3), **SEPARATE)


@pytest.mark.parametrize("kinds", ["GaussNewton and Encoder", "Encoder and Encoder"])
def test_what_cant_follow_is_refused(kinds: str) -> None:
    parts: dict[str, Any] = {
        "Encoder": ph.Encoder(encoder()).bind(SEPARATE),
        "GaussNewton": ph.GaussNewton(),
    }
    first, second = (parts[kind] for kind in kinds.split(" and "))
    message = rf"expected an encoder, and evidence that is computed.*; got {kinds}\. Let the enc"
    with without_type_checks(), pytest.raises(TypeError, match=message):
        Then(first, second)


def test_an_encoder_that_belongs_to_no_prior_is_refused() -> None:
    before = ph.UnconditionalPrior(**SEPARATE).population().expand(3)
    message = r"expected an encoder that belongs to a prior or a guide; got one that doesn't"
    with pytest.raises(ValueError, match=message):
        ph.Encoder(encoder())(before, support(3))


@pytest.mark.parametrize(
    "evidence", [ph.GaussNewton(), ph.Encoder(encoder()).then(ph.GaussNewton())]
)
def test_computed_evidence_without_a_program_is_refused(evidence: Evidence) -> None:
    prior = ph.SupportPrior(evidence, **SEPARATE)
    with pytest.raises(ValueError, match=r"a program to linearize; got none.*program=model"):
        prior.belief(support(2))


def test_computed_evidence_reads_a_plain_function() -> None:
    model = build("gauss_newton")
    shots = support(3)

    def program(episode: ph.Episode) -> Tensor:
        return model(episode)

    belief = model.prior.belief(shots, program).factorized()
    expected = model.prior.belief(shots, model).factorized()
    assert all(torch.equal(belief.natural[name], expected.natural[name]) for name in SEPARATE)


def test_trajectories_of_another_length_are_refused() -> None:
    shots = support(3)
    short = ph.Shots.from_tensors(shots.times[:4], shots.values[:, :, :4], shots.initial)
    message = r"trajectories of \(time, sensor\) = \(6, 1\); got \(4, 1\)"
    with pytest.raises(ValueError, match=message):
        line().prior.belief(short)
