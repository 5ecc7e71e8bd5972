"""Family: what all exponential families have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import transforms

from pyro_hybrid.errors import fail, require
from pyro_hybrid.shapes import Latent, Natural, Stock

__all__ = ["FAINTEST", "NARROWEST", "WIDEST", "Family", "Limit", "bounded", "in_scales", "softened"]

# Limits of learned log-scales, relative to the family's own. float32 holds the squares of the scales.
NARROWEST, WIDEST, FAINTEST = -8.0, 2.0, 8.0
# A learned number beyond this has reached its limit; its square would overflow in float32.
LARGEST = 1e6


class Limit(NamedTuple):
    """Numbers up to ``exact`` stay as they are; larger ones stay below ``most``."""

    exact: float
    most: float


def in_scales(scale: float) -> Limit:
    """Return the limit of learned locations without other bounds: float32 holds their squares over variances."""
    return Limit(1e4 * scale, 1e6 * scale)


def bounded(x: Tensor, lowest: float, highest: float) -> Tensor:
    """Keep numbers within (lowest, highest): identity near 0, twice differentiable, with a slope that outlives tanh's."""
    x = x.clamp(-LARGEST, LARGEST)
    limit = torch.full_like(x, highest).masked_fill(x < 0, lowest)
    return x * (1 + (x / limit) ** 2).rsqrt()


def softened(x: Tensor, limit: Limit) -> Tensor:
    """Keep numbers within a limit, in both directions; twice differentiable."""
    if math.isinf(limit.exact):
        return x
    room = limit.most - limit.exact
    excess = (x.abs() - limit.exact).clamp(0.0, LARGEST * room)
    kept = x.clamp(-limit.exact, limit.exact)
    return kept + x.sign() * excess * (1 + (excess / room) ** 2).rsqrt()


