"""Whitening: how the noise of an observation enters a least-squares problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

__all__ = ["Whitened", "whiten"]


class Whitened(NamedTuple):
    r"""An observed value :math:`x` as a least-squares problem sees it.

    A step of Gauss-Newton with these residuals, differentiated as :math:`\sqrt{I}\,(x - \mu)` with the information
    :math:`I` held fixed, is a step of Fisher scoring.

    Attributes:
        error: the value minus the parameter of location :math:`\mu`, for most distributions the mean.
        root: square root of the Fisher information :math:`I` about the location.
        own_residual: the score over ``root``, unless it is the error times ``root``.
        own_deviance: twice the log density that is missing to that of the best location, unless it is the square of
            the residual.
    """

    error: Tensor
    root: Tensor
    own_residual: Tensor | None = None
    own_deviance: Tensor | None = None

    @property
    def residual(self) -> Tensor:
        """Derivative of the log density by the location, over the root of the information."""
        return self.error * self.root if self.own_residual is None else self.own_residual

    @property
    def deviance(self) -> Tensor:
        """Twice the log density that is missing to that of the best location."""
        return self.residual.square() if self.own_deviance is None else self.own_deviance


def whiten(fn: td.Distribution, value: Tensor) -> Whitened:
    """Whiten a value by the noise of its distribution; where none of the table is known, by its standard deviation."""
    rule = next((rule for kind, rule in RULES.items() if isinstance(fn, kind)), _as_normal)
    return rule(fn, value)


def _as_normal(fn: td.Distribution, value: Tensor) -> Whitened:
    return Whitened(value - fn.mean, fn.stddev.reciprocal())


def _lognormal(fn: td.LogNormal, value: Tensor) -> Whitened:
    return Whitened(value.log() - fn.loc, fn.scale.reciprocal())


def _student_t(fn: td.StudentT, value: Tensor) -> Whitened:
    df = fn.df
    error = value - fn.loc
    root = ((df + 1.0) / (df + 3.0)).sqrt() / fn.scale
    square = (error / fn.scale).square()
    score = (df + 1.0) / (df + square) * error / fn.scale.square()
    return Whitened(error, root, score / root, (df + 1.0) * torch.log1p(square / df))


def _poisson(fn: td.Poisson, value: Tensor) -> Whitened:
    rate = fn.rate
    half_deviance = _log_ratio(value, rate) - value + rate
    return _counted(rate, rate, value, 2.0 * half_deviance)


def _binomial(fn: td.Binomial, value: Tensor) -> Whitened:
    total = fn.total_count
    mean = fn.mean
    failures = total - value
    half_deviance = _log_ratio(value, mean) + _log_ratio(failures, total - mean)
    return _counted(mean, fn.variance, value, 2.0 * half_deviance)


def _bernoulli(fn: td.Bernoulli, value: Tensor) -> Whitened:
    return _binomial(td.Binomial(1, probs=fn.probs), value)


def _gamma_poisson(fn: Any, value: Tensor) -> Whitened:
    return _negative_binomial_of(fn.mean, fn.variance, fn.concentration, value)


def _negative_binomial(fn: td.NegativeBinomial, value: Tensor) -> Whitened:
    return _negative_binomial_of(fn.mean, fn.variance, fn.total_count, value)


def _negative_binomial_of(mean: Tensor, variance: Tensor, shape: Tensor, value: Tensor) -> Whitened:
    half_deviance = _log_ratio(value, mean) - _log_ratio(value + shape, mean + shape)
    return _counted(mean, variance, value, 2.0 * half_deviance)


def _counted(mean: Tensor, variance: Tensor, value: Tensor, deviance: Tensor) -> Whitened:
    """A count, whose score is its error over its variance."""
    return Whitened(value - mean, variance.rsqrt(), own_deviance=deviance)


def _log_ratio(one: Tensor, other: Tensor) -> Tensor:
    """Return a log(a / b), which is zero at a = 0."""
    ratio: Tensor = torch.special.xlogy(one, one) - torch.special.xlogy(one, other)
    return ratio


RULES: dict[type, Callable[..., Whitened]] = {
    td.LogNormal: _lognormal,
    td.StudentT: _student_t,
    td.Poisson: _poisson,
    td.Binomial: _binomial,
    td.Bernoulli: _bernoulli,
    td.NegativeBinomial: _negative_binomial,
    dist.GammaPoisson: _gamma_poisson,
}
