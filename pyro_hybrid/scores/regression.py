"""Correlate and regress matrices of latents; every score is built from these."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported when they are used
from numpy.typing import NDArray

from pyro_hybrid.scores.arrays import Array

__all__ = [
    "ColumnScale",
    "correlation",
    "cross_validated_r",
    "explained_r",
    "held_out_cca",
    "match_components",
    "matched_correlation",
    "percentile_interval",
    "resampling_weights",
    "standardize",
    "weighted_correlation",
]

FOLDS = 5
RIDGE = 1e-6
RESAMPLES = 200
TINY = np.finfo(np.float64).tiny


class ColumnScale(NamedTuple):
    """Mean and standard deviation of columns, in units of a power of two each.

    Scaling by a power of two is exact. It keeps squares of very large and of very small numbers from overflowing and
    underflowing, and changes no digit of the others.

    Attributes:
        exponents: exponent of the power of two next above each column's largest magnitude.
        mean: of each column in that unit.
        sd: of each column in that unit.
    """

    exponents: NDArray[np.int32]
    mean: Array
    sd: Array

    @classmethod
    def of(cls, x: Array) -> ColumnScale:
        """Measure the columns of ``x``."""
        exponents = np.frexp(np.abs(x).max(0))[1]
        scaled = np.ldexp(x, -exponents)
        return cls(exponents, scaled.mean(0), np.maximum(scaled.std(0), TINY))

    def standardize(self, x: Array) -> Array:
        """Subtract the mean from the columns of ``x``, and divide by the standard deviation."""
        return (np.ldexp(x, -self.exponents) - self.mean) / self.sd


def standardize(x: Array) -> Array:
    """Return ``x`` with columns of mean 0 and standard deviation 1; constant columns become 0."""
    return ColumnScale.of(x).standardize(x)


def correlation(x: Array, y: Array) -> Array:
    """Return Pearson's correlation of every column of ``x`` with every column of ``y``."""
    return np.clip(standardize(x).T @ standardize(y) / len(x), -1.0, 1.0)


def match_components(estimate: Array, target: Array) -> tuple[Array, NDArray[np.int64]]:
    """Match columns one to one so that the sum of absolute correlations is largest.

    Returns:
        The absolute correlation of each target column with its partner, 0 without one, and the partner's column in
        the estimate, -1 without one.
    """
    magnitudes = np.abs(correlation(estimate, target))
    columns, components = scipy.optimize.linear_sum_assignment(magnitudes, maximize=True)
    matched = np.zeros(target.shape[1])
    matched[components] = magnitudes[columns, components]
    assignment = np.full(target.shape[1], -1, dtype=np.int64)
    assignment[components] = columns
    return matched, assignment


def resampling_weights(rng: np.random.Generator, num_tasks: int) -> Array:
    """Return counts of each task in bootstrap resamples, of shape (resample, task)."""
    shares = np.full(num_tasks, 1 / num_tasks)
    return rng.multinomial(num_tasks, shares, size=RESAMPLES).astype(np.float64)


def percentile_interval(resampled: Array) -> Array:
    """Return both ends of the central 95% along the first axis, stacked in its place."""
    return np.quantile(resampled, [0.025, 0.975], axis=0)


def weighted_correlation(x: Array, y: Array, weights: Array) -> Array:
    """Correlate each column of ``x`` with that of ``y`` under each row of weights; constants give 0."""
    shares = weights / np.maximum(weights.sum(1, keepdims=True), 1.0)
    mean_x = shares @ x
    mean_y = shares @ y
    variance_x = shares @ x**2 - mean_x**2
    variance_y = shares @ y**2 - mean_y**2
    covariance = shares @ (x * y) - mean_x * mean_y
    scale = np.sqrt(np.maximum(variance_x * variance_y, TINY))
    correlations: Array = covariance / scale
    return np.clip(correlations, -1.0, 1.0)


def matched_correlation(estimate: Array, target: Array, weights: Array) -> Array:
    """Correlate each target column with its partner under each row of weights.

    Partner and sign are those of all tasks, so that resamples of noise scatter about its score and not above it.
    """
    _, assignment = match_components(estimate, target)
    partners = estimate[:, assignment]
    sign = np.sign(np.diag(correlation(partners, target)))
    sign = np.where(assignment < 0, 0.0, sign)
    return sign * weighted_correlation(partners, target, weights)


def held_out_cca(x: Array, y: Array, weights: Array) -> Array:
    """Average the correlations, on the second half, of canonical variates fitted to the first half.

    A pair that is missing because ``x`` has fewer columns than ``y`` counts as 0.
    """
    half = len(x) // 2
    x = x - x[:half].mean(0)
    y = y - y[:half].mean(0)
    whitener_x = _whitener(x[:half])
    whitener_y = _whitener(y[:half])
    cross = whitener_x.T @ (x[:half].T @ y[:half]) @ whitener_y
    left, _, right = np.linalg.svd(cross, full_matrices=False)
    variates_x = x[half:] @ whitener_x @ left
    variates_y = y[half:] @ whitener_y @ right.T
    correlations = weighted_correlation(variates_x, variates_y, weights[:, half:])
    mean: Array = correlations.sum(1) / y.shape[1]
    return np.maximum(mean, 0.0)


def cross_validated_r(x: Array, y: Array, weights: Array) -> Array:
    """Return the root of each column's out-of-sample R² when ``y`` is regressed on all of ``x``."""
    design = np.column_stack([np.ones(len(x)), x])
    folds = np.arange(len(x)) % FOLDS
    residual = np.empty_like(y)
    for fold in range(FOLDS):
        held_out = folds == fold
        coefficients = np.linalg.lstsq(design[~held_out], y[~held_out], rcond=None)[0]
        residual[held_out] = y[held_out] - design[held_out] @ coefficients
    return explained_r(residual, y, weights)


def explained_r(residual: Array, y: Array, weights: Array) -> Array:
    """Return the root of the R² that residuals leave, under each row of weights; 0 where the mean does better."""
    shares = weights / weights.sum(1, keepdims=True)
    variance = np.maximum(shares @ y**2 - (shares @ y) ** 2, TINY)
    with np.errstate(over="ignore"):  # a residual infinitely larger than y explains nothing of it
        unexplained = shares @ residual**2 / variance
    explained: Array = np.maximum(1.0 - unexplained, 0.0)
    return np.sqrt(explained)


def _whitener(x: Array) -> Array:
    """Return weights that make the columns of a centered ``x`` uncorrelated with unit variance, up to a ridge."""
    _, singular, directions = np.linalg.svd(x / np.sqrt(len(x)), full_matrices=False)
    return directions.T / np.sqrt(singular**2 + RIDGE)
