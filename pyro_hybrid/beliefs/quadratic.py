r"""Log densities that are quadratic, in information form: :math:`\eta^\top u - \tfrac12 u^\top \Lambda u`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Quadratic", "solve_positive"]


@dataclass(frozen=True, eq=False)
class Quadratic:
    r"""A Gaussian factor over d numbers, which may be improper, for every entry of a batch.

    .. math:: \log f(u) = \eta^\top u - \tfrac12 u^\top \Lambda u + \text{const}

    Factors multiply by adding, are eliminated by a Schur complement, and are normalized only on request. The algebra
    is that of ``pyro.ops.gaussian.Gaussian``, with two differences that inference on many tasks needs: an entry of the
    batch whose precision isn't positive definite leaves the others as they are, and no jitter is added.
    Everything is in float64: sensitivities of a chaotic system differ by more than float32 has digits.

    Arguments:
        information: :math:`\eta`, ``(..., d)``.
        precision: :math:`\Lambda`, ``(..., d, d)``.

    >>> bell = Quadratic(torch.tensor([4.0]).double(), torch.tensor([[2.0]]).double())
    >>> (bell + bell).mean, (bell + bell).covariance
    (tensor([2.], dtype=torch.float64), tensor([[0.2500]], dtype=torch.float64))
    """

    information: Tensor
    precision: Tensor

    @classmethod
    def centered(cls, mean: Tensor, precision: Tensor) -> Quadratic:
        """Build the factor of a given precision whose maximum lies at ``mean``."""
        precision = _symmetric(precision.double())
        return cls(_times(precision, mean.double()), precision)

    @property
    def size(self) -> int:
        """Number d of coordinates."""
        return self.information.shape[-1]

    @property
    def mean(self) -> Tensor:
        """Mean of the normalized density; NaN where there is none."""
        factor, failed = torch.linalg.cholesky_ex(self.precision)
        mean = torch.cholesky_solve(self.information[..., None], factor).squeeze(-1)
        return mean.masked_fill((failed > 0)[..., None], math.nan)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the normalized density; NaN where there is none."""
        factor, failed = torch.linalg.cholesky_ex(self.precision)
        covariance = torch.cholesky_inverse(factor)
        return covariance.masked_fill((failed > 0)[..., None, None], math.nan)

    @property
    def log_normalizer(self) -> Tensor:
        """Logarithm of the integral of f, the constant being left out."""
        factor = torch.linalg.cholesky(self.precision)
        white = torch.linalg.solve_triangular(factor, self.information[..., None], upper=False)
        log_determinant: Tensor = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * self.size * math.log(2.0 * math.pi)
        squares: Tensor = white.square().sum((-2, -1))
        return 0.5 * squares - log_determinant + constant

    def __add__(self, other: Quadratic) -> Quadratic:
        return Quadratic(self.information + other.information, self.precision + other.precision)

    def __sub__(self, other: Quadratic) -> Quadratic:
        return Quadratic(self.information - other.information, self.precision - other.precision)

    def __getitem__(self, rows: Tensor | slice | int) -> Quadratic:
        """Select entries of the first batch axis."""
        return Quadratic(self.information[rows], self.precision[rows])

    def __mul__(self, factor: float) -> Quadratic:
        """Count the factor this many times."""
        return Quadratic(factor * self.information, factor * self.precision)

    __rmul__ = __mul__

    def sum(self, dim: int) -> Quadratic:
        """Multiply the factors along a batch axis, counted from the front."""
        return Quadratic(self.information.sum(dim), self.precision.sum(dim))

    def expand(self, *batch: int) -> Quadratic:
        """Repeat the factor over a batch."""
        d = self.size
        return Quadratic(self.information.expand(*batch, d), self.precision.expand(*batch, d, d))

    def marginal(self, keep: int) -> Quadratic:
        """Integrate out all coordinates but the first ``keep``."""
        if keep == self.size:
            return self
        cross = self.precision[..., keep:, :keep]
        gain = solve_positive(self.precision[..., keep:, keep:], cross)
        information = self.information[..., :keep] - _times(gain.mT, self.information[..., keep:])
        precision = self.precision[..., :keep, :keep] - cross.mT @ gain
        return Quadratic(information, _symmetric(precision))

    def condition(self, values: Tensor) -> Quadratic:
        """Give the first coordinates their values, ``(..., k)``, and keep the factor of the others."""
        given = values.shape[-1]
        cross = self.precision[..., given:, :given]
        information = self.information[..., given:] - _times(cross, values)
        return Quadratic(information, self.precision[..., given:, given:])

    def log_density(self, values: Tensor) -> Tensor:
        """Evaluate the normalized log density at ``values (..., d)``."""
        linear = (self.information * values).sum(-1)
        square = (values * _times(self.precision, values)).sum(-1)
        return linear - 0.5 * square - self.log_normalizer

    def kl(self, other: Quadratic) -> Tensor:
        r"""Kullback-Leibler divergence :math:`\mathrm{KL}(f \,\|\, g)` of the normalized densities."""
        mean = self.mean
        second_moment = self.covariance + mean[..., :, None] * mean[..., None, :]
        difference = self - other
        linear = (difference.information * mean).sum(-1)
        square = (difference.precision * second_moment).sum((-2, -1))
        return linear - 0.5 * square - self.log_normalizer + other.log_normalizer


def solve_positive(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve systems with positive definite matrices; the solution is zero where a matrix isn't one.

    Cholesky factors are as exact for latents of very different units as for latents of the same unit.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(right, factor)
    usable = (failed == 0)[..., None, None] & torch.isfinite(solution)
    return solution.where(usable, 0.0)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.to(matrix.dtype).unsqueeze(-1)).squeeze(-1)


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
