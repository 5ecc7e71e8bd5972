"""FullNormal: a Normal family with a full covariance."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from pyro_hybrid.beliefs.family import (
    FAINTEST,
    NARROWEST,
    WIDEST,
    Family,
    Limit,
    bounded,
    in_scales,
)
from pyro_hybrid.errors import require
from pyro_hybrid.shapes import Latent, Natural

__all__ = ["FullNormal"]

# Frobenius norm of the off-diagonals in a learned precision's factor: float32 can factorize the product again.
MOST_COUPLED = 4.0


class FullNormal(Family):
    r"""One Normal over n components with a full covariance: :math:`\lambda = (\Lambda \mu, -\tfrac12 \Lambda)`.

    .. math:: T(z) = (z, z z^\top), \qquad
              A(\lambda) = \tfrac12 \mu^\top \Lambda \mu - \tfrac12 \log \det \Lambda

    λ is (..., n, 1 + n); ``log_partition`` and ``log_base`` are (...), having no independent components to keep apart.

    >>> FullNormal(2).from_precision(torch.ones(2), torch.eye(2))[..., 0]
    tensor([1., 1.])
    """

    _stock = dist.MultivariateNormal
    _accepts = td.MultivariateNormal
    _names = ("loc", "precision_matrix")
    factorized = False
    _condition = "-2 λ[..., 1:] positive definite"

    @property
    def _location_limit(self) -> Limit:
        return in_scales(self.scale)

    @property
    def k(self) -> int:
        """Number of statistics of each component: itself, and its products with all n."""
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
        white: Tensor = torch.linalg.solve_triangular(root, natural[..., :1], upper=False)[..., 0]
        half_log_det: Tensor = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return 0.5 * (white**2).sum(-1) - half_log_det

    def mean_statistics(self, natural: Natural) -> Natural:
        mean, covariance = _moments(natural)
        return torch.cat([mean[..., None], covariance + mean[..., None] * mean[..., None, :]], -1)

    def from_gaussian(self, mean: Latent, scale: Latent) -> Natural:
        """Build the member with independent components: mean and standard deviation (..., n) -> (..., n, 1 + n)."""
        return self.from_precision(mean, torch.diag_embed(scale**-2))

    def from_precision(self, mean: Latent, precision: Tensor) -> Natural:
        """Map mean (..., n) and precision Λ (..., n, n) to λ (..., n, 1 + n)."""
        require(
            precision.shape[-2:] == (self.n, self.n),
            f"a precision of shape (..., {self.n}, {self.n})",
            tuple(precision.shape),
            "One row and column for each component.",
        )
        first = precision @ mean[..., None]
        return torch.cat([first, -0.5 * precision.expand(*first.shape[:-1], self.n)], -1)

    def gaussian(self, natural: Natural) -> tuple[Latent, Latent]:
        """Compute mean and standard deviation of each component's marginal: (..., n, 1 + n) -> (..., n) twice."""
        mean, covariance = _moments(natural)
        return mean, covariance.diagonal(dim1=-2, dim2=-1).sqrt()

    def information(self, natural: Natural) -> tuple[Latent, Tensor]:
        precision = _precision(natural.double())
        return torch.linalg.solve(precision, natural[..., 0].double()), precision

    def from_covariance(self, mean: Latent, covariance: Tensor) -> Natural:
        precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        return self.from_precision(mean, precision.to(mean.dtype))

    def from_raw(self, raw: Natural) -> Natural:
        r"""Map any reals to λ of a proper member that float32 can factorize: (..., n, 1 + n) -> (..., n, 1 + n).

        .. math:: \mu = \mathrm{loc} + \mathrm{scale} \cdot r_0, \qquad \Lambda = D^{-1} (I + N) (I + N)^\top D^{-1}

        The diagonal of ``raw[..., 1:]`` makes D, the scales; what is below it makes N; what is above is ignored.
        """
        return self._couple(raw, WIDEST)

    def evidence(self, raw: Natural) -> Natural:
        """Map any reals, laid out as for ``from_raw``, to an increment that keeps every sum proper."""
        return self._couple(raw, FAINTEST)

    def _couple(self, raw: Tensor, widest: float) -> Tensor:
        self._require_shape(raw)
        table = raw[..., 1:]
        spread = self.scale * bounded(table.diagonal(dim1=-2, dim2=-1), NARROWEST, widest).exp()
        lower = table.tril(-1)
        lower = lower * (1 + (lower**2).sum((-2, -1), keepdim=True) / MOST_COUPLED**2).rsqrt()
        root = (torch.eye(self.n, dtype=raw.dtype, device=raw.device) + lower) / spread[..., None]
        return self.from_precision(self._location(raw[..., 0]), root @ root.mT)

    def _parameters(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        return _moments(natural)[0], _precision(natural)

    _from_parameters = from_precision


def _precision(natural: Tensor) -> Tensor:
    """Compute Λ, symmetrized: (..., n, 1 + n) -> (..., n, n)."""
    return -natural[..., 1:] - natural[..., 1:].mT


def _moments(natural: Tensor) -> tuple[Tensor, Tensor]:
    """Compute μ (..., n) and Λ⁻¹ (..., n, n)."""
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(_precision(natural)))
    return (covariance @ natural[..., :1])[..., 0], covariance
