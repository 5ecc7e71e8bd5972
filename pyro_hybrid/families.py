"""Exponential families in natural form, handed out as stock Pyro distributions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import transforms

from pyro_hybrid._checks import fail, require
from pyro_hybrid._types import Latent, Natural

__all__ = ["Beta", "Family", "FullNormal", "Gamma", "LogNormal", "Normal", "VonMises"]

# Limits on learned log-scales, relative to the family's own: float32 holds their squares, and e^u at the widest.
_NARROWEST, _WIDEST, _FAINTEST = -8.0, 2.0, 8.0
# Off-diagonals of a learned precision's factor: beyond this Frobenius norm float32 can't factorise the product.
_MOST_CORRELATED = 4.0
# |log z| or |logit z| that from_gaussian and evidence aim at: float32 holds e^60 times any strength above.
_REACH = 60.0
# torch's VonMises has NaN gradients in float32 below κ = 7e-5: no law here is flatter than this.
_FLATTEST = 1e-4
# Standard deviations of an angle, in radians, that from_gaussian aims at: beyond the second it is uniform.
_ANGULAR = (1e-4, 4.0)


@dataclass(frozen=True)
class Family(ABC):
    r"""n variables in an exponential family, described by natural parameters λ that add up.

    .. math:: p(z \mid \lambda) = h(z) \exp(\langle T(z), \lambda \rangle - A(\lambda))

    Adding natural parameters multiplies densities: prior plus evidence is the posterior. ``loc`` and ``scale`` place the
    member at ``raw = 0``, in unconstrained coordinates u (z itself, log z or logit z).

    Arguments:
        n: number of components; every member has event shape (n,).
        loc, scale: location and standard deviation of u at ``from_raw(0)``.
    """

    n: int
    loc: float = field(default=0.0, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)

    event_dim: ClassVar[int] = 1
    _stock: ClassVar[type[td.Distribution]]
    _condition: ClassVar[str]
    _coordinates: ClassVar[td.Transform] = transforms.identity_transform

    def __post_init__(self) -> None:
        name = type(self).__name__
        require(self.n >= 1, f"{name}(n) with at least one component", self.n, "Leave the latent out instead.")
        require(0.0 < self.scale < math.inf, f"{name}(scale=...) positive and finite", self.scale,
                "It is a standard deviation in unconstrained coordinates.")
        require(math.isfinite(self.loc), f"{name}(loc=...) finite", self.loc, "It lives in unconstrained coordinates.")

    @property
    def k(self) -> int:
        """Statistics per component."""
        return 2

    @abstractmethod
    def statistics(self, z: Latent) -> Natural:
        """T(z): (..., n) -> (..., n, k)."""

    def log_base(self, z: Latent) -> Tensor:
        """log h(z), per component as ``log_partition``: (..., n) -> (..., n)."""
        return torch.zeros_like(z)

    @abstractmethod
    def log_partition(self, natural: Natural) -> Tensor:
        """A(λ) per component: (..., n, k) -> (..., n)."""

    @abstractmethod
    def mean_statistics(self, natural: Natural) -> Natural:
        """E[T(z)] = ∇A(λ): (..., n, k) -> (..., n, k)."""

    @abstractmethod
    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        """The member whose unconstrained coordinates have this mean and standard deviation: (..., n) -> (..., n, k)."""

    @abstractmethod
    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        """Mean and standard deviation of the unconstrained coordinates: (..., n, k) -> (..., n) twice."""

    def distribution(self, natural: Natural) -> td.Distribution:
        """The stock Pyro distribution with natural parameters λ: (..., n, k) -> batch shape (...), event shape (n,)."""
        self._require_shape(natural)
        if td.Distribution._validate_args:
            self._require_proper(natural)
        stock = self._build(natural)
        return stock.to_event(self.event_dim - len(stock.event_shape))

    def natural(self, distribution: td.Distribution) -> Natural:
        """λ of a distribution of this family, independent or expanded: shape (..., n) -> (..., n, k)."""
        stock = distribution
        while isinstance(stock, (td.Independent, dist.ExpandedDistribution)):
            stock = stock.base_dist
        name, shape = type(self).__name__, distribution.batch_shape + distribution.event_shape
        require(isinstance(stock, self._stock), f"a {self._stock.__name__} for {name}.natural", type(stock).__name__,
                "Use the family that the distribution belongs to.", TypeError)
        require(shape[-1:] == (self.n,), f"a distribution over (..., {self.n}) for {name}({self.n})", tuple(shape),
                f"Write {name}(n) with its last dimension, or .expand the distribution.")
        return self._read(stock).expand(*shape, self.k)

    def from_raw(self, raw: Natural) -> Natural:
        r"""Any reals -> λ of a proper member: (..., n, k) -> (..., n, k), smooth and safe in float32.

        .. math:: \mathrm{E}[u] = \mathrm{loc} + \mathrm{scale} \cdot r_0,
                  \qquad \mathrm{sd}[u] = \mathrm{scale} \cdot e^{b(r_1)}, \qquad -8 < b(r_1) < 2
        """
        return self.from_gaussian(*self._locate(raw, _WIDEST))

    def evidence(self, raw: Natural) -> Natural:
        r"""Any reals -> an increment that keeps every sum proper: (..., n, k) -> (..., n, k).

        A pseudo-observation of u, pulling towards :math:`u = \mathrm{loc} + \mathrm{scale} \cdot r_0` with

        .. math:: \mathrm{strength} = (\mathrm{scale} \cdot e^{b(r_1)})^{-2}, \qquad -8 < b(r_1) < 8

        It is never exactly zero; the zero increment, adding nothing to λ, is the identity.
        """
        location, spread = self._locate(raw, _FAINTEST)
        return self._pull(location) * spread[..., None] ** -2

    def unconstrained(self, z: Tensor) -> Tensor:
        """z -> u, from the support to the real line, elementwise."""
        return self._coordinates.inv(z)

    def constrained(self, u: Tensor) -> Tensor:
        """u -> z, from the real line to the support, elementwise."""
        return self._coordinates(u)

    @abstractmethod
    def _build(self, natural: Tensor) -> td.Distribution:
        """The stock distribution before ``to_event``."""

    @abstractmethod
    def _read(self, stock: td.Distribution) -> Tensor:
        """λ of the stock distribution, in its own shape."""

    @abstractmethod
    def _proper(self, natural: Tensor) -> Tensor:
        """Where ``_condition`` holds: (..., n, k) -> bool (..., n)."""

    def _pull(self, location: Tensor) -> Tensor:
        """Increment of unit strength towards u = location, in the cone that keeps λ proper: (..., n) -> (..., n, k)."""
        return self.from_gaussian(location, torch.ones_like(location))

    def _locate(self, raw: Tensor, widest: float) -> tuple[Tensor, Tensor]:
        self._require_shape(raw)
        return self.loc + self.scale * raw[..., 0], self.scale * _bounded(raw[..., 1], _NARROWEST, widest).exp()

    def _require_shape(self, natural: Tensor) -> None:
        require(natural.shape[-2:] == (self.n, self.k), f"{type(self).__name__}({self.n}) parameters of shape "
                f"(..., {self.n}, {self.k})", tuple(natural.shape), "The last two axes are (component, statistic).")

    def _require_proper(self, natural: Tensor) -> None:
        proper = self._proper(natural)
        if not proper.all():
            fail(f"natural parameters of a proper {type(self).__name__}: {self._condition}",
                 natural[~proper][0].tolist(), "Make λ with from_raw, and add only what evidence returns.")


class _Gaussian:
    """The half of Normal and LogNormal that knows only u."""

    _condition = "λ[..., 1] < 0"

    def log_partition(self, natural: Natural) -> Tensor:
        return -natural[..., 0] ** 2 / (4 * natural[..., 1]) - 0.5 * (-2 * natural[..., 1]).log()

    def mean_statistics(self, natural: Natural) -> Natural:
        mean, scale = self.gaussian(natural)
        return torch.stack([mean, mean**2 + scale**2], -1)

    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        return torch.stack([mean, torch.full_like(mean, -0.5)], -1) * scale[..., None] ** -2

    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        precision = -2 * natural[..., 1]
        return natural[..., 0] / precision, precision.rsqrt()

    def _read(self, stock: td.Distribution) -> Tensor:
        return self.from_gaussian(stock.loc, stock.scale)

    def _proper(self, natural: Tensor) -> Tensor:
        return natural[..., 1] < 0


class Normal(_Gaussian, Family):
    r"""Independent Normal components: :math:`T = (z, z^2)`, :math:`\lambda = (\mu / \sigma^2, -1 / 2 \sigma^2)`.

    .. math:: A(\lambda) = -\lambda_0^2 / 4 \lambda_1 - \tfrac12 \log(-2 \lambda_1)

    >>> Normal(1).from_gaussian(torch.tensor([3.0]), torch.tensor([0.5]))
    tensor([[12., -2.]])
    """

    _stock = td.Normal

    def statistics(self, z: Latent) -> Natural:
        return torch.stack([z, z**2], -1)

    def log_base(self, z: Latent) -> Tensor:
        return torch.full_like(z, -0.5 * math.log(2 * math.pi))

    def _build(self, natural: Tensor) -> td.Distribution:
        return dist.Normal(*self.gaussian(natural))


class LogNormal(_Gaussian, Family):
    r"""Independent LogNormal components: Normal in u = log z, with :math:`h(z) = 1 / z \sqrt{2 \pi}`.

    >>> rate = LogNormal(1, loc=2.3, scale=0.5)
    >>> rate.gaussian(rate.from_raw(torch.zeros(1, 2)))
    (tensor([2.3000]), tensor([0.5000]))
    """

    _stock = td.LogNormal
    _coordinates = transforms.ExpTransform()

    def statistics(self, z: Latent) -> Natural:
        return torch.stack([z.log(), z.log() ** 2], -1)

    def log_base(self, z: Latent) -> Tensor:
        return -z.log() - 0.5 * math.log(2 * math.pi)

    def _build(self, natural: Tensor) -> td.Distribution:
        return dist.LogNormal(*self.gaussian(natural))


class Gamma(Family):
    r"""Independent Gamma components: :math:`T = (\log z, z)`, :math:`\lambda = (\alpha - 1, -\beta)`.

    .. math:: A(\lambda) = \log \Gamma(\alpha) - \alpha \log \beta, \qquad \mathrm{E}[u] = \psi(\alpha) - \log \beta,
              \qquad \mathrm{Var}[u] = \psi_1(\alpha)

    >>> Gamma(1).mean_statistics(torch.tensor([[2.0, -1.5]]))[..., 1]
    tensor([2.])
    """

    _stock = td.Gamma
    _condition = "λ[..., 0] > -1 and λ[..., 1] < 0"
    _coordinates = transforms.ExpTransform()

    def statistics(self, z: Latent) -> Natural:
        return torch.stack([z.log(), z], -1)

    def log_partition(self, natural: Natural) -> Tensor:
        shape, rate = natural[..., 0] + 1, -natural[..., 1]
        return torch.lgamma(shape) - shape * rate.log()

    def mean_statistics(self, natural: Natural) -> Natural:
        shape, rate = natural[..., 0] + 1, -natural[..., 1]
        return torch.stack([torch.digamma(shape) - rate.log(), shape / rate], -1)

    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        shape = _inverse_trigamma(scale.double() ** 2)
        rate = (torch.digamma(shape) - mean.double().clamp(-_REACH, _REACH)).exp()
        return torch.stack([shape - 1, -rate], -1).to(mean.dtype)

    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        shape, rate = natural[..., 0] + 1, -natural[..., 1]
        return torch.digamma(shape) - rate.log(), torch.polygamma(1, shape).sqrt()

    def _build(self, natural: Tensor) -> td.Distribution:
        return dist.Gamma(natural[..., 0] + 1, -natural[..., 1])

    def _read(self, stock: td.Distribution) -> Tensor:
        return torch.stack([stock.concentration - 1, -stock.rate], -1)

    def _proper(self, natural: Tensor) -> Tensor:
        return (natural[..., 0] > -1) & (natural[..., 1] < 0)

    def _pull(self, location: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(location), -(-location).clamp(-_REACH, _REACH).exp()], -1)


class Beta(Family):
    r"""Independent Beta components: :math:`T = (\log z, \log(1 - z))`, :math:`\lambda = (\alpha - 1, \beta - 1)`.

    .. math:: A(\lambda) = \log B(\alpha, \beta), \qquad \mathrm{E}[u] = \psi(\alpha) - \psi(\beta),
              \qquad \mathrm{Var}[u] = \psi_1(\alpha) + \psi_1(\beta)

    Evidence counts: strength · (sigmoid(location), sigmoid(-location)) successes and failures.

    >>> Beta(1).natural(dist.Beta(torch.tensor([3.0]), 2.0))
    tensor([[2., 1.]])
    """

    _stock = td.Beta
    _condition = "λ > -1"
    _coordinates = transforms.SigmoidTransform()

    def statistics(self, z: Latent) -> Natural:
        return torch.stack([z.log(), torch.log1p(-z)], -1)

    def log_partition(self, natural: Natural) -> Tensor:
        return torch.lgamma(natural + 1).sum(-1) - torch.lgamma(natural.sum(-1) + 2)

    def mean_statistics(self, natural: Natural) -> Natural:
        return torch.digamma(natural + 1) - torch.digamma(natural.sum(-1, keepdim=True) + 2)

    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        counts = _inverse_logit_moments(mean.double().clamp(-_REACH, _REACH), scale.double() ** 2)
        return (counts - 1).to(mean.dtype)

    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        success, failure = torch.digamma(natural + 1).unbind(-1)
        return success - failure, torch.polygamma(1, natural + 1).sum(-1).sqrt()

    def _build(self, natural: Tensor) -> td.Distribution:
        return dist.Beta(natural[..., 0] + 1, natural[..., 1] + 1)

    def _read(self, stock: td.Distribution) -> Tensor:
        return torch.stack([stock.concentration1, stock.concentration0], -1) - 1

    def _proper(self, natural: Tensor) -> Tensor:
        return (natural > -1).all(-1)

    def _pull(self, location: Tensor) -> Tensor:
        return torch.stack([location.sigmoid(), (-location).sigmoid()], -1)


class VonMises(Family):
    r"""Independent angles: :math:`T = (\cos z, \sin z)`, :math:`\lambda = \kappa (\cos \mu, \sin \mu)`.

    .. math:: A(\lambda) = \log I_0(\kappa), \qquad
              \mathrm{E}[\cos(z - \mu)] = I_1(\kappa) / I_0(\kappa) = e^{-\mathrm{sd}[u]^2 / 2}

    The standard deviation is that of the wrapped Normal with the same mean resultant. Torch has neither a closed-form KL
    nor ``rsample`` for it: ELBOs fall back on sampling, with score-function gradients.

    >>> VonMises(1).constrained(torch.tensor([4.0]))
    tensor([-2.2832])
    """

    _stock = td.VonMises
    _condition = "λ finite"

    def statistics(self, z: Latent) -> Natural:
        return torch.stack([z.cos(), z.sin()], -1)

    def log_base(self, z: Latent) -> Tensor:
        return torch.full_like(z, -math.log(2 * math.pi))

    def log_partition(self, natural: Natural) -> Tensor:
        concentration = _concentration(natural)
        return torch.special.i0e(concentration).log() + concentration

    def mean_statistics(self, natural: Natural) -> Natural:
        concentration = _concentration(natural)
        resultant = torch.special.i1e(concentration) / torch.special.i0e(concentration)
        return natural * (resultant / concentration)[..., None]

    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        concentration = _inverse_circular_scale(scale.double()).to(mean.dtype)
        return self._pull(mean) * concentration[..., None]

    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        spread = _log_dispersion(_concentration(natural).double()).exp()
        return torch.atan2(natural[..., 1], natural[..., 0]), (2 * torch.log1p(spread)).sqrt().to(natural.dtype)

    def constrained(self, u: Tensor) -> Tensor:
        return math.pi - torch.remainder(math.pi - u, 2 * math.pi)

    def _build(self, natural: Tensor) -> td.Distribution:
        return dist.VonMises(torch.atan2(natural[..., 1], natural[..., 0]), _concentration(natural))

    def _read(self, stock: td.Distribution) -> Tensor:
        return self._pull(stock.loc) * stock.concentration[..., None]

    def _proper(self, natural: Tensor) -> Tensor:
        return natural.isfinite().all(-1)

    def _pull(self, location: Tensor) -> Tensor:
        return torch.stack([location.cos(), location.sin()], -1)


class FullNormal(Family):
    r"""One Normal over n components with a full covariance: :math:`\lambda = (\Lambda \mu, -\tfrac12 \Lambda)`, (..., n, 1 + n).

    .. math:: T(z) = (z, z z^\top), \qquad
              A(\lambda) = \tfrac12 \mu^\top \Lambda \mu - \tfrac12 \log \det \Lambda

    ``log_partition`` and ``log_base`` are of shape (...): there are no independent components to keep apart. In ``raw``, the
    diagonal of ``raw[..., 1:]`` holds log-scales of each component given the others, what is below it couples them, and what
    is above it is ignored.

    >>> FullNormal(2).from_precision(torch.ones(2), torch.eye(2))
    tensor([[ 1.0000, -0.5000, -0.0000],
            [ 1.0000, -0.0000, -0.5000]])
    """

    _stock = td.MultivariateNormal
    _condition = "the precision -2 λ[..., 1:] positive definite"

    @property
    def k(self) -> int:
        return 1 + self.n

    def statistics(self, z: Latent) -> Natural:
        return torch.cat([z[..., None], z[..., None] * z[..., None, :]], -1)

    def log_base(self, z: Latent) -> Tensor:
        return torch.full_like(z[..., 0], -0.5 * self.n * math.log(2 * math.pi))

    def log_partition(self, natural: Natural) -> Tensor:
        root = torch.linalg.cholesky(_precision(natural))
        white = torch.linalg.solve_triangular(root, natural[..., :1], upper=False)[..., 0]
        return 0.5 * (white**2).sum(-1) - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def mean_statistics(self, natural: Natural) -> Natural:
        mean, covariance = _full_moments(natural)
        return torch.cat([mean[..., None], covariance + mean[..., None] * mean[..., None, :]], -1)

    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        return self.from_precision(mean, torch.diag_embed(scale**-2))

    def from_precision(self, mean: Latent, precision: Tensor) -> Natural:
        """Mean (..., n) and precision Λ (..., n, n) -> λ (..., n, 1 + n)."""
        return torch.cat([precision @ mean[..., None], -0.5 * precision], -1)

    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        """Mean and standard deviation of each component's marginal: (..., n, 1 + n) -> (..., n) twice."""
        mean, covariance = _full_moments(natural)
        return mean, covariance.diagonal(dim1=-2, dim2=-1).sqrt()

    def from_raw(self, raw: Natural) -> Natural:
        r"""Any reals -> λ of a proper member, safe to factorise in float32: (..., n, 1 + n) -> (..., n, 1 + n).

        .. math:: \mu = \mathrm{loc} + \mathrm{scale} \cdot r_0, \qquad \Lambda = D^{-1} (I + N) (I + N)^\top D^{-1}
        """
        return self._member(raw, _WIDEST)

    def evidence(self, raw: Natural) -> Natural:
        """Any reals -> an increment that keeps every sum proper: a pseudo-observation of all components at once."""
        return self._member(raw, _FAINTEST)

    def _member(self, raw: Tensor, widest: float) -> Tensor:
        self._require_shape(raw)
        table = raw[..., 1:]
        spread = self.scale * _bounded(table.diagonal(dim1=-2, dim2=-1), _NARROWEST, widest).exp()
        lower = table.tril(-1)
        lower = lower * (1 + (lower**2).sum((-2, -1), keepdim=True) / _MOST_CORRELATED**2).rsqrt()
        root = (torch.eye(self.n, dtype=raw.dtype, device=raw.device) + lower) / spread[..., None]
        return self.from_precision(self.loc + self.scale * raw[..., 0], root @ root.mT)

    def _build(self, natural: Tensor) -> td.Distribution:
        return dist.MultivariateNormal(_full_moments(natural)[0], precision_matrix=_precision(natural))

    def _read(self, stock: td.Distribution) -> Tensor:
        return self.from_precision(stock.loc, stock.precision_matrix)

    def _proper(self, natural: Tensor) -> Tensor:
        return torch.linalg.cholesky_ex(_precision(natural)).info == 0


