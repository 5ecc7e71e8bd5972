"""Laws of exponential families, over a table of constructors: a new family is a new row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_hybrid.beliefs import families
from pyro_hybrid.beliefs.families import (
    Beta,
    Family,
    FullNormal,
    Gamma,
    LogNormal,
    Normal,
    VonMises,
)

FAMILIES: dict[str, Callable[..., Family]] = {
    "Beta": Beta,
    "FullNormal": FullNormal,
    "Gamma": Gamma,
    "LogNormal": LogNormal,
    "Normal": Normal,
    "VonMises": VonMises,
}
INDEPENDENT = sorted(set(FAMILIES) - {"FullNormal"})
WITH_KL = sorted(set(FAMILIES) - {"VonMises"})
STOCK = {
    "Beta": dist.Beta,
    "Gamma": dist.Gamma,
    "LogNormal": dist.LogNormal,
    "Normal": dist.Normal,
    "VonMises": dist.VonMises,
}
N = 3

every_family = pytest.mark.parametrize("name", sorted(FAMILIES))
independent_families = pytest.mark.parametrize("name", INDEPENDENT)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    pyro.set_rng_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def member(family: Family, *batch: int) -> Tensor:
    """Natural parameters of random members."""
    return family.from_raw(0.7 * torch.randn(*batch, family.n, family.k))


def tolerance(name: str) -> float:
    """Torch computes the von Mises normaliser from a table of seven digits."""
    return 1e-6 if name == "VonMises" else 1e-9


def inner(statistics: Tensor, natural: Tensor) -> Tensor:
    return (statistics * natural).sum((-2, -1))


def total(family: Family, per_component: Tensor) -> Tensor:
    """Sum over components, where the family keeps them apart."""
    return per_component if isinstance(family, FullNormal) else per_component.sum(-1)


def circular(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Circular mean, and the standard deviation of the wrapped Normal with the same mean resultant."""
    c, s = angles.cos().mean(0), angles.sin().mean(0)
    return torch.atan2(s, c), (-(c**2 + s**2).log()).sqrt()


def raws(family: Family, dtype: torch.dtype = torch.float64) -> st.SearchStrategy[Tensor]:
    """Any raw numbers up to 50, extremes included."""
    size = family.n * family.k
    number = st.sampled_from([-50.0, 0.0, 50.0]) | st.floats(-50, 50, width=32)
    shaped = st.lists(number, min_size=size, max_size=size)
    return shaped.map(lambda xs: torch.tensor(xs, dtype=dtype).reshape(family.n, family.k))


# ---------------------------------------------------------------------------------------------------- exponential form


