"""Check condition (i): the noise's characteristic function vanishes on a null set at most."""

from __future__ import annotations

from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch import distributions as td

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.dynamics.modes import nan_on_failure
from pyro_hybrid.programs.module import local_parameters
from pyro_hybrid.programs.run import Program
from pyro_hybrid.programs.sites import random_sites, unwrap
from pyro_hybrid.scores.check import Check

__all__ = ["CHARACTERISTIC", "Noise", "inspect_noise", "judge_noise"]

NAME = "noise (i)"
CHARACTERISTIC: dict[type, str] = {
    td.Normal: "exp(-σ²t²/2) is nowhere zero",
    td.MultivariateNormal: "exp(-tᵀΣt/2) is nowhere zero",
    td.LowRankMultivariateNormal: "exp(-tᵀΣt/2) is nowhere zero",
    td.Laplace: "1/(1 + b²t²) is nowhere zero",
    dist.AsymmetricLaplace: "a product of factors 1/(1 ± iat) is nowhere zero",
    dist.SoftLaplace: "a product of Gamma functions is nowhere zero",
    dist.Logistic: "πst/sinh(πst) is nowhere zero",
    td.Gumbel: "Γ(1 - ist) is nowhere zero",
    td.Cauchy: "exp(-γ|t|) is nowhere zero",
    td.StudentT: "|t|^(ν/2) K(|t|) with a Bessel function K is nowhere zero",
    dist.Stable: "exp(-|ct|^α ...) is nowhere zero",
    td.Uniform: "sin(t)/t is zero at isolated points only, a null set",
}
"""Zeros of the characteristic functions of additive noise."""

ROUNDING = 8.0  # in units of the last digit


class Noise(NamedTuple):
    """Distributions of a program's observations.

    Attributes:
        kinds: distribution's type, by site.
        moving: True where more than the location changes with the latents, by site; False for types that the table
            does not have.
    """

    kinds: dict[str, type]
    moving: dict[str, bool]


@torch.no_grad()
@pyro.validation_enabled(False)
def inspect_noise(program: Program, episode: Episode) -> Noise:
    """Run a program twice, and compare its observation noise: it should be the same whatever the latents are.

    Arguments:
        program: the model.
        episode: trajectories of some tasks, with their support.
    """
    first = _observation_distributions(program, episode)
    second = _observation_distributions(program, episode)
    kinds = {name: _known_type(fn) for name, fn in first.items()}
    moving = {
        name: kinds[name] in CHARACTERISTIC and _has_changed(fn, second[name])
        for name, fn in first.items()
    }
    return Noise(kinds, moving)


def _observation_distributions(program: Program, episode: Episode) -> dict[str, td.Distribution]:
    with local_parameters(), nan_on_failure(), poutine.block():
        trace = poutine.trace(program).get_trace(episode)
    sites = random_sites(trace)
    return {
        name: unwrap(site["fn"], None)[0] for name, site in sites.items() if site["is_observed"]
    }


def _known_type(fn: td.Distribution) -> type:
    return next((kind for kind in CHARACTERISTIC if isinstance(fn, kind)), type(fn))


def _has_changed(one: td.Distribution, other: td.Distribution) -> bool:
    """Compare the noise x minus its location; a difference must exceed rounding, and NaN is none."""
    pairs = zip(_parameters_but_location(one), _parameters_but_location(other), strict=True)
    for (a, magnitude_a), (b, magnitude_b) in pairs:
        rounding = ROUNDING * torch.finfo(a.dtype).eps * (magnitude_a + magnitude_b)
        if bool(((a - b).abs() > rounding).any()):
            return True
    return False


def _parameters_but_location(fn: td.Distribution) -> list[tuple[Tensor, Tensor]]:
    """Return all parameters but the location, each with the magnitude of the numbers that it is computed from."""
    if isinstance(fn, td.Uniform):
        return [(fn.high - fn.low, fn.high.abs() + fn.low.abs())]
    if isinstance(fn, td.MultivariateNormal | td.LowRankMultivariateNormal):
        return [(fn.covariance_matrix, fn.covariance_matrix.abs())]
    values = [getattr(fn, name) for name in fn.arg_constraints if name != "loc"]
    return [(value, value.abs()) for value in values]


def judge_noise(noise: Noise) -> Check:
    """Look the noise up in the table; the theorem does not cover other noise, nor noise that is not additive.

    Arguments:
        noise: result of :func:`inspect_noise`.
    """
    if not noise.kinds:
        why = "The program observes nothing of these trajectories."
        return Check.skipped(NAME, why, "Pass obs=episode.query.values.")
    remedy = "Observe with additive noise, such as dist.Normal(prediction, noise)."
    for site, kind in noise.kinds.items():
        if kind not in CHARACTERISTIC:
            why = (
                f"The observations {site!r} are distributed as {kind.__name__}, which is none of the additive noise "
                "that this check knows."
            )
            return Check.skipped(NAME, why, remedy)
        if noise.moving[site]:
            why = f"The noise of {site!r} depends on the latents, so that x = F(z) + noise does not hold."
            return Check.skipped(NAME, why, remedy)
    reasons = [
        f"{site}: {kind.__name__}, {CHARACTERISTIC[kind]}" for site, kind in noise.kinds.items()
    ]
    return Check(NAME, "holds", why="; ".join(reasons) + ".")