def _bounded(x: Tensor, lowest: float, highest: float) -> Tensor:
    """Identity near 0, within (lowest, highest), twice differentiable; its slope decays but never vanishes as tanh's does."""
    limit = torch.where(x < 0, lowest, highest)
    return x * (1 + (x / limit) ** 2).rsqrt()


def _inverse_trigamma(variance: Tensor) -> Tensor:
    """α with ψ₁(α) = variance: Newton in log α, where log ψ₁ is nearly straight; three steps reach 1e-14."""
    log_shape = ((1 + (1 + 2 * variance).sqrt()) / (2 * variance)).log()
    for _ in range(3):
        shape = log_shape.exp()
        trigamma = torch.polygamma(1, shape)
        log_shape = log_shape - (trigamma / variance).log() * trigamma / (shape * torch.polygamma(2, shape))
    return log_shape.exp()


def _inverse_logit_moments(mean: Tensor, variance: Tensor) -> Tensor:
    r"""(α, β) with ψ(α) - ψ(β) = mean and ψ₁(α) + ψ₁(β) = variance: (...) -> (..., 2); four Newton steps reach 1e-8.

    .. math:: (\alpha, \beta) = 1 / \log(1 + e^{-u}) \approx \psi^{-1}(u)

    In u the first equation is nearly straight, and so is the second once read through ``_digamma_at``: any start will do.
    """
    share = torch.stack([(-mean).sigmoid(), mean.sigmoid()], -1)
    sign = torch.tensor([1.0, -1.0], dtype=mean.dtype, device=mean.device)
    goal, _ = _digamma_at(variance)
    u, _ = _digamma_at(variance[..., None] * share)
    for _ in range(4):
        counts = _counts(u)
        slope, trigamma = counts**2 * (-u).sigmoid(), torch.polygamma(1, counts)
        level, tilt = _digamma_at(trigamma.sum(-1))
        miss = torch.stack([(sign * torch.digamma(counts)).sum(-1) - mean, level - goal], -1)
        jacobian = torch.stack([sign * trigamma, tilt[..., None] * torch.polygamma(2, counts)], -2) * slope[..., None, :]
        u = u - torch.linalg.solve(jacobian, miss)
    return _counts(u)


