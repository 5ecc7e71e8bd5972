"""SupportPrior: what it may depend on, what it hands out, and what trains it."""

from __future__ import annotations

import copy

import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.testing import assert_close
from toys import POINTS, SEPARATE, TOGETHER, Line, exact, in_float32, make_tasks

import pyro_hybrid as ph
from pyro_hybrid.beliefs.families import FullNormal, LogNormal, Normal
from pyro_hybrid.data.segments import to_segments

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
READINGS = pytest.mark.parametrize(
    "evidence", [None, ph.GaussNewton(2)], ids=["learned", "computed"]
)


def flat(naturals: dict[str, Tensor]) -> Tensor:
    return torch.cat([natural.flatten(1) for natural in naturals.values()], 1)


def support(shots: int, tasks: int = 3, seed: int = 0) -> ph.Episode:
    return in_float32(make_tasks(tasks, shots + 1, seed, num_support=shots)).episode().support


def line(
    evidence: ph.GaussNewton | None,
    *,
    inferred: bool = False,
    sites: dict | None = None,
    seed: int = 0,
) -> Line:
    """Untrained, but with an encoder that has something to say."""
    torch.manual_seed(seed)
    return Line(evidence, inferred=inferred, sites=sites)


@READINGS
@pytest.mark.parametrize("inferred", [False, True])
@pytest.mark.parametrize("shots", [2, 5, 33])
def test_the_order_of_shots_does_not_matter_to_the_last_bit(
    evidence: ph.GaussNewton | None, inferred: bool, shots: int
) -> None:
    model, first = line(evidence, inferred=inferred), support(shots)
    expected = flat(model.prior.natural(first))
    for seed in range(5):
        order = torch.rand(3, shots, generator=torch.Generator().manual_seed(seed)).argsort(1)
        assert torch.equal(flat(model.prior.natural(first.select_shots(order))), expected)


@READINGS
def test_the_order_of_shots_does_not_matter_where_observations_are_missing(
    evidence: ph.GaussNewton | None,
) -> None:
    mask = torch.rand(3, 6, POINTS, 1, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, :, 0] = True
    first = make_tasks(3, 6, num_support=5, mask=mask).episode().support
    model = line(evidence).double()
    backwards = first.select_shots(torch.arange(4, -1, -1).expand(3, -1))
    assert not torch.equal(backwards.scored, first.scored)
    assert torch.equal(flat(model.prior.natural(backwards)), flat(model.prior.natural(first)))


@READINGS
def test_the_order_of_shots_does_not_matter_when_they_are_cut_into_segments(
    evidence: ph.GaussNewton | None,
) -> None:
    model, first = line(evidence), support(4)
    backwards = first.select_shots(torch.arange(3, -1, -1).expand(3, -1))
    assert torch.equal(
        flat(model.prior.natural(to_segments(backwards, 2))),
        flat(model.prior.natural(to_segments(first, 2))),
    )


@READINGS
@pytest.mark.parametrize("shots", [1, 2, 7, 100])
def test_any_number_of_shots_from_one_to_a_hundred_is_read(
    evidence: ph.GaussNewton | None, shots: int
) -> None:
    model = line(evidence)
    p = model.prior(support(shots))
    assert (
        p["slope"].batch_shape == (3,)
        and p["slope"].event_shape == (1,)
        and p["bend"].event_shape == (2,)
    )
    assert torch.isfinite(flat(model.prior.natural(support(shots)))).all()


@READINGS
def test_a_prior_trained_on_some_shots_reads_other_numbers_of_them(
    evidence: ph.GaussNewton | None,
) -> None:
    model = line(evidence)
    guide = ph.AmortizedGuide(model.prior, ph.SetEncoder(1, POINTS, 8, width=16))
    tasks = in_float32(make_tasks(8, 5, num_support=2))
    ph.meta_train(
        model, guide, tasks, num_steps=3, batch_size=4, progress=False, curriculum={0.0: None}
    )
    for shots in (1, 4, 50):
        assert torch.isfinite(flat(model.prior.natural(support(shots)))).all()
        assert model.prior(tasks.episode(num_support=min(shots, 4)).support)[
            "slope"
        ].batch_shape == (8,)


