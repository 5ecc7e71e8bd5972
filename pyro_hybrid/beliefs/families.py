"""Exponential families in natural form, handed out as stock Pyro distributions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import transforms

from pyro_hybrid.beliefs.inverse_moments import (
    inverse_circular,
    inverse_logit_moments,
    inverse_trigamma,
    log_dispersion,
)
from pyro_hybrid.errors import fail, require
from pyro_hybrid.shapes import Latent, Natural, Stock

__all__ = ["Beta", "Family", "FullNormal", "Gamma", "LogNormal", "Normal", "VonMises"]

# Limits on learned log-scales, relative to the family's own: float32 holds their squares, and e^u at the widest.
_NARROWEST, _WIDEST, _FAINTEST = -8.0, 2.0, 8.0
# |log z| or |logit z| that from_gaussian and evidence aim at: float32 holds e^60 times any strength above.
_REACH = 60.0
# Frobenius norm of the off-diagonals in a learned precision's factor: float32 can factorise the product again.
_MOST_COUPLED = 4.0
# torch's VonMises has NaN gradients in float32 below κ = 7e-5: no angle here is flatter than this.
_FLATTEST = 1e-4


@dataclass(frozen=True)
class Family(ABC):
    r"""n variables in an exponential family, described by natural parameters λ that add up.

    .. math:: p(z \mid \lambda) = h(z) \exp(\langle T(z), \lambda \rangle - A(\lambda))

    Adding natural parameters multiplies densities: prior plus evidence is the posterior.
    The unconstrained coordinates u are z itself, log z or logit z.

    Arguments:
        n: number of components; every member has event shape (n,).
        loc, scale: location and standard deviation of u at ``from_raw(0)``.
    """

    n: int
    loc: float | int = field(default=0.0, kw_only=True)
    scale: float | int = field(default=1.0, kw_only=True)

    event_dim: ClassVar[int] = 1
    factorised: ClassVar[bool] = True
    _terms: ClassVar[tuple[str, ...]] = ()
    _stock: ClassVar[type[Any]]
    _names: ClassVar[tuple[str, str]]
    _condition: ClassVar[str]
    _log_base: ClassVar[float] = 0.0
    _coordinates: ClassVar[td.Transform] = transforms.identity_transform

    def __post_init__(self) -> None:
        name = type(self).__name__
        require(
            self.n >= 1,
            f"{name}(n) with at least one component",
            self.n,
            "Leave the latent out instead.",
        )
        require(
            0.0 < self.scale < math.inf,
            f"{name}(scale=...) positive and finite",
            self.scale,
            "It is a standard deviation in unconstrained coordinates.",
        )
        require(
            math.isfinite(self.loc),
            f"{name}(loc=...) finite",
            self.loc,
            "It lives in unconstrained coordinates.",
        )

    @property
    def k(self) -> int:
        """Statistics per component."""
        return 2

    @property
    def terms(self) -> tuple[str, ...]:
        """What each statistic is, in words."""
        return self._terms or tuple(f"T{j + 1}" for j in range(self.k))

    @abstractmethod
    def statistics(self, z: Latent) -> Natural:
        """T(z): (..., n) -> (..., n, k)."""

    def log_base(self, z: Latent) -> Tensor:
        """log h(z), per component as ``log_partition``: (..., n) -> (..., n)."""
        return torch.full_like(z, self._log_base)

    @abstractmethod
    def log_partition(self, natural: Natural) -> Tensor:
        """A(λ) per component: (..., n, k) -> (..., n)."""

    @abstractmethod
    def mean_statistics(self, natural: Natural) -> Natural:
        """E[T(z)] = ∇A(λ): (..., n, k) -> (..., n, k)."""

    @abstractmethod
    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        """The member whose u has this mean and standard deviation: (..., n) twice -> (..., n, k)."""

    @abstractmethod
    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        """Mean and standard deviation of u: (..., n, k) -> (..., n) twice."""

    def information(self, natural: Natural) -> tuple[Latent, Tensor]:
        """Mean and precision of u, in float64: (..., n, k) -> (..., n) and (..., n, n)."""
        mean, scale = self.gaussian(natural)
        return mean.double(), torch.diag_embed(scale.double() ** -2)

    def from_covariance(self, mean: Latent, covariance: Tensor) -> Natural:
        """The member with these moments of u: (..., n) and (..., n, n) -> (..., n, k).

        Families of independent components take the diagonal.
        """
        scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        return self.from_gaussian(mean, scale.to(mean.dtype))

    def distribution(self, natural: Natural) -> Stock:
        """The stock Pyro distribution with parameter λ: (..., n, k) -> batch shape (...), event shape (n,)."""
        self._require_shape(natural)
        try:
            stock = self._stock(**dict(zip(self._names, self._parameters(natural), strict=True)))
        except (ValueError, torch.linalg.LinAlgError):
            fail(
                f"natural parameters of a proper {type(self).__name__}, {self._condition}",
                f"λ of shape {tuple(natural.shape)} with others among them (torch names them above)",
                "Make λ with from_raw, and add only what evidence returns.",
            )
        return stock.to_event(self.event_dim - len(stock.event_shape))

    def natural(self, distribution: td.Distribution) -> Natural:
        """λ of a distribution of this family, independent or expanded: shape (..., n) -> (..., n, k)."""
        stock = distribution
        while isinstance(stock, (td.Independent, dist.ExpandedDistribution)):
            stock = stock.base_dist
        name, shape = type(self).__name__, distribution.batch_shape + distribution.event_shape
        # the parent of Pyro's class is torch's, which serves as well
        require(
            isinstance(stock, self._stock.__bases__[0]),
            f"a distribution of {name}'s kind",
            type(stock).__name__,
            "Ask the family it belongs to.",
            TypeError,
        )
        require(
            shape[-1:] == (self.n,),
            f"a distribution over (..., {self.n}) for {name}({self.n})",
            tuple(shape),
            "Its last dimension counts the components: expand it, or change n.",
        )
        stock = stock.expand(shape[: len(shape) - len(stock.event_shape)])
        return self._from_parameters(*(getattr(stock, key) for key in self._names))

    def from_raw(self, raw: Natural) -> Natural:
        r"""Any reals -> λ of a proper member: (..., n, k) -> (..., n, k), smooth and safe in float32.

        .. math:: \mathrm{E}[u] = \mathrm{loc} + \mathrm{scale} \cdot r_0,
                  \qquad \mathrm{sd}[u] = \mathrm{scale} \cdot e^{b(r_1)}, \qquad -8 < b(r_1) < 2
        """
        return self.from_gaussian(*self._locate(raw, _WIDEST))

    def evidence(self, raw: Natural) -> Natural:
        r"""Any reals -> an increment that keeps every sum proper: (..., n, k) -> (..., n, k).

        A pseudo-observation of u at :math:`\mathrm{loc} + \mathrm{scale} \cdot r_0` of strength

        .. math:: (\mathrm{scale} \cdot e^{b(r_1)})^{-2}, \qquad -8 < b(r_1) < 8

        It is never exactly zero: the increment that changes nothing is 0 itself.
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
    def _parameters(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        """The stock distribution's parameters ``_names``: (..., n, k) -> (..., n) twice."""

    @abstractmethod
    def _from_parameters(self, first: Tensor, second: Tensor, /) -> Tensor:
        """The inverse of ``_parameters``."""

    def _pull(self, location: Tensor) -> Tensor:
        """Increment of unit strength towards u = location: (..., n) -> (..., n, k)."""
        return self.from_gaussian(location, torch.ones_like(location))

    def _locate(self, raw: Tensor, widest: float) -> tuple[Tensor, Tensor]:
        self._require_shape(raw)
        return self.loc + self.scale * raw[..., 0], self.scale * _bounded(
            raw[..., 1], _NARROWEST, widest
        ).exp()

    def _require_shape(self, natural: Tensor) -> None:
        require(
            natural.shape[-2:] == (self.n, self.k),
            f"{type(self).__name__}({self.n}) parameters of shape (..., {self.n}, {self.k})",
            tuple(natural.shape),
            "The last two axes are (component, statistic).",
        )


class _Gaussian:
    """What Normal and LogNormal share: all that concerns u only."""

    _names = ("loc", "scale")
    _condition = "λ[..., 1] < 0"
    _log_base = -0.5 * math.log(2 * math.pi)

    def log_partition(self, natural: Natural) -> Tensor:
        return -(natural[..., 0] ** 2) / (4 * natural[..., 1]) - 0.5 * (-2 * natural[..., 1]).log()

    def mean_statistics(self, natural: Natural) -> Natural:
        mean, scale = self.gaussian(natural)
        return torch.stack([mean, mean**2 + scale**2], -1)

    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        return torch.stack([mean, torch.full_like(mean, -0.5)], -1) * scale[..., None] ** -2

    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        precision = -2 * natural[..., 1]
        return natural[..., 0] / precision, precision.rsqrt()

    _parameters, _from_parameters = gaussian, from_gaussian


class Normal(_Gaussian, Family):
    r"""Independent Normal components: :math:`T = (z, z^2)`, :math:`\lambda = (\mu / \sigma^2, -1 / 2 \sigma^2)`.

    .. math:: A(\lambda) = -\lambda_0^2 / 4 \lambda_1 - \tfrac12 \log(-2 \lambda_1)

    >>> Normal(1).from_gaussian(torch.tensor([3.0]), torch.tensor([0.5]))
    tensor([[12., -2.]])
    """

    _stock = dist.Normal
    _terms = ("z", "z²")

    def statistics(self, z: Latent) -> Natural:
        return torch.stack([z, z**2], -1)


class LogNormal(_Gaussian, Family):
    r"""Independent LogNormal components: Normal in u = log z, with :math:`h(z) = 1 / z \sqrt{2 \pi}`.

    >>> rate = LogNormal(1, loc=2.3, scale=0.5)
    >>> rate.gaussian(rate.from_raw(torch.zeros(1, 2)))
    (tensor([2.3000]), tensor([0.5000]))
    """

    _stock = dist.LogNormal
    _terms = ("log z", "log² z")
    _coordinates = transforms.ExpTransform()

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

    _stock, _names = dist.Gamma, ("concentration", "rate")
    _terms = ("log z", "z")
    _condition = "λ[..., 0] > -1 and λ[..., 1] < 0"
    _coordinates = transforms.ExpTransform()

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
        rate = (torch.digamma(shape) - mean.double().clamp(-_REACH, _REACH)).exp()
        return self._from_parameters(shape, rate).to(mean.dtype)

    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        shape, rate = self._parameters(natural)
        return torch.digamma(shape) - rate.log(), torch.polygamma(1, shape).sqrt()

    def _parameters(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        return natural[..., 0] + 1, -natural[..., 1]

    def _from_parameters(self, first: Tensor, second: Tensor, /) -> Tensor:
        return torch.stack([first - 1, -second], -1)

    def _pull(self, location: Tensor) -> Tensor:
        return torch.stack(
            [torch.ones_like(location), -location.clamp(-_REACH, _REACH).neg().exp()], -1
        )


class Beta(Family):
    r"""Independent Beta components: :math:`T = (\log z, \log(1 - z))`, :math:`\lambda = (\alpha - 1, \beta - 1)`.

    .. math:: A(\lambda) = \log B(\alpha, \beta), \qquad \mathrm{E}[u] = \psi(\alpha) - \psi(\beta),
              \qquad \mathrm{Var}[u] = \psi_1(\alpha) + \psi_1(\beta)

    Evidence counts: it is strength times (sigmoid(location), sigmoid(-location)) successes and failures.

    >>> Beta(1).natural(dist.Beta(torch.tensor([3.0]), 2.0))
    tensor([[2., 1.]])
    """

    _stock, _names = dist.Beta, ("concentration1", "concentration0")
    _terms = ("log z", "log(1 - z)")
    _condition = "λ > -1"
    _coordinates = transforms.SigmoidTransform()

    def statistics(self, z: Latent) -> Natural:
        return torch.stack([z.log(), torch.log1p(-z)], -1)

    def log_partition(self, natural: Natural) -> Tensor:
        return torch.lgamma(natural + 1).sum(-1) - torch.lgamma(natural.sum(-1) + 2)

    def mean_statistics(self, natural: Natural) -> Natural:
        return torch.digamma(natural + 1) - torch.digamma(natural.sum(-1, keepdim=True) + 2)

    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        counts = inverse_logit_moments(mean.double().clamp(-_REACH, _REACH), scale.double() ** 2)
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

    _stock, _names = dist.VonMises, ("loc", "concentration")
    _terms = ("cos z", "sin z")
    _condition = "λ finite"
    _log_base = -math.log(2 * math.pi)

    def statistics(self, z: Latent) -> Natural:
        return torch.stack([z.cos(), z.sin()], -1)

    def log_partition(self, natural: Natural) -> Tensor:
        _, concentration = self._parameters(natural)
        return torch.special.i0e(concentration).log() + concentration

    def mean_statistics(self, natural: Natural) -> Natural:
        _, concentration = self._parameters(natural)
        resultant = torch.special.i1e(concentration) / torch.special.i0e(concentration)
        return natural * (resultant / concentration)[..., None]

    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        return self._from_parameters(mean, inverse_circular(scale.double()).to(mean.dtype))

    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        mean, concentration = self._parameters(natural.double())
        scale = (2 * torch.log1p(log_dispersion(concentration).exp())).sqrt()
        return mean.to(natural.dtype), scale.to(natural.dtype)

    def constrained(self, u: Tensor) -> Tensor:
        """Wrapped to (-π, π]."""
        return math.pi - torch.remainder(math.pi - u, 2 * math.pi)

    def _parameters(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        return torch.atan2(natural[..., 1], natural[..., 0]), (
            (natural**2).sum(-1) + _FLATTEST**2
        ).sqrt()

    def _from_parameters(self, first: Tensor, second: Tensor, /) -> Tensor:
        return self.statistics(first) * second[..., None]

    def _pull(self, location: Tensor) -> Tensor:
        return self.statistics(location)


class FullNormal(Family):
    r"""One Normal over n components with a full covariance: :math:`\lambda = (\Lambda \mu, -\tfrac12 \Lambda)`.

    .. math:: T(z) = (z, z z^\top), \qquad
              A(\lambda) = \tfrac12 \mu^\top \Lambda \mu - \tfrac12 \log \det \Lambda

    λ is (..., n, 1 + n); ``log_partition`` and ``log_base`` are (...), having no independent components to keep apart.

    >>> FullNormal(2).from_precision(torch.ones(2), torch.eye(2))[..., 0]
    tensor([1., 1.])
    """

    _stock, _names = dist.MultivariateNormal, ("loc", "precision_matrix")
    factorised = False
    _condition = "-2 λ[..., 1:] positive definite"

    @property
    def k(self) -> int:
        """Statistics per component: itself, and its products with all n."""
        return 1 + self.n

    @property
    def terms(self) -> tuple[str, ...]:
        return ("z", *(f"z z[{j}]" for j in range(self.n)))

    def statistics(self, z: Latent) -> Natural:
        return torch.cat([z[..., None], z[..., None] * z[..., None, :]], -1)

    def log_base(self, z: Latent) -> Tensor:
        return torch.full_like(z[..., 0], -0.5 * self.n * math.log(2 * math.pi))

    def log_partition(self, natural: Natural) -> Tensor:
        root = torch.linalg.cholesky(_precision(natural))
        white = torch.linalg.solve_triangular(root, natural[..., :1], upper=False)[..., 0]
        return 0.5 * (white**2).sum(-1) - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def mean_statistics(self, natural: Natural) -> Natural:
        mean, covariance = _moments(natural)
        return torch.cat([mean[..., None], covariance + mean[..., None] * mean[..., None, :]], -1)

    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        """The member with independent components: mean and standard deviation (..., n) -> (..., n, 1 + n)."""
        return self.from_precision(mean, torch.diag_embed(scale**-2))

    def from_precision(self, mean: Latent, precision: Tensor) -> Natural:
        """Mean (..., n) and precision Λ (..., n, n) -> λ (..., n, 1 + n)."""
        require(
            precision.shape[-2:] == (self.n, self.n),
            f"a precision of shape (..., {self.n}, {self.n})",
            tuple(precision.shape),
            "One row and column for each component.",
        )
        first = precision @ mean[..., None]
        return torch.cat([first, -0.5 * precision.expand(*first.shape[:-1], self.n)], -1)

    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        """Mean and standard deviation of each component's marginal: (..., n, 1 + n) -> (..., n) twice."""
        mean, covariance = _moments(natural)
        return mean, covariance.diagonal(dim1=-2, dim2=-1).sqrt()

    def information(self, natural: Natural) -> tuple[Latent, Tensor]:
        precision = _precision(natural.double())
        return torch.linalg.solve(precision, natural[..., 0].double()), precision

    def from_covariance(self, mean: Latent, covariance: Tensor) -> Natural:
        precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        return self.from_precision(mean, precision.to(mean.dtype))

    def from_raw(self, raw: Natural) -> Natural:
        r"""Any reals -> λ of a proper member that float32 can factorise: (..., n, 1 + n) -> (..., n, 1 + n).

        .. math:: \mu = \mathrm{loc} + \mathrm{scale} \cdot r_0, \qquad \Lambda = D^{-1} (I + N) (I + N)^\top D^{-1}

        The diagonal of ``raw[..., 1:]`` makes D, the scales; what is below it makes N; what is above is ignored.
        """
        return self._couple(raw, _WIDEST)

    def evidence(self, raw: Natural) -> Natural:
        """Any reals, laid out as for ``from_raw`` -> an increment that keeps every sum proper."""
        return self._couple(raw, _FAINTEST)

    def _couple(self, raw: Tensor, widest: float) -> Tensor:
        self._require_shape(raw)
        table = raw[..., 1:]
        spread = self.scale * _bounded(table.diagonal(dim1=-2, dim2=-1), _NARROWEST, widest).exp()
        lower = table.tril(-1)
        lower = lower * (1 + (lower**2).sum((-2, -1), keepdim=True) / _MOST_COUPLED**2).rsqrt()
        root = (torch.eye(self.n, dtype=raw.dtype, device=raw.device) + lower) / spread[..., None]
        return self.from_precision(self.loc + self.scale * raw[..., 0], root @ root.mT)

    def _parameters(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        return _moments(natural)[0], _precision(natural)

    _from_parameters = from_precision


def _bounded(x: Tensor, lowest: float, highest: float) -> Tensor:
    """Identity near 0, within (lowest, highest), twice differentiable; its slope outlives tanh's."""
    limit = torch.full_like(x, highest).masked_fill(x < 0, lowest)
    return x * (1 + (x / limit) ** 2).rsqrt()


def _precision(natural: Tensor) -> Tensor:
    """Λ of a FullNormal's λ, symmetrised: (..., n, 1 + n) -> (..., n, n)."""
    return -natural[..., 1:] - natural[..., 1:].mT


def _moments(natural: Tensor) -> tuple[Tensor, Tensor]:
    """μ (..., n) and Λ⁻¹ (..., n, n) of a FullNormal's λ."""
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(_precision(natural)))
    return (covariance @ natural[..., :1])[..., 0], covariance
