"""Invert moments: parameters of a family's member whose u has a given mean and variance, by a few steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["inverse_circular", "inverse_logit_moments", "inverse_trigamma", "log_dispersion"]

# Standard deviations of an angle, in radians, that are aimed at: at the second it is uniform.
_ANGULAR = (1e-4, 4.0)


def inverse_trigamma(variance: Tensor) -> Tensor:
    """Find α with ψ₁(α) = variance: Newton in log α, where log ψ₁ is nearly straight; three steps reach 1e-14."""
    log_shape = ((1 + (1 + 2 * variance).sqrt()) / (2 * variance)).log()
    for _ in range(3):
        shape = log_shape.exp()
        trigamma = torch.polygamma(1, shape)
        log_shape = log_shape - (trigamma / variance).log() * trigamma / (
            shape * torch.polygamma(2, shape)
        )
    return log_shape.exp()


def inverse_logit_moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    r"""Find α, β with ψ(α) - ψ(β) = mean and ψ₁(α) + ψ₁(β) = variance, to 1e-6 in twelve steps.

    .. math:: \alpha = 1 / \log(1 + e^{-p}), \quad \beta = 1 / \log(1 + e^{-q}), \qquad \psi(\alpha) \approx p

    In p and q the first equation has slope 1, nearly, and so has the second read through ``_digamma_at``.
    """
    goal = _digamma_at(variance)
    p, q = _digamma_at(variance * (-mean).sigmoid()), _digamma_at(variance * mean.sigmoid())
    for _ in range(12):
        a, b = 1 / softplus(-p), 1 / softplus(-q)
        rise = (goal - _digamma_at(torch.polygamma(1, a) + torch.polygamma(1, b))) / 1.1
        turn = (mean - torch.digamma(a) + torch.digamma(b)) / 2.2
        p, q = p + rise + turn, q + rise - turn
    return 1 / softplus(-p), 1 / softplus(-q)


def _digamma_at(trigamma: Tensor) -> Tensor:
    """Approximate ψ(α) where ψ₁(α) is given; exact at both ends."""
    x = 2 * trigamma / (1 + (1 + 4 * trigamma).sqrt())
    return -x - (-torch.expm1(-x)).log()


def inverse_circular(scale: Tensor) -> Tensor:
    """Find κ with I₁(κ)/I₀(κ) = exp(-scale²/2): twelve steps in log κ, each leaving a fifth of the error."""
    goal = torch.expm1(scale.clamp(*_ANGULAR) ** 2 / 2).log()
    log_concentration = -goal
    for _ in range(12):
        # 1.28 is midway between the slopes, 1 and 1.56
        log_concentration = (
            log_concentration + (log_dispersion(log_concentration.exp()) - goal) / 1.28
        )
    return log_concentration.exp()


def log_dispersion(concentration: Tensor) -> Tensor:
    """Compute log(1/A - 1) with A = I₁(κ)/I₀(κ), nearly -log κ; beyond κ = 100, where 1 - A cancels, by expansion."""
    low = concentration.clamp(max=100.0)
    x = 1 / concentration.clamp(min=100.0)
    i0 = torch.special.i0e(low)
    i1 = torch.special.i1e(low)
    gap = x / 2 + x**2 / 8 + x**3 / 8 + 25 * x**4 / 128 + 13 * x**5 / 32
    return torch.where(
        concentration < 100.0, (i0 - i1).log() - i1.log(), gap.log() - torch.log1p(-gap)
    )