def test_more_shots_make_a_computed_prior_narrower() -> None:
    model, everything = (
        line(ph.GaussNewton(6)),
        make_tasks(3, 101, num_support=100).episode().support,
    )
    model = model.double()
    scales = []
    for shots in (1, 3, 10, 100):
        order = torch.arange(shots).expand(3, -1)
        scales.append(model.prior(everything.select_shots(order))["slope"].stddev)
    assert all((after < before).all() for before, after in zip(scales, scales[1:], strict=False))


# ---- computed evidence ---------------------------------------------------------------------------


@pytest.mark.parametrize("inferred", [False, True])
def test_declared_families_get_the_marginals_of_the_exact_posterior(inferred: bool) -> None:
    episode = make_tasks(4, 4, num_support=3, inferred=inferred).episode().support
    p = line(ph.GaussNewton(8), inferred=inferred).double().prior(episode)
    truth = exact(episode, inferred=inferred)
    scale = truth.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert_close(p["slope"].mean, truth.mean[:, :1], **CLOSE)
    assert_close(p["bend"].mean, truth.mean[:, 1:3], **CLOSE)
    assert_close(p["slope"].stddev, scale[:, :1], **CLOSE)
    assert_close(p["bend"].stddev, scale[:, 1:3], **CLOSE)


def test_a_declared_full_normal_gets_the_full_covariance() -> None:
    episode = make_tasks(4, 4, num_support=3).episode().support
    p = line(ph.GaussNewton(8), sites=TOGETHER).double().prior(episode)["both"]
    truth = exact(episode, loc=(0.0, 0.0, 0.0), scale=(1.0, 1.0, 1.0))
    assert_close(p.covariance_matrix, truth.covariance[:, :3, :3], **CLOSE)
    assert_close(p.mean, truth.mean[:, :3], **CLOSE)
    assert (
        truth.covariance[:, 0, 1].abs() > 1e-3
    ).all()  # there is something off the diagonal to get right


def test_a_full_normal_beside_another_site_gets_its_own_block() -> None:
    episode = make_tasks(4, 4, num_support=3).episode().support
    sites = {"slope": Normal(1), "bend": FullNormal(2)}
    p = line(ph.GaussNewton(8), sites=sites).double().prior(episode)
    truth = exact(episode, loc=(0.0, 0.0, 0.0), scale=(1.0, 1.0, 1.0))
    assert_close(p["bend"].covariance_matrix, truth.covariance[:, 1:3, 1:3], **CLOSE)
    assert_close(p["slope"].stddev, truth.covariance[:, 0, 0].sqrt().unsqueeze(-1), **CLOSE)


def test_natural_parameters_are_the_populations_plus_what_each_set_of_shots_adds() -> None:
    everything = make_tasks(3, 6, num_support=5).episode().support
    prior = line(ph.GaussNewton(8), sites=TOGETHER).double().prior
    base = prior.natural(None)["both"]
    first, second = (
        everything.select_shots(torch.tensor(rows).expand(3, -1)) for rows in ([0, 1], [2, 3, 4])
    )
    gains = [prior.natural(part)["both"] - base for part in (first, second)]
    assert_close(
        prior.natural(everything)["both"], base + gains[0] + gains[1], atol=1e-4, rtol=1e-5
    )


def test_the_population_is_where_the_computed_evidence_is_added() -> None:
    episode = make_tasks(3, 4, num_support=3).episode().support
    model = line(ph.GaussNewton(8)).double()
    with torch.no_grad():
        model.prior.base.copy_(torch.tensor([0.7, -0.4, -0.2, 0.1, 0.5, -0.3]))
    mean, precision = model.prior.gaussian(None)
    truth = exact(
        episode, loc=tuple(mean.tolist()), scale=tuple(precision.diagonal().rsqrt().tolist())
    )
    assert_close(model.prior(episode)["bend"].mean, truth.mean[:, 1:3], **CLOSE)
    assert not torch.equal(mean, torch.tensor([0.5, 0.0, 0.0], dtype=mean.dtype))