def _counts(u: Tensor) -> Tensor:
    # logaddexp, not softplus: below its threshold softplus is exact, above it drops what Newton needs
    return 1 / torch.logaddexp(-u, torch.zeros_like(u))


def _digamma_at(trigamma: Tensor) -> tuple[Tensor, Tensor]:
    """About ψ(α) where ψ₁(α) is this, right at both ends, and its derivative."""
    root = (1 + 4 * trigamma).sqrt()
    x = 2 * trigamma / (1 + root)
    return -torch.expm1(x).log(), 1 / (torch.expm1(-x) * root)


def _concentration(natural: Tensor) -> Tensor:
    """κ = |λ|, smoothly kept from 0: (..., n, 2) -> (..., n)."""
    return ((natural**2).sum(-1) + _FLATTEST**2).sqrt()


def _log_dispersion(concentration: Tensor) -> Tensor:
    """log(1/A - 1) where A = I₁(κ)/I₀(κ); nearly -log κ. Beyond κ = 100, where 1 - A cancels, its expansion."""
    low, x = concentration.clamp(max=100.0), 1 / concentration.clamp(min=100.0)
    i0, i1 = torch.special.i0e(low), torch.special.i1e(low)
    gap = x / 2 + x**2 / 8 + x**3 / 8 + 25 * x**4 / 128 + 13 * x**5 / 32
    return torch.where(concentration < 100.0, (i0 - i1).log() - i1.log(), gap.log() - torch.log1p(-gap))


def _inverse_circular_scale(scale: Tensor) -> Tensor:
    """κ with A(κ) = exp(-scale²/2), by twelve steps in log κ that each leave a fifth of the error."""
    goal = torch.expm1(scale.clamp(*_ANGULAR) ** 2 / 2).log()
    log_concentration = -goal
    for _ in range(12):
        # the slope lies between -1 and -1.56
        log_concentration = log_concentration + (_log_dispersion(log_concentration.exp()) - goal) / 1.28
    return log_concentration.exp()


def _precision(natural: Tensor) -> Tensor:
    """Λ, symmetrised: (..., n, 1 + n) -> (..., n, n)."""
    return -natural[..., 1:] - natural[..., 1:].mT


def _full_moments(natural: Tensor) -> tuple[Tensor, Tensor]:
    """μ (..., n) and Λ⁻¹ (..., n, n) of a FullNormal's λ."""
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(_precision(natural)))
    return (covariance @ natural[..., :1])[..., 0], covariance