@dataclass(frozen=True)
class Family(ABC):
    r"""An exponential family of n variables, described by natural parameters λ that add up.

    .. math:: p(z \mid \lambda) = h(z) \exp(\langle T(z), \lambda \rangle - A(\lambda))

    Adding natural parameters multiplies densities: prior plus evidence is the posterior. The unconstrained coordinates
    u are z itself, log z or logit z.

    Arguments:
        n: number of components; every member has event shape (n,).
        loc, scale: location and standard deviation of u at ``from_raw(0)``.
    """

    n: int
    loc: float | int = field(default=0.0, kw_only=True)
    scale: float | int = field(default=1.0, kw_only=True)

    event_dim: ClassVar[int] = 1
    factorized: ClassVar[bool] = True
    _terms: ClassVar[tuple[str, ...]] = ()
    _stock: ClassVar[type[Any]]
    _accepts: ClassVar[type[td.Distribution]]
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
        """Number of statistics of each component."""
        return 2

    @property
    def terms(self) -> tuple[str, ...]:
        """Formulas of the statistics, in words."""
        return self._terms or tuple(f"T{j + 1}" for j in range(self.k))

    @abstractmethod
    def statistics(self, z: Latent) -> Natural:
        """Compute T(z): (..., n) -> (..., n, k)."""

    def log_base(self, z: Latent) -> Tensor:
        """Compute log h(z), per component as ``log_partition``: (..., n) -> (..., n)."""
        return torch.full_like(z, self._log_base)

    @abstractmethod
    def log_partition(self, natural: Natural) -> Tensor:
        """Compute A(λ) per component: (..., n, k) -> (..., n)."""

    @abstractmethod
    def mean_statistics(self, natural: Natural) -> Natural:
        """Compute E[T(z)] = ∇A(λ): (..., n, k) -> (..., n, k)."""

    @abstractmethod
    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        """Find the member whose u has this mean and standard deviation: (..., n) twice -> (..., n, k)."""

    @abstractmethod
    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        """Compute mean and standard deviation of u: (..., n, k) -> (..., n) twice."""

    def information(self, natural: Natural) -> tuple[Latent, Tensor]:
        """Compute mean and precision of u, in float64: (..., n, k) -> (..., n) and (..., n, n)."""
        mean, scale = self.gaussian(natural)
        return mean.double(), torch.diag_embed(scale.double() ** -2)

    def from_covariance(self, mean: Latent, covariance: Tensor) -> Natural:
        """Find the member with these moments of u: (..., n) and (..., n, n) -> (..., n, k).

        Families of independent components take the diagonal.
        """
        scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        return self.from_gaussian(mean, scale.to(mean.dtype))

    def distribution(self, natural: Natural) -> Stock:
        """Build the stock Pyro distribution with parameter λ: (..., n, k) -> batch shape (...), event shape (n,)."""
        self._require_shape(natural)
        # torch can't validate the parameters of an empty batch
        validate = False if natural.numel() == 0 else None
        try:
            parameters = dict(zip(self._names, self._parameters(natural), strict=True))
            stock = self._stock(**parameters, validate_args=validate)
        except (ValueError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            fail(
                f"natural parameters of a proper {type(self).__name__}, {self._condition}",
                f"λ of shape {tuple(natural.shape)} with others among them (torch names them above)",
                "Make λ with from_raw, and add only what evidence returns.",
            )
        independent: Stock = stock.to_event(self.event_dim - len(stock.event_shape))
        return independent

    def natural(self, distribution: td.Distribution) -> Natural:
        """Compute λ of a distribution of this family, independent or expanded: shape (..., n) -> (..., n, k)."""
        stock = distribution
        while isinstance(stock, (td.Independent, dist.ExpandedDistribution)):
            stock = stock.base_dist
        name = type(self).__name__
        shape = distribution.batch_shape + distribution.event_shape
        require(
            isinstance(stock, self._accepts),
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
        first, second = (getattr(stock, parameter) for parameter in self._names)
        return self._from_parameters(first, second)

    def from_raw(self, raw: Natural) -> Natural:
        r"""Map any reals to λ of a proper member: (..., n, k) -> (..., n, k), smooth and safe in float32.

        .. math:: \mathrm{E}[u] = \mathrm{loc} + \mathrm{scale} \cdot r_0,
                  \qquad \mathrm{sd}[u] = \mathrm{scale} \cdot e^{b(r_1)}, \qquad -8 < b(r_1) < 2

        Locations and scales that no float32 could hold the values of are limited, smoothly.
        """
        location, spread = self._locate(raw, WIDEST)
        return self.from_gaussian(location, softened(spread, self._spread_limit))

    def evidence(self, raw: Natural) -> Natural:
        r"""Map any reals to an increment that keeps every sum proper: (..., n, k) -> (..., n, k).

        A pseudo-observation of u at :math:`\mathrm{loc} + \mathrm{scale} \cdot r_0` of strength

        .. math:: (\mathrm{scale} \cdot e^{b(r_1)})^{-2}, \qquad -8 < b(r_1) < 8

        It is never exactly zero: the increment that changes nothing is 0 itself.
        """
        location, spread = self._locate(raw, FAINTEST)
        return self._pull(location) * spread[..., None] ** -2

    def unconstrained(self, z: Tensor) -> Tensor:
        """Map z to u, from the support to the real line, elementwise."""
        u: Tensor = self._coordinates.inv(z)
        return u

    def constrained(self, u: Tensor) -> Tensor:
        """Map u to z, from the real line to the support, elementwise."""
        z: Tensor = self._coordinates(u)
        return z

    @property
    def _location_limit(self) -> Limit:
        """Limit of the distance of learned locations of u from ``loc``."""
        return Limit(math.inf, math.inf)

    @property
    def _spread_limit(self) -> Limit:
        """Limit of learned standard deviations of u."""
        return Limit(math.inf, math.inf)

    @abstractmethod
    def _parameters(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the stock distribution's parameters ``_names``: (..., n, k) -> (..., n) twice."""

    @abstractmethod
    def _from_parameters(self, first: Tensor, second: Tensor, /) -> Tensor:
        """Invert ``_parameters``."""

    def _pull(self, location: Tensor) -> Tensor:
        """Return the increment of unit strength towards u = location: (..., n) -> (..., n, k)."""
        return self.from_gaussian(location, torch.ones_like(location))

    def _location(self, raw: Tensor) -> Tensor:
        return self.loc + softened(self.scale * raw, self._location_limit)

    def _locate(self, raw: Tensor, widest: float) -> tuple[Tensor, Tensor]:
        self._require_shape(raw)
        spread = self.scale * bounded(raw[..., 1], NARROWEST, widest).exp()
        return self._location(raw[..., 0]), spread

    def _require_shape(self, natural: Tensor) -> None:
        require(
            natural.shape[-2:] == (self.n, self.k),
            f"{type(self).__name__}({self.n}) parameters of shape (..., {self.n}, {self.k})",
            tuple(natural.shape),
            "The last two axes are (component, statistic).",
        )