@READINGS
def test_proposals_have_value_zero_and_train_the_population_and_a_proposing_encoder(
    evidence: ph.GaussNewton | None,
) -> None:
    model = line(evidence)
    trace = poutine.trace(model).get_trace(in_float32(make_tasks(3, 4)).episode())
    trace.compute_log_prob()
    proposals = trace.nodes["proposals"]["log_prob_sum"]
    assert proposals.item() == 0.0
    (-proposals).backward()
    trained = {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }
    assert trained == {
        n
        for n, _ in model.named_parameters()
        if n == "prior.base" or evidence and n.startswith("prior.")
    }


@READINGS
def test_where_nothing_can_be_trained_there_are_no_proposals(
    evidence: ph.GaussNewton | None,
) -> None:
    with torch.no_grad():
        trace = poutine.trace(line(evidence)).get_trace(in_float32(make_tasks(3, 4)).episode())
    assert "proposals" not in trace.nodes


def test_a_prior_used_by_itself_trains_nothing_and_says_nothing() -> None:
    model = line(ph.GaussNewton(2))
    assert set(model.prior(support(3))) == set(SEPARATE)  # a factor outside of inference would warn
    with poutine.trace() as trace:
        model.prior(None)
    assert "proposals" not in trace.trace.nodes


def test_no_gradient_flows_through_computed_evidence() -> None:
    model = line(ph.GaussNewton(2))
    assert not flat(model.prior.natural(support(3))).requires_grad
    assert not any(x.requires_grad for x in model.prior.gaussian(support(3)))


def test_the_encoder_and_the_base_are_trained_towards_the_computed_evidence() -> None:
    model, episode = line(ph.GaussNewton(2)), in_float32(make_tasks(16, 4, num_support=3)).episode()
    prior, goal = model.prior, model.prior.belief(episode.support).mean

    def distance() -> float:
        with torch.no_grad():
            return float(
                (prior.unconstrained(prior._split(prior.propose(episode.support)))[0] - goal)
                .square()
                .mean()
            )

    before, optim = distance(), torch.optim.Adam(model.prior.parameters(), 3e-2)
    for _ in range(20):
        optim.zero_grad()
        trace = poutine.trace(prior).get_trace(episode.support)
        (-trace.log_prob_sum()).backward()
        optim.step()
    assert distance() < 0.5 * before


@pytest.mark.parametrize("fused", [False, True])
def test_what_it_remembers_is_forgotten_after_a_step_of_the_optimizer(fused: bool) -> None:
    model, episode = line(ph.GaussNewton(2)), in_float32(make_tasks(3, 4, num_support=3)).episode()
    first = model.prior.belief(episode.support)
    assert model.prior.belief(episode.support) is first  # the same episode isn't computed twice
    optim = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optim.step()
    fresh = copy.deepcopy(model).prior.belief(episode.support)
    assert torch.equal(model.prior.belief(episode.support).mean, fresh.mean)
    assert not torch.equal(first.precision, fresh.precision)


# ---- the encoder alone ---------------------------------------------------------------------------


def test_without_evidence_the_encoder_says_everything() -> None:
    model, episode = line(None), in_float32(make_tasks(3, 4)).episode()
    raw = model.prior.head(model.prior.encoder(episode.support.sorted_shots))
    pieces = dict(zip(SEPARATE, raw.split([2, 4], -1), strict=True))
    naturals = model.prior.natural(episode.support)
    for name, family in SEPARATE.items():
        assert torch.equal(
            naturals[name], family.from_raw(pieces[name].unflatten(-1, (family.n, 2)))
        )