@every_family
def test_gradient_of_log_partition_is_mean_statistics(name: str) -> None:
    family = FAMILIES[name](N)
    natural = member(family, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(family.log_partition(natural).sum(), natural)
    torch.testing.assert_close(gradient, family.mean_statistics(natural))


@every_family
def test_mean_statistics_are_means_of_statistics_of_samples(name: str) -> None:
    family = FAMILIES[name](N)
    natural = member(family)
    statistics = family.statistics(family.distribution(natural).sample((100_000,)))
    error = (statistics.mean(0) - family.mean_statistics(natural)) / statistics.std(0)
    assert error.abs().max() < 5 / math.sqrt(100_000)


@every_family
def test_log_prob_is_the_exponential_form(name: str) -> None:
    family = FAMILIES[name](N)
    natural = member(family, 5)
    stock = family.distribution(natural)
    z = stock.sample((4,))
    expected = inner(family.statistics(z), natural) + total(
        family, family.log_base(z) - family.log_partition(natural)
    )
    torch.testing.assert_close(
        stock.log_prob(z), expected, rtol=tolerance(name), atol=tolerance(name)
    )


@every_family
def test_natural_undoes_distribution(name: str) -> None:
    family = FAMILIES[name](N)
    natural = member(family, 2, 5)
    # no angle is quite uniform: its concentration stays above 1e-4
    atol = 1e-5 if name == "VonMises" else 1e-9
    torch.testing.assert_close(
        family.natural(family.distribution(natural)), natural, rtol=1e-9, atol=atol
    )


@every_family
def test_adding_natural_parameters_multiplies_densities(name: str) -> None:
    family = FAMILIES[name](N)
    prior, evidence = member(family), family.evidence(torch.randn(N, family.k))
    posterior = family.distribution(prior + evidence)
    z = posterior.sample((50,))
    ratio = (
        posterior.log_prob(z)
        - family.distribution(prior).log_prob(z)
        - inner(family.statistics(z), evidence)
    )
    torch.testing.assert_close(ratio, ratio[:1].expand(50), rtol=1e-6, atol=1e-6)


@every_family
def test_zero_increment_changes_nothing(name: str) -> None:
    family = FAMILIES[name](N)
    natural = member(family)
    prior, same = (
        family.distribution(natural),
        family.distribution(natural + torch.zeros(N, family.k)),
    )
    z = prior.sample((10,))
    assert torch.equal(prior.log_prob(z), same.log_prob(z))


@every_family
def test_two_pieces_of_evidence_commute(name: str) -> None:
    family = FAMILIES[name](N)
    prior, one, two = member(family), *(family.evidence(torch.randn(N, family.k)) for _ in range(2))
    torch.testing.assert_close(prior + one + two, prior + two + one)


# -------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("name", WITH_KL)
def test_torch_kl_is_the_bregman_divergence_of_log_partition(name: str) -> None:
    family = FAMILIES[name](N)
    p, q = member(family, 5), member(family, 5)
    bregman = total(family, family.log_partition(q) - family.log_partition(p)) - inner(
        q - p, family.mean_statistics(p)
    )
    torch.testing.assert_close(
        kl_divergence(family.distribution(p), family.distribution(q)), bregman
    )


def test_von_mises_leaves_kl_to_sampling_and_registers_nothing() -> None:
    stock = VonMises(N).distribution(member(VonMises(N)))
    with pytest.raises(NotImplementedError):
        kl_divergence(stock, stock)


# -------------------------------------------------------------------------------------------------------- raw numbers


@every_family
def test_raw_zero_is_the_member_at_loc_and_scale(name: str) -> None:
    family = FAMILIES[name](N, loc=0.4, scale=0.3)
    mean, scale = family.gaussian(family.from_raw(torch.zeros(N, family.k)))
    torch.testing.assert_close(mean, torch.full((N,), 0.4), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scale, torch.full((N,), 0.3), rtol=1e-5, atol=1e-6)


@independent_families
def test_raw_numbers_shift_the_location_and_change_the_log_scale(name: str) -> None:
    family = FAMILIES[name](1, loc=0.4, scale=0.3)
    mean, _ = family.gaussian(family.from_raw(torch.tensor([[2.0, 0.0]])))
    _, scale = family.gaussian(family.from_raw(torch.tensor([[0.0, 0.01]])))
    torch.testing.assert_close(mean.item(), 1.0, rtol=1e-5, atol=0)
    torch.testing.assert_close(math.log(scale.item() / 0.3), 0.01, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_family
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_raw_numbers_give_a_proper_member_with_finite_gradients(
    name: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    family = FAMILIES[name](N)
    raw = data.draw(raws(family, dtype)).requires_grad_()
    natural = family.from_raw(raw)
    (gradient,) = torch.autograd.grad(natural.sum(), raw)
    assert natural.dtype == dtype
    assert natural.isfinite().all() and gradient.isfinite().all()
    assert family.log_partition(natural).isfinite().all()
    family.distribution(natural)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_family
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_evidence_keeps_any_member_proper(
    name: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    family = FAMILIES[name](N)
    prior, raw = (data.draw(raws(family, dtype)) for _ in range(2))
    raw = raw.requires_grad_()
    increment = family.evidence(raw)
    (gradient,) = torch.autograd.grad(increment.sum(), raw)
    assert increment.isfinite().all() and gradient.isfinite().all()
    family.distribution(family.from_raw(prior) + increment)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"FullNormal"}))
def test_from_raw_can_be_differentiated_twice(name: str) -> None:
    family = FAMILIES[name](2)
    raw = (0.5 * torch.randn(2, 2)).requires_grad_()
    assert torch.autograd.gradcheck(family.from_raw, raw, atol=1e-5)
    assert torch.autograd.gradgradcheck(family.from_raw, raw, atol=1e-3, rtol=1e-3)


def test_full_normal_from_raw_has_right_gradients() -> None:
    raw = torch.randn(N, 1 + N).requires_grad_()
    assert torch.autograd.gradcheck(FullNormal(N).from_raw, raw)


@every_family
def test_strong_evidence_moves_the_posterior_to_where_it_points(name: str) -> None:
    family = FAMILIES[name](1, loc=0.2, scale=0.5)
    evidence = family.evidence(torch.tensor([[1.4, -7.0]]))
    mean, scale = family.gaussian(family.from_raw(torch.zeros(1, 2)) + evidence)
    torch.testing.assert_close(mean.item(), 0.9, rtol=0, atol=1e-3)
    assert scale.item() < 0.01


@every_family
def test_weak_evidence_leaves_the_prior(name: str) -> None:
    family = FAMILIES[name](1)
    prior = family.from_raw(torch.zeros(1, 2))
    evidence = family.evidence(torch.tensor([[1.0, 50.0]]))
    torch.testing.assert_close(prior + evidence, prior, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [2, 6, 20])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_full_normals_of_any_size_stay_factorisable_in_float32(
    size: int, data: st.DataObject
) -> None:
    family = FullNormal(size)
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(2, size, 1 + size, generator=generator, dtype=torch.float32).sign()
    natural = family.from_raw(50 * signs[0])
    family.distribution(natural)
    family.distribution(natural + family.evidence(50 * signs[1]))


EXTREMES = [-1e30, -1e6, -1e3, -100.0, -50.0, -20.0, 0.0, 20.0, 50.0, 100.0, 1e3, 1e6, 1e30]
SCALES = [{}, {"loc": 2.3, "scale": 0.3}, {"loc": -4.0, "scale": 2.0}]
OF_EVERY_SCALE = [(name, options) for name in sorted(FAMILIES) for options in SCALES] + [
    (name, {"scale": scale}) for name in ("Normal", "FullNormal") for scale in (1e-8, 1e8)
]
every_scale = pytest.mark.parametrize(("name", "options"), OF_EVERY_SCALE, ids=str)


def extremes(family: Family, dtype: torch.dtype) -> Tensor:
    """All pairs of extreme raw numbers, (pair, 1, 2)."""
    numbers = torch.tensor(EXTREMES, dtype=dtype)
    return torch.cartesian_prod(numbers, numbers).view(-1, 1, family.k)


@every_scale
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_raw_numbers_give_members_whose_values_and_moments_are_finite(
    name: str, dtype: torch.dtype, options: dict[str, float]
) -> None:
    family = FAMILIES[name](1, **options)
    raw = extremes(family, dtype).requires_grad_()
    natural = family.from_raw(raw)
    (gradient,) = torch.autograd.grad(natural.sum(), raw)
    stock = family.distribution(natural)
    z = stock.sample((100,))
    for values in (
        natural,
        gradient,
        family.log_partition(natural),
        family.mean_statistics(natural),
        *family.gaussian(natural),
        stock.mean,
        z,
        stock.log_prob(z),
        family.evidence(raw),
    ):
        assert values.dtype == dtype and values.isfinite().all()
    family.distribution(natural + family.evidence(raw.flip(0)))


@every_scale
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergences_of_extreme_members_are_finite_and_not_negative(
    name: str, dtype: torch.dtype, options: dict[str, float]
) -> None:
    if name not in WITH_KL:
        pytest.skip("leaves its divergence to sampling")
    family = FAMILIES[name](1, **options)
    natural = family.from_raw(extremes(family, dtype))
    p, q = family.distribution(natural[:, None]), family.distribution(natural[None])
    divergence = kl_divergence(p, q)
    counts = float(natural.abs().max()) if name in ("Beta", "Gamma") else 1.0
    rounding = 1e-5 + 3e-14 * counts  # of terms that cancel in float64, whatever the members are in
    assert divergence.isfinite().all() and divergence.min() >= -rounding
    assert divergence.diagonal().abs().max() <= rounding


@pytest.mark.parametrize("name", ["Gamma", "LogNormal"])
def test_limits_leave_what_a_log_scale_can_be_as_it_is(name: str) -> None:
    family = FAMILIES[name](1, loc=1.0, scale=0.5)
    raw = torch.cartesian_prod(torch.linspace(-39.0, 39.0, 7), torch.linspace(-9.0, 9.0, 7))
    mean, scale = family.gaussian(family.from_raw(raw.view(-1, 1, 2)))
    limit = torch.where(raw[:, 1] < 0.0, 8.0, 2.0)
    b = raw[:, 1] / (1.0 + (raw[:, 1] / limit) ** 2).sqrt()
    torch.testing.assert_close(mean[:, 0], 1.0 + 0.5 * raw[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scale[:, 0], 0.5 * b.exp(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("name", ["Gamma", "Beta"])
def test_the_divergence_of_narrow_members_in_float32_is_that_in_float64(name: str) -> None:
    family = FAMILIES[name](1)
    raw = torch.tensor([[[0.3, -20.0]], [[0.3001, -19.0]]], dtype=torch.float32)
    natural = family.from_raw(raw)
    narrow = [family.distribution(x) for x in natural]
    wide = [family.distribution(x) for x in natural.double()]
    assert kl_divergence(*narrow).dtype == torch.float32
    torch.testing.assert_close(
        kl_divergence(*narrow).double(), kl_divergence(*wide), rtol=1e-5, atol=1e-5
    )
    expanded = [x.expand((4,)) for x in narrow]
    torch.testing.assert_close(kl_divergence(*expanded), kl_divergence(*narrow).expand(4))


# ------------------------------------------------------------------------------------------ unconstrained coordinates


@every_family
def test_gaussian_undoes_from_gaussian(name: str) -> None:
    family = FAMILIES[name](N)
    mean, scale = 1.5 * torch.randn(50, N).clamp(-2, 2), torch.rand(50, N) * 2 + 0.001
    again = family.gaussian(family.from_gaussian(mean, scale))
    torch.testing.assert_close(again[0], mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again[1], scale, rtol=1e-5, atol=1e-5)


@every_family
def test_gaussian_is_the_moments_of_unconstrained_samples(name: str) -> None:
    family = FAMILIES[name](N)
    mean, scale = torch.tensor([-0.5, 0.0, 1.0]), torch.tensor([0.1, 0.4, 0.8])
    u = family.unconstrained(
        family.distribution(family.from_gaussian(mean, scale)).sample((100_000,))
    )
    centre, spread = circular(u) if name == "VonMises" else (u.mean(0), u.std(0))
    torch.testing.assert_close(centre, mean, rtol=0, atol=0.015)
    torch.testing.assert_close(spread, scale, rtol=0.02, atol=0)


@pytest.mark.parametrize("mean", [-40.0, -3.0, 0.0, 3.0, 40.0])
@pytest.mark.parametrize("scale", [1e-4, 0.1, 1.0, 3.0, 7.0])
def test_moments_of_gamma_and_beta_are_matched_far_out(mean: float, scale: float) -> None:
    for family in (Gamma(1), Beta(1)):
        again = family.gaussian(family.from_gaussian(torch.tensor([mean]), torch.tensor([scale])))
        assert abs(again[0].item() - mean) < 1e-5 * max(1, scale)
        assert abs(again[1].item() / scale - 1) < 1e-5


def test_gamma_moments_of_log_z_are_scipys() -> None:
    mean, scale = Gamma(1).gaussian(torch.tensor([[1.5, -0.7]]))
    law = scipy.stats.loggamma(2.5, loc=-math.log(0.7))
    assert mean.item() == pytest.approx(law.mean())
    assert scale.item() == pytest.approx(law.std())


def test_beta_moments_of_logit_z_are_scipys() -> None:
    mean, scale = Beta(1).gaussian(torch.tensor([[1.5, 0.2]]))
    digamma, trigamma = scipy.special.digamma, lambda x: scipy.special.polygamma(1, x)
    assert mean.item() == pytest.approx(digamma(2.5) - digamma(1.2))
    assert scale.item() == pytest.approx(math.sqrt(trigamma(2.5) + trigamma(1.2)))


@pytest.mark.parametrize("kappa", [0.01, 0.5, 3.0, 90.0, 110.0, 1e4])
def test_von_mises_moments_are_scipys(kappa: float) -> None:
    _, scale = VonMises(1).gaussian(torch.tensor([[kappa, 0.0]]))
    ratio = scipy.special.i1e(kappa) / scipy.special.i0e(kappa)
    assert scale.item() == pytest.approx(math.sqrt(-2 * math.log(ratio)), rel=1e-4)


@every_family
def test_unconstrained_undoes_constrained(name: str) -> None:
    family = FAMILIES[name](N)
    u = torch.linspace(-3, 3, 12).reshape(4, N)
    z = family.constrained(u)
    torch.testing.assert_close(family.unconstrained(z), u)
    assert family.distribution(member(family)).support.check(z).all()


def test_angles_wrap_to_the_half_open_circle() -> None:
    angles = torch.tensor([-math.pi, math.pi, 4.0, 0.5])
    expected = torch.tensor([math.pi, math.pi, 4.0 - 2 * math.pi, 0.5])
    torch.testing.assert_close(VonMises(4).constrained(angles), expected)


def test_uniform_angles_are_allowed_and_have_finite_gradients_in_float32() -> None:
    natural = torch.zeros(1, 2, dtype=torch.float32, requires_grad=True)
    stock = VonMises(1).distribution(natural)
    loss = (
        stock.log_prob(torch.tensor([0.3], dtype=torch.float32))
        - VonMises(1).log_partition(natural).sum()
    )
    (gradient,) = torch.autograd.grad(loss, natural)
    assert gradient.isfinite().all()


# ------------------------------------------------------------------------------------------------------- distributions


@every_family
@pytest.mark.parametrize("batch", [(), (4,), (2, 1, 5)])
def test_batch_dimensions_pass_through(name: str, batch: tuple[int, ...]) -> None:
    family = FAMILIES[name](N)
    natural = member(family, *batch)
    stock = family.distribution(natural)
    components = () if name == "FullNormal" else (N,)
    assert (stock.batch_shape, stock.event_shape) == (batch, (N,))
    assert stock.event_dim == family.event_dim == 1
    assert natural.shape == family.natural(stock).shape == (*batch, N, family.k)
    assert (
        family.statistics(stock.sample()).shape == family.evidence(natural).shape == natural.shape
    )
    assert (
        family.log_partition(natural).shape
        == family.log_base(stock.sample()).shape
        == batch + components
    )
    assert family.gaussian(natural)[0].shape == (*batch, N)


@every_family
@pytest.mark.parametrize("batch", [(0,), (0, 4), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_may_be_empty(name: str, batch: tuple[int, ...], dtype: torch.dtype) -> None:
    family = FAMILIES[name](N)
    raw = torch.zeros(*batch, N, family.k, dtype=dtype)
    natural = family.from_raw(raw) + family.evidence(raw)
    stock = family.distribution(natural)
    assert (stock.batch_shape, stock.event_shape) == (batch, (N,))
    assert stock.sample().shape == (*batch, N)
    assert family.natural(stock).shape == family.mean_statistics(natural).shape == natural.shape
    assert family.log_partition(natural).numel() == 0
    assert family.gaussian(natural)[0].shape == (*batch, N)
    assert family.from_covariance(*_moments_of(family, natural)).shape == natural.shape


def _moments_of(family: Family, natural: Tensor) -> tuple[Tensor, Tensor]:
    mean, precision = family.information(natural)
    return mean, torch.linalg.inv(precision)


@independent_families
def test_natural_reads_independent_expanded_and_plain_distributions(name: str) -> None:
    family, stock = FAMILIES[name](N), STOCK[name](torch.tensor(0.7), torch.tensor(1.3))
    one = family.natural(stock.expand((N,)))
    for wrapped in (
        stock.expand((5, N)),
        stock.expand((5, N)).to_event(1),
        stock.expand((5, N)).to_event(2),
        stock.expand((N,)).to_event(1).expand((5,)),
        dist.ExpandedDistribution(stock, (5, N)).to_event(1),
    ):
        torch.testing.assert_close(family.natural(wrapped), one.expand(5, N, 2))


def test_natural_reads_torchs_own_distributions() -> None:
    assert torch.equal(
        Gamma(1).natural(torch.distributions.Gamma(torch.ones(1), 2.0)), torch.tensor([[0.0, -2.0]])
    )


@every_family
def test_members_work_as_pyro_sites_in_a_plate(name: str) -> None:
    family = FAMILIES[name](N)
    natural = member(family, 4)

    def program() -> Tensor:
        with pyro.plate("task", 4):
            return pyro.sample("z", family.distribution(natural))

    trace = pyro.poutine.trace(program).get_trace()
    assert trace.nodes["z"]["value"].shape == (4, N)
    assert trace.log_prob_sum().isfinite()


def test_full_normal_is_torchs_multivariate_normal() -> None:
    family, mean = FullNormal(N), torch.randn(4, N)
    root = torch.randn(4, N, N).tril() + 2 * torch.eye(N)
    natural = family.from_precision(mean, root @ root.mT)
    stock = dist.MultivariateNormal(mean, covariance_matrix=torch.linalg.inv(root @ root.mT))
    z = stock.sample()
    torch.testing.assert_close(family.distribution(natural).log_prob(z), stock.log_prob(z))
    torch.testing.assert_close(family.natural(stock), natural)
    torch.testing.assert_close(family.gaussian(natural)[1], stock.variance.sqrt())
    torch.testing.assert_close(
        family.natural(dist.MultivariateNormal(mean[0], torch.eye(N)).expand((4,))),
        family.from_precision(mean[:1].expand(4, N), torch.eye(N)),
    )


def test_diagonal_full_normal_is_normal() -> None:
    mean, scale, z = torch.randn(N), torch.rand(N) + 0.5, torch.randn(N)
    full, diagonal = (
        family.distribution(family.from_gaussian(mean, scale))
        for family in (FullNormal(N), Normal(N))
    )
    torch.testing.assert_close(full.log_prob(z), diagonal.log_prob(z))


def test_full_normal_update_is_the_kalman_update() -> None:
    family, design, noise = FullNormal(2), torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 1.0]]), 0.3
    truth = torch.tensor([0.4, -0.2])
    precision = design.T @ design / noise**2
    natural = family.from_gaussian(torch.zeros(2), torch.ones(2)) + family.from_precision(
        truth, precision
    )
    covariance = torch.eye(2) + 0.0
    gain = (
        covariance
        @ design.T
        @ torch.linalg.inv(design @ covariance @ design.T + noise**2 * torch.eye(3))
    )
    mean, scale = family.gaussian(natural)
    torch.testing.assert_close(mean, gain @ design @ truth)
    torch.testing.assert_close(
        scale, ((torch.eye(2) - gain @ design) @ covariance).diagonal().sqrt()
    )


# ------------------------------------------------------------------------------------------------------ names of terms


BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {
    "z": lambda z: z,
    "z²": lambda z: z**2,
    "log z": lambda z: z.log(),
    "log² z": lambda z: z.log() ** 2,
    "log(1 - z)": lambda z: (1 - z).log(),
    "cos z": lambda z: z.cos(),
    "sin z": lambda z: z.sin(),
}


@independent_families
def test_every_statistic_is_what_its_term_says(name: str) -> None:
    family = FAMILIES[name](N)
    z = family.distribution(member(family)).sample((20,))
    assert len(family.terms) == family.k
    said = torch.stack([BY_NAME[term](z) for term in family.terms], -1)
    torch.testing.assert_close(family.statistics(z), said)


def test_terms_of_a_full_normal_name_its_products() -> None:
    family, z = FullNormal(2), torch.randn(20, 2)
    assert family.terms == ("z", "z z[0]", "z z[1]")
    assert torch.equal(family.statistics(z)[..., 2], z * z[:, 1:])


def test_a_family_of_one_s_own_numbers_its_terms() -> None:
    class Three(Normal):
        _terms = ()
        k = 3  # type: ignore[assignment]

    assert Three(1).terms == ("T1", "T2", "T3")


@every_family
def test_a_family_is_factorised_where_its_density_is_a_product(name: str) -> None:
    """Of a product, changing one component changes the log-density by as much wherever the others are."""
    family = FAMILIES[name](2)
    stock = family.distribution(member(family))
    (a, b), (c, d) = stock.sample((2,))
    mixed = stock.log_prob(torch.stack([a, b])) + stock.log_prob(torch.stack([c, d]))
    mixed = mixed - stock.log_prob(torch.stack([a, d])) - stock.log_prob(torch.stack([c, b]))
    assert family.factorized == (abs(mixed.item()) < 1e-6)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "bad", "condition"),
    [
        ("Normal", [0.0, 0.1], r"λ\[..., 1\] < 0"),
        ("LogNormal", [0.0, 0.0], r"λ\[..., 1\] < 0"),
        ("Gamma", [-1.5, -1.0], r"λ\[..., 0\] > -1 and λ\[..., 1\] < 0"),
        ("Gamma", [0.0, 1.0], r"λ\[..., 0\] > -1 and λ\[..., 1\] < 0"),
        ("Beta", [0.0, -2.0], "λ > -1"),
        ("VonMises", [math.nan, 0.0], "λ finite"),
        ("FullNormal", [0.0, 0.5], "positive definite"),
    ],
)
def test_improper_natural_parameters_are_refused_by_name(
    name: str, bad: list[float], condition: str
) -> None:
    with pytest.raises(ValueError, match=f"proper {name}, .*{condition}"):
        FAMILIES[name](1).distribution(torch.tensor([bad]))


def test_improper_natural_parameters_pass_when_validation_is_off() -> None:
    with pyro.validation_enabled(False):
        assert Normal(1).distribution(torch.tensor([[0.0, 1.0]])).stddev.isnan().all()


@every_family
def test_wrong_shapes_are_refused_with_the_right_one(name: str) -> None:
    family = FAMILIES[name](N)
    for method in (family.distribution, family.from_raw, family.evidence):
        with pytest.raises(
            ValueError,
            match=rf"{name}\(3\) parameters of shape \(..., 3, {family.k}\); got \(2, 5\)",
        ):
            method(torch.zeros(2, 5))


@every_family
def test_components_and_scales_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}\(n\) with at least one component; got 0"):
        FAMILIES[name](0)
    with pytest.raises(ValueError, match=rf"{name}\(scale=...\) positive and finite; got -1.0"):
        FAMILIES[name](1, scale=-1.0)
    with pytest.raises(ValueError, match=rf"{name}\(loc=...\) finite; got inf"):
        FAMILIES[name](1, loc=math.inf)


