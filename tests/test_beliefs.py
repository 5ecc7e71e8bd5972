"""Laws of beliefs: they add, marginalize, condition and normalize as densities do."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.ops.gaussian import Gaussian as Reference
from torch import Tensor
from torch.testing import assert_close

from pyro_hybrid.beliefs.belief import Belief, Factorized, Gaussian, rescale
from pyro_hybrid.beliefs.families import Beta, FullNormal, Gamma, LogNormal, Normal, VonMises
from pyro_hybrid.beliefs.quadratic import Quadratic, solve_positive

TASKS, SHOTS = 3, 4
FAMILIES = {"rate": LogNormal(1, loc=0.5), "unknown": Normal(2)}
ALL = {
    "normal": Normal(2),
    "log_normal": LogNormal(2),
    "gamma": Gamma(2),
    "beta": Beta(2),
    "von_mises": VonMises(2),
    "full": FullNormal(2),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def positive(*batch: int, size: int, seed: int = 0) -> Tensor:
    root = torch.randn(*batch, size, size, generator=generator(seed), dtype=torch.float64)
    return root @ root.mT + torch.eye(size, dtype=torch.float64)


def factor(*batch: int, size: int, seed: int = 0) -> Quadratic:
    information = torch.randn(*batch, size, generator=generator(seed + 1), dtype=torch.float64)
    return Quadratic(information, positive(*batch, size=size, seed=seed))


def reference(quadratic: Quadratic) -> Reference:
    zero = torch.zeros(quadratic.information.shape[:-1], dtype=torch.float64)
    return Reference(zero, quadratic.information, quadratic.precision)


def arrow(seed: int = 0) -> Gaussian:
    own = factor(TASKS, size=3, seed=seed)
    shots = factor(TASKS, SHOTS, size=5, seed=seed + 2)
    return Gaussian(FAMILIES, own, torch.float64, shots, {"start": 2})


def dense(belief: Gaussian) -> Quadratic:
    """The arrow written out over task and all shots."""
    assert belief.shots is not None
    d, m = 3, 2
    size = d + SHOTS * m
    information = torch.zeros(TASKS, size, dtype=torch.float64)
    precision = torch.zeros(TASKS, size, size, dtype=torch.float64)
    information[:, :d] = belief.own.information
    precision[:, :d, :d] = belief.own.precision
    for k in range(SHOTS):
        index = torch.tensor([*range(d), *range(d + k * m, d + (k + 1) * m)])
        information[:, index] += belief.shots.information[:, k]
        precision[:, index.unsqueeze(1), index] += belief.shots.precision[:, k]
    return Quadratic(information, precision)


# ---- quadratic factors -----------------------------------------------------------------------


def test_factors_agree_with_pyros_gaussian() -> None:
    mine, theirs = factor(7, size=4), reference(factor(7, size=4))
    values = torch.randn(7, 4, generator=generator(5), dtype=torch.float64)
    assert_close(mine.log_normalizer, theirs.event_logsumexp())
    expected = theirs.log_density(values) - theirs.event_logsumexp()
    assert_close(mine.log_density(values), expected)
    marginal = theirs.marginalize(right=2)
    assert_close(mine.marginal(2).information, marginal.info_vec)
    assert_close(mine.marginal(2).precision, marginal.precision)
    conditional = theirs.left_condition(values[:, :1])
    assert_close(mine.condition(values[:, :1]).information, conditional.info_vec)
    assert_close(mine.condition(values[:, :1]).precision, conditional.precision)


def test_adding_factors_multiplies_densities() -> None:
    one, other = factor(2, size=3), factor(2, size=3, seed=9)
    a, b = torch.randn(2, 2, 3, generator=generator(3), dtype=torch.float64)

    def ratio(quadratic: Quadratic) -> Tensor:
        return quadratic.log_density(a) - quadratic.log_density(b)

    assert_close(ratio(one + other), ratio(one) + ratio(other))
    assert_close(ratio((one + other) - other), ratio(one))


def test_divergence_is_torchs() -> None:
    one, other = factor(4, size=3), factor(4, size=3, seed=7)
    p, q = (
        torch.distributions.MultivariateNormal(x.mean, precision_matrix=x.precision)
        for x in (one, other)
    )
    assert_close(one.kl(other), torch.distributions.kl_divergence(p, q))
    assert_close(one.kl(one), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0.0)


def test_a_factor_that_is_no_density_leaves_its_neighbours_alone() -> None:
    good = factor(3, size=2)
    spoiled = good.precision.clone()
    spoiled[1] = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    bad = Quadratic(good.information, spoiled)
    assert bad.mean[1].isnan().all() and bad.covariance[1].isnan().all()
    assert_close(bad.mean[[0, 2]], good.mean[[0, 2]])
    solution = solve_positive(spoiled, good.information.unsqueeze(-1))
    assert not solution[1].any() and solution[[0, 2]].any()


@pytest.mark.parametrize("units", [(1e-8, 1e8), (1e8, 1.0), (1e-150, 1e100)])
def test_units_of_the_coordinates_cost_no_digits(units: tuple[float, float]) -> None:
    plain = factor(size=2)
    unit = torch.tensor(units, dtype=torch.float64)
    scaled = Quadratic(plain.information / unit, plain.precision / unit / unit.unsqueeze(1))
    assert_close(scaled.mean / unit, plain.mean)
    assert_close(scaled.covariance / unit / unit.unsqueeze(1), plain.covariance)


# ---- factorized beliefs ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL.values(), ids=ALL)
def test_evidence_multiplies_the_density_of_every_family(family: object) -> None:
    raw = torch.randn(2, TASKS, 2, family.k, generator=generator(), dtype=torch.float64)
    belief = Factorized({"z": family}, {"z": family.from_raw(raw[0])})
    increment = Factorized({"z": family}, {"z": family.evidence(raw[1])})
    posterior = (belief + increment).distributions()["z"]
    z = belief.distributions()["z"].sample((2,))
    inner = (family.statistics(z) * increment.natural["z"]).sum((-2, -1))
    prior = belief.distributions()["z"].log_prob(z)
    ratio = (posterior.log_prob(z) - prior - inner).diff(dim=0)
    assert_close(ratio, torch.zeros_like(ratio), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("family", ALL.values(), ids=ALL)
def test_divergence_of_every_family_is_that_of_its_distributions(family: object) -> None:
    raw = torch.randn(2, TASKS, 2, family.k, generator=generator(), dtype=torch.float64)
    one, other = (Factorized({"z": family}, {"z": family.from_raw(x)}) for x in raw)
    p, q = one.distributions()["z"], other.distributions()["z"]
    if isinstance(family, VonMises):  # torch has no closed form: integrate over the circle
        angles = torch.linspace(-math.pi, math.pi, 20_001, dtype=torch.float64)[1:]
        z = angles.view(-1, 1, 1).expand(-1, TASKS, 2)
        log_p, log_q = p.base_dist.log_prob(z), q.base_dist.log_prob(z)
        step = 2.0 * math.pi / len(angles)
        expected = (step * log_p.exp() * (log_p - log_q)).sum((0, 2))
    else:
        expected = torch.distributions.kl_divergence(p, q)
    assert_close(one.kl(other), expected)


@pytest.mark.parametrize("family", ALL.values(), ids=ALL)
def test_conversion_to_a_gaussian_and_back_keeps_every_family(family: object) -> None:
    raw = torch.randn(TASKS, 2, family.k, generator=generator(), dtype=torch.float64)
    belief = Factorized({"z": family}, {"z": family.from_raw(raw)})
    again = belief.gaussian().factorized()
    assert_close(again.natural["z"], belief.natural["z"], rtol=1e-5, atol=1e-6)


def test_a_belief_about_a_vector_keeps_its_correlations_as_a_gaussian() -> None:
    family = FullNormal(2)
    covariance = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    mean = torch.tensor([1.0, -1.0], dtype=torch.float64)
    belief = Factorized({"z": family}, {"z": family.from_covariance(mean, covariance)})
    assert_close(belief.gaussian().own.covariance, covariance)
    assert_close(belief.gaussian().own.mean, mean)


def test_beliefs_about_different_latents_do_not_add() -> None:
    one = Factorized({"a": Normal(1)}, {"a": torch.tensor([[0.0, -0.5]])})
    other = Factorized({"b": Normal(1)}, {"b": torch.tensor([[0.0, -0.5]])})
    with pytest.raises(ValueError, match=r"same sites; got \['a'\] and \['b'\]"):
        one + other


def test_a_gaussian_increment_makes_a_factorized_belief_joint() -> None:
    natural = {
        name: family.from_raw(torch.zeros(TASKS, family.n, 2)) for name, family in FAMILIES.items()
    }
    population = Factorized(FAMILIES, natural)
    increment = Gaussian(FAMILIES, factor(TASKS, size=3), torch.float32)
    posterior = population + increment
    assert isinstance(posterior, Gaussian)
    expected = torch.linalg.inv(torch.eye(3, dtype=torch.float64) + increment.own.precision)
    assert_close(posterior.own.covariance, expected)
    assert {x.dtype for x in posterior.factorized().natural.values()} == {torch.float32}


# ---- arrows --------------------------------------------------------------------------------------


def test_an_arrow_is_the_dense_gaussian() -> None:
    belief, whole = arrow(), dense(arrow())
    covariance = whole.covariance
    assert_close(belief.task_marginal.covariance, covariance[:, :3, :3])
    assert_close(belief.task_marginal.mean, whole.mean[:, :3])
    values = torch.randn(2, TASKS, 3, generator=generator(4), dtype=torch.float64)
    given = belief.shots_given(values)
    expected = whole.condition(values)
    assert_close(given.mean.flatten(-2), expected.mean)
    for k in range(SHOTS):
        block = expected.covariance[:, 2 * k : 2 * k + 2, 2 * k : 2 * k + 2]
        assert_close(given.covariance[:, k], block)


def test_evidence_added_to_an_arrow_integrates_its_old_shots_out() -> None:
    first, second = arrow(), arrow(seed=20)
    total = first + second
    expected = first.task_marginal + second.task_marginal
    assert_close(total.task_marginal.precision, expected.precision)
    assert_close(total.task_marginal.information, expected.information)
    assert total.shots is second.shots


def test_an_expanded_belief_keeps_the_evidence_of_its_shots() -> None:
    belief = arrow()
    expanded = belief.expand(TASKS)
    assert_close(expanded.task_marginal.information, belief.task_marginal.information)
    assert_close(expanded.task_marginal.precision, belief.task_marginal.precision)


def test_order_of_shots_does_not_matter() -> None:
    belief = arrow()
    assert belief.shots is not None
    order = torch.tensor([2, 0, 3, 1])
    shuffled = Quadratic(belief.shots.information[:, order], belief.shots.precision[:, order])
    other = Gaussian(FAMILIES, belief.own, torch.float64, shuffled, {"start": 2})
    assert_close(other.task_marginal.information, belief.task_marginal.information)
    assert_close(other.task_marginal.precision, belief.task_marginal.precision)


def test_shots_of_a_belief_without_any_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a belief with latents of shots attached"):
        arrow().without_shots().shots_given(torch.zeros(TASKS, 3))


def test_rescaling_moves_no_mean_and_widens_what_evidence_alone_says() -> None:
    before = Gaussian(FAMILIES, factor(TASKS, size=3), torch.float64)
    posterior = before + arrow(seed=3)
    scale = torch.tensor([1.0, 2.0, 0.5])
    wide = rescale(posterior, before, scale)
    assert_close(wide.task_marginal.mean, posterior.task_marginal.mean)
    evidence = posterior.task_marginal.precision - before.own.precision
    expected = before.own.precision + evidence / scale.double() / scale.double().unsqueeze(1)
    assert_close(wide.task_marginal.precision, expected)
    same = rescale(posterior, before, torch.ones(3))
    assert_close(same.task_marginal.information, posterior.task_marginal.information)


def test_coordinates_and_values_go_both_ways() -> None:
    belief: Belief = arrow()
    u = torch.randn(5, TASKS, 3, generator=generator(), dtype=torch.float64)
    values = belief.constrained(u)
    assert {name: tuple(x.shape[2:]) for name, x in values.items()} == {
        "rate": (1,),
        "unknown": (2,),
    }
    assert_close(belief.unconstrained(values), u)
    assert math.isclose(float(values["rate"][0, 0, 0]), math.exp(float(u[0, 0, 0])))
    assert isinstance(belief.distributions()["rate"].base_dist, dist.LogNormal)