def test_without_evidence_the_population_follows_what_the_encoder_says() -> None:
    model, episode = line(None), in_float32(make_tasks(16, 4, num_support=3)).episode()
    optim = torch.optim.Adam([model.prior.base], 0.05)
    for _ in range(150):
        optim.zero_grad()
        (-poutine.trace(model.prior).get_trace(episode.support).log_prob_sum()).backward()
        optim.step()
    with torch.no_grad():
        mean, scale = model.prior.unconstrained(model.prior.natural(episode.support))
        centre, width = model.prior.unconstrained(model.prior.natural(None))
    assert_close(
        centre, mean.mean(0), atol=0.02, rtol=0.0
    )  # the best Normal for a mixture has its moments
    assert_close(
        width.square(), scale.square().mean(0) + mean.var(0, correction=0), atol=0.0, rtol=0.1
    )


def test_without_evidence_gradients_reach_the_encoder_through_the_distributions() -> None:
    model = line(None)
    model.prior(support(3))["slope"].mean.sum().backward()
    assert all(p.grad is not None for p in model.prior.encoder.parameters())


def test_a_distribution_has_the_natural_parameters_that_the_prior_names() -> None:
    prior = line(None, sites={"slope": LogNormal(1), "bend": Normal(2)}).prior
    for name, natural in prior.natural(support(3)).items():
        assert_close(prior.sites[name].natural(prior(support(3))[name]), natural)


def test_without_a_support_the_prior_is_the_populations() -> None:
    prior = line(ph.GaussNewton()).prior
    p = prior(None)
    assert (
        p["slope"].batch_shape == ()
        and p["slope"].mean.item() == 0.5
        and p["slope"].stddev.item() == 2.0
    )


# ---- the negative control ------------------------------------------------------------------------


def test_an_unconditional_prior_is_deaf_to_the_support() -> None:
    prior = ph.UnconditionalPrior(ph.SetEncoder(1, POINTS, 8), **SEPARATE)
    first, second = support(3, seed=1), support(5, seed=2)
    for name in SEPARATE:
        assert torch.equal(prior.natural(first)[name], prior.natural(second)[name])
        assert torch.equal(prior.natural(first)[name], prior.natural(None)[name])
    assert [name for name, _ in prior.named_parameters()] == ["base"]


def test_an_unconditional_prior_still_belongs_to_a_task_each() -> None:
    episode = in_float32(make_tasks(3, 4)).episode()
    trace = poutine.trace(Line(prior=ph.UnconditionalPrior(**SEPARATE))).get_trace(episode)
    assert (
        trace.nodes["slope"]["value"].shape == (3, 1)
        and len(set(trace.nodes["slope"]["value"].flatten().tolist())) == 3
    )


# ---- what it refuses -----------------------------------------------------------------------------


def test_a_prior_without_sites_is_refused_with_an_example() -> None:
    with pytest.raises(
        ValueError, match=r"at least one site; got none.*omega=ph\.families\.LogNormal\(1\)"
    ):
        ph.SupportPrior(ph.SetEncoder(1, POINTS, 8))


def test_computed_evidence_without_a_program_is_refused_with_what_to_do() -> None:
    prior = ph.SupportPrior(ph.SetEncoder(1, POINTS, 8), ph.GaussNewton(), **SEPARATE)
    with pytest.raises(
        ValueError, match=r"a prior that belongs to a program.*prior\.bind\(program\)"
    ):
        prior(support(2))


def test_a_prior_bound_to_a_plain_function_reads_it() -> None:
    model, episode = line(ph.GaussNewton(2)), support(3)
    prior = copy.deepcopy(model.prior)
    prior.bind(lambda e: model(ph.Episode(None, e.query)))
    assert torch.equal(flat(prior.natural(episode)), flat(model.prior.natural(episode)))


def test_trajectories_of_another_length_are_refused_with_what_to_do() -> None:
    shots = in_float32(make_tasks(3, 4)).episode().support
    short = ph.Shots.from_tensors(shots.times[:4], shots.values[:, :, :4], shots.initial)
    with pytest.raises(
        ValueError, match=r"trajectories of \(time, sensor\) = \(6, 1\); got \(4, 1\)"
    ):
        line(None).prior(short)
