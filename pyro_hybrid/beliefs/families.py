"""Exponential families in natural form, which build stock Pyro distributions."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import transforms
from torch.distributions.kl import kl_divergence, register_kl

from pyro_hybrid.beliefs.family import Family, Limit, in_scales
from pyro_hybrid.beliefs.full_normal import FullNormal
from pyro_hybrid.beliefs.inverse_moments import (
    inverse_circular,
    inverse_logit_moments,
    inverse_trigamma,
    log_dispersion,
)
from pyro_hybrid.shapes import Latent, Natural

__all__ = ["Beta", "Family", "FullNormal", "Gamma", "LogNormal", "Normal", "VonMises"]

# How far learned locations of log z and logit z may be from loc: float32 holds values, rates and divergences there.
LOGARITHMS, LOGITS = Limit(20.0, 30.0), Limit(12.0, 16.0)
# Learned standard deviations of log z, unless the scale is larger.
SPREADS = Limit(6.0, 8.0)
# |log z| or |logit z| of given moments: float32 holds e^60 times the strength of any evidence.
REACH = 60.0
# torch's VonMises has NaN gradients in float32 below κ = 7e-5: no angle here is flatter than this.
FLATTEST = 1e-4


def _of_logarithms(family: Family) -> Limit:
    """Return the limit of learned standard deviations of log z."""
    return Limit(max(SPREADS.exact, family.scale), max(SPREADS.most, 1.5 * family.scale))


class PreciseGamma(dist.Gamma):
    """A Gamma distribution whose divergence is computed in float64: its terms cancel."""


class PreciseBeta(dist.Beta):
    """A Beta distribution whose divergence is computed in float64: its terms cancel."""


def _kl_of_gammas(p: td.Gamma, q: td.Gamma) -> Tensor:
    wide = [td.Gamma(x.concentration.double(), x.rate.double(), False) for x in (p, q)]
    return kl_divergence(*wide).to(p.rate.dtype)


def _kl_of_betas(p: td.Beta, q: td.Beta) -> Tensor:
    wide = [td.Beta(x.concentration1.double(), x.concentration0.double(), False) for x in (p, q)]
    return kl_divergence(*wide).to(p.concentration1.dtype)


register_kl(PreciseGamma, PreciseGamma)(_kl_of_gammas)
register_kl(PreciseBeta, PreciseBeta)(_kl_of_betas)


class _Gaussian(Family):
    """Families whose u is Normal."""

    _names = ("loc", "scale")
    _condition = "λ[..., 1] < 0"
    _log_base = -0.5 * math.log(2 * math.pi)

    def log_partition(self, natural: Natural) -> Tensor:
        mean, _ = self.gaussian(natural)
        return 0.5 * natural[..., 0] * mean - 0.5 * (-2 * natural[..., 1]).log()

    def mean_statistics(self, natural: Natural) -> Natural:
        mean, scale = self.gaussian(natural)
        return torch.stack([mean, mean**2 + scale**2], -1)

    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        return torch.stack([mean, torch.full_like(mean, -0.5)], -1) * scale[..., None] ** -2

    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        precision = -2 * natural[..., 1]
        return natural[..., 0] / precision, precision.rsqrt()

    _parameters = gaussian
    _from_parameters = from_gaussian


class Normal(_Gaussian):
    r"""Independent Normal components: :math:`T = (z, z^2)`, :math:`\lambda = (\mu / \sigma^2, -1 / 2 \sigma^2)`.

    .. math:: A(\lambda) = -\lambda_0^2 / 4 \lambda_1 - \tfrac12 \log(-2 \lambda_1)

    >>> Normal(1).from_gaussian(torch.tensor([3.0]), torch.tensor([0.5]))
    tensor([[12., -2.]])
    """

    _stock = dist.Normal
    _accepts = td.Normal
    _terms = ("z", "z²")

    @property
    def _location_limit(self) -> Limit:
        return in_scales(self.scale)

    def statistics(self, z: Latent) -> Natural:
        return torch.stack([z, z**2], -1)


class LogNormal(_Gaussian):
    r"""Independent LogNormal components: Normal in u = log z, with :math:`h(z) = 1 / z \sqrt{2 \pi}`.

    >>> rate = LogNormal(1, loc=2.3, scale=0.5)
    >>> rate.gaussian(rate.from_raw(torch.zeros(1, 2)))
    (tensor([2.3000]), tensor([0.5000]))
    """

    _stock = dist.LogNormal
    _accepts = td.LogNormal
    _terms = ("log z", "log² z")
    _coordinates = transforms.ExpTransform()
    _location_limit = LOGARITHMS

    @property
    def _spread_limit(self) -> Limit:
        return _of_logarithms(self)

    def statistics(self, z: Latent) -> Natural:
        return torch.stack([z.log(), z.log() ** 2], -1)

    def log_base(self, z: Latent) -> Tensor:
        return self._log_base - z.log()


class Gamma(Family):
    r"""Independent Gamma components: :math:`T = (\log z, z)`, :math:`\lambda = (\alpha - 1, -\beta)`.

    .. math:: A(\lambda) = \log \Gamma(\alpha) - \alpha \log \beta, \qquad \mathrm{E}[u] = \psi(\alpha) - \log \beta,
              \qquad \mathrm{Var}[u] = \psi_1(\alpha)

    >>> Gamma(1).mean_statistics(torch.tensor([[2.0, -1.5]]))[..., 1]
    tensor([2.])
    """

    _stock = PreciseGamma
    _accepts = td.Gamma
    _names = ("concentration", "rate")
    _terms = ("log z", "z")
    _condition = "λ[..., 0] > -1 and λ[..., 1] < 0"
    _coordinates = transforms.ExpTransform()
    _location_limit = LOGARITHMS

    @property
    def _spread_limit(self) -> Limit:
        return _of_logarithms(self)

    def statistics(self, z: Latent) -> Natural:
        return torch.stack([z.log(), z], -1)

    def log_partition(self, natural: Natural) -> Tensor:
        shape, rate = self._parameters(natural)
        return torch.lgamma(shape) - shape * rate.log()

    def mean_statistics(self, natural: Natural) -> Natural:
        shape, rate = self._parameters(natural)
        return torch.stack([torch.digamma(shape) - rate.log(), shape / rate], -1)

    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        shape = inverse_trigamma(scale.double() ** 2)
        rate = (torch.digamma(shape) - mean.double().clamp(-REACH, REACH)).exp()
        return self._from_parameters(shape, rate).to(mean.dtype)

    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        shape, rate = self._parameters(natural)
        return torch.digamma(shape) - rate.log(), torch.polygamma(1, shape).sqrt()

    def _parameters(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        return natural[..., 0] + 1, -natural[..., 1]

    def _from_parameters(self, first: Tensor, second: Tensor, /) -> Tensor:
        return torch.stack([first - 1, -second], -1)

    def _pull(self, location: Tensor) -> Tensor:
        rate = location.clamp(-REACH, REACH).neg().exp()
        return torch.stack([torch.ones_like(location), -rate], -1)


class Beta(Family):
    r"""Independent Beta components: :math:`T = (\log z, \log(1 - z))`, :math:`\lambda = (\alpha - 1, \beta - 1)`.

    .. math:: A(\lambda) = \log B(\alpha, \beta), \qquad \mathrm{E}[u] = \psi(\alpha) - \psi(\beta),
              \qquad \mathrm{Var}[u] = \psi_1(\alpha) + \psi_1(\beta)

    Evidence counts: it is strength times (sigmoid(location), sigmoid(-location)) successes and failures.

    >>> Beta(1).natural(dist.Beta(torch.tensor([3.0]), 2.0))
    tensor([[2., 1.]])
    """

    _stock = PreciseBeta
    _accepts = td.Beta
    _names = ("concentration1", "concentration0")
    _terms = ("log z", "log(1 - z)")
    _condition = "λ > -1"
    _coordinates = transforms.SigmoidTransform()
    _location_limit = LOGITS

    def statistics(self, z: Latent) -> Natural:
        return torch.stack([z.log(), torch.log1p(-z)], -1)

    def log_partition(self, natural: Natural) -> Tensor:
        return torch.lgamma(natural + 1).sum(-1) - torch.lgamma(natural.sum(-1) + 2)

    def mean_statistics(self, natural: Natural) -> Natural:
        return torch.digamma(natural + 1) - torch.digamma(natural.sum(-1, keepdim=True) + 2)

    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        counts = inverse_logit_moments(mean.double().clamp(-REACH, REACH), scale.double() ** 2)
        return self._from_parameters(*counts).to(mean.dtype)

    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        success, failure = torch.digamma(natural + 1).unbind(-1)
        return success - failure, torch.polygamma(1, natural + 1).sum(-1).sqrt()

    def _parameters(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        return natural[..., 0] + 1, natural[..., 1] + 1

    def _from_parameters(self, first: Tensor, second: Tensor, /) -> Tensor:
        return torch.stack([first, second], -1) - 1

    def _pull(self, location: Tensor) -> Tensor:
        return torch.stack([location.sigmoid(), (-location).sigmoid()], -1)


class VonMises(Family):
    r"""Independent angles: :math:`T = (\cos z, \sin z)`, :math:`\lambda = \kappa (\cos \mu, \sin \mu)`.

    .. math:: A(\lambda) = \log I_0(\kappa), \qquad
              \mathrm{E}[\cos(z - \mu)] = I_1(\kappa) / I_0(\kappa) = e^{-\mathrm{sd}[u]^2 / 2}

    The standard deviation is that of the wrapped Normal with the same mean resultant. Torch has neither a KL in
    closed form nor ``rsample`` for it: an ELBO falls back on samples and score-function gradients.

    >>> VonMises(1).constrained(torch.tensor([4.0]))
    tensor([-2.2832])
    """

    _stock = dist.VonMises
    _accepts = td.VonMises
    _names = ("loc", "concentration")
    _terms = ("cos z", "sin z")
    _condition = "λ finite"
    _log_base = -math.log(2 * math.pi)

    def statistics(self, z: Latent) -> Natural:
        return torch.stack([z.cos(), z.sin()], -1)

    def log_partition(self, natural: Natural) -> Tensor:
        _, concentration = self._parameters(natural)
        scaled: Tensor = torch.special.i0e(concentration)
        return scaled.log() + concentration

    def mean_statistics(self, natural: Natural) -> Natural:
        _, concentration = self._parameters(natural)
        resultant: Tensor = torch.special.i1e(concentration) / torch.special.i0e(concentration)
        return natural * (resultant / concentration)[..., None]

    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        return self._from_parameters(mean, inverse_circular(scale.double()).to(mean.dtype))

    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        mean, concentration = self._parameters(natural.double())
        scale = (2 * torch.log1p(log_dispersion(concentration).exp())).sqrt()
        return mean.to(natural.dtype), scale.to(natural.dtype)

    def constrained(self, u: Tensor) -> Tensor:
        """Wrap angles to (-π, π]."""
        return math.pi - torch.remainder(math.pi - u, 2 * math.pi)

    def _parameters(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.atan2(natural[..., 1], natural[..., 0])
        concentration = ((natural**2).sum(-1) + FLATTEST**2).sqrt()
        return mean, concentration

    def _from_parameters(self, first: Tensor, second: Tensor, /) -> Tensor:
        return self.statistics(first) * second[..., None]

    def _pull(self, location: Tensor) -> Tensor:
        return self.statistics(location)
