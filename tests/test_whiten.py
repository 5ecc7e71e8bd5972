"""Whitening: scores, information and deviances of every noise against those of its density."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution

import pyro_hybrid as ph
from pyro_hybrid.beliefs.belief import Gaussian
from pyro_hybrid.evidence.least_squares import LeastSquares
from pyro_hybrid.programs.whiten import whiten

COUNTS = torch.arange(400.0, dtype=torch.float64)
LINE = torch.linspace(-400.0, 400.0, 400_001, dtype=torch.float64)
POSITIVE = torch.linspace(-12.0, 12.0, 100_001, dtype=torch.float64).exp()
FIVE = torch.tensor(5.0, dtype=torch.float64)

NOISES: dict[str, tuple[Callable[[Tensor], Distribution], float, Tensor]] = {
    "normal": (lambda m: dist.Normal(m, 0.7), 1.3, LINE),
    "lognormal": (lambda m: dist.LogNormal(m, 0.7), 0.4, POSITIVE),
    "student": (lambda m: dist.StudentT(4.0 * torch.ones_like(m), m, 0.7), 1.3, LINE),
    "poisson": (lambda m: dist.Poisson(m), 2.6, COUNTS),
    "rare poisson": (lambda m: dist.Poisson(m), 0.1, COUNTS),
    "binomial": (lambda m: dist.Binomial(9, probs=m / 9.0), 2.6, COUNTS[:10]),
    "bernoulli": (lambda m: dist.Bernoulli(probs=m), 0.3, COUNTS[:2]),
    "negative binomial": (
        lambda m: dist.NegativeBinomial(FIVE, logits=(m / 5.0).log()),
        2.6,
        COUNTS,
    ),
    "gamma poisson": (lambda m: dist.GammaPoisson(FIVE, FIVE / m), 2.6, COUNTS),
}


def weights_of(fn: Distribution, values: Tensor) -> Tensor:
    """Probability of each value: of a count, or of the stretch around a number."""
    density = fn.log_prob(values).exp()
    if values[0] == 0.0:
        return density
    return density * torch.gradient(values)[0]


@pytest.mark.parametrize("name", NOISES)
def test_residuals_are_scores_over_the_root_of_the_information(name: str) -> None:
    build, at, values = NOISES[name]
    location = torch.full_like(values, at).requires_grad_()
    (score,) = torch.autograd.grad(build(location).log_prob(values).sum(), location)
    noise = whiten(build(location.detach()), values)
    assert torch.allclose(noise.residual * noise.root, score, rtol=1e-9, atol=1e-9)
    weights = weights_of(build(location.detach()), values)
    information = (weights * score.square()).sum()
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(noise.root.flatten()[0].square()) == pytest.approx(float(information), rel=1e-4)


@pytest.mark.parametrize("name", NOISES)
def test_the_deviance_is_what_the_log_density_lacks_to_its_maximum(name: str) -> None:
    build, at, values = NOISES[name]
    middle = values[(values > 0.0) & (values < 9.0)][:: 997 if len(values) > 1000 else 1][:50]
    middle = middle[(middle < 1.0) | (torch.tensor(name != "bernoulli"))]
    best = middle.log() if name == "lognormal" else middle
    found = whiten(build(torch.full_like(middle, at)), middle).deviance
    lacking = build(best).log_prob(middle) - build(torch.full_like(middle, at)).log_prob(middle)
    assert torch.allclose(found, 2.0 * lacking, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["poisson", "binomial", "negative binomial", "bernoulli"])
def test_a_count_of_zero_has_a_finite_deviance(name: str) -> None:
    build, at, _ = NOISES[name]
    location = torch.tensor([at]).double()
    zero = torch.zeros(1).double()
    found = whiten(build(location), zero).deviance
    assert torch.allclose(found, -2.0 * build(location).log_prob(zero), rtol=1e-9)


def test_noise_of_no_rule_is_whitened_by_its_standard_deviation() -> None:
    noise = whiten(dist.Laplace(torch.tensor([1.0]), 0.5), torch.tensor([2.0]))
    assert noise.residual.item() == pytest.approx(1.0 / (0.5 * 2.0**0.5))


def counted(episode: ph.Episode) -> None:
    """Counts whose logarithm is linear in two latents."""
    shots = episode.query
    with episode.plate:
        zero = shots.times.new_zeros(shots.shape[0], 2)
        z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))[..., None, None, :]
        t = shots.times.unsqueeze(-1)
        rate = (z[..., :1] + z[..., 1:] * t).exp()
        pyro.sample("x", dist.Poisson(rate).mask(shots.scored).to_event(3), obs=shots.values)


@pytest.mark.parametrize("mean_count", [0.3, 3.0, 100.0])
def test_gauss_newton_finds_the_maximum_and_the_information_of_counts(mean_count: float) -> None:
    generator = torch.Generator().manual_seed(0)
    times = torch.linspace(-1.0, 1.0, 41, dtype=torch.float64)
    truth = 0.4 * torch.randn(6, 2, generator=generator).double()
    truth[:, 0] += torch.tensor(mean_count).log()
    rates = (truth[:, :1] + truth[:, 1:] * times).exp()
    values = torch.poisson(rates, generator=generator)[:, None, :, None]
    shots = ph.Shots.from_tensors(times, values)
    belief = Gaussian.around({"z": ph.families.Normal(2)}, torch.zeros(6, 2).double(), 1.0)
    posterior = belief + ph.GaussNewton(30)(belief, shots, counted)
    marginal = posterior.gaussian().task_marginal
    mean = marginal.mean.clone().requires_grad_()
    fitted = (mean[:, :1] + mean[:, 1:] * times).exp()
    log_joint = dist.Poisson(fitted).log_prob(values[:, 0, :, 0]).sum() - 0.5 * mean.square().sum()
    (gradient,) = torch.autograd.grad(log_joint, mean)
    basis = torch.stack([torch.ones_like(times), times], -1)
    information = torch.einsum("st,ti,tj->sij", fitted.detach(), basis, basis) + torch.eye(2)
    step = torch.linalg.solve(information, gradient)
    sd = torch.linalg.inv(information).diagonal(dim1=-2, dim2=-1).sqrt()
    assert (step / sd).abs().max() < 1e-2
    assert torch.allclose(marginal.precision, information, rtol=1e-2, atol=1e-2)


def test_a_problem_of_counts_measures_its_cost_by_the_deviance() -> None:
    times = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
    shots = ph.Shots.from_tensors(times, torch.zeros(1, 1, 5, 1).double())
    belief = Gaussian.around({"z": ph.families.Normal(2)}, torch.zeros(1, 2).double(), 1.0)
    problem = LeastSquares(counted, shots, belief)
    assert float(problem.cost_at(problem.mean)) == pytest.approx(10.0)