def test_distributions_of_another_family_are_refused() -> None:
    with pytest.raises(TypeError, match="a distribution of Gamma's kind; got Normal"):
        Gamma(1).natural(dist.Normal(torch.zeros(1), 1.0).to_event(1))
    with pytest.raises(
        ValueError, match=r"a distribution over \(..., 2\) for Normal\(2\); got \(3,\)"
    ):
        Normal(2).natural(dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pytest.raises(
        ValueError, match=r"a distribution over \(..., 2\) for Normal\(2\); got \(\)"
    ):
        Normal(2).natural(dist.Normal(0.0, 1.0))


def test_precisions_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a precision of shape \(..., 2, 2\); got \(3, 3\)"):
        FullNormal(2).from_precision(torch.zeros(2), torch.eye(3))


# --------------------------------------------------------------------------------------------------------- the module


def test_the_table_names_every_family() -> None:
    assert sorted([*FAMILIES, "Family"]) == families.__all__


def test_family_itself_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Family(1)  # type: ignore[abstract]


@every_family
def test_families_compare_and_print_by_what_they_are(name: str) -> None:
    assert FAMILIES[name](2, loc=1.0) == FAMILIES[name](2, loc=1.0) != FAMILIES[name](2)
    assert repr(FAMILIES[name](2, loc=1.0)) == f"{name}(n=2, loc=1.0, scale=1.0)"
