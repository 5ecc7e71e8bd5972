"""Condition (i): the noise's characteristic function vanishes on a null set at most."""

from __future__ import annotations

from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import distributions as td

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.dynamics.solve import failures_as_values
from pyro_hybrid.evidence.gauss_newton import Program, bare, random_sites
from pyro_hybrid.identifiability.check import Check, unchecked
from pyro_hybrid.programs.module import local_parameters

__all__ = ["CHARACTERISTIC", "Noise", "judge_noise", "noise"]

CHARACTERISTIC: dict[type, str] = {
    td.Normal: "exp(-σ²t²/2) is nowhere zero",
    td.MultivariateNormal: "exp(-tᵀΣt/2) is nowhere zero",
    td.LowRankMultivariateNormal: "exp(-tᵀΣt/2) is nowhere zero",
    td.Laplace: "1/(1 + b²t²) is nowhere zero",
    dist.AsymmetricLaplace: "a product of 1/(1 ± iat), nowhere zero",
    dist.SoftLaplace: "a product of Gamma functions, nowhere zero",
    dist.Logistic: "πst/sinh(πst) is nowhere zero",
    td.Gumbel: "Γ(1 - ist) is nowhere zero",
    td.Cauchy: "exp(-γ|t|) is nowhere zero",
    td.StudentT: "|t|^(ν/2) K(|t|) with a Bessel function K that is nowhere zero",
    dist.Stable: "exp(-|ct|^α ...) is nowhere zero",
    td.Uniform: "sin(t)/t is zero at isolated points, a null set",
}
"""Additive noise whose characteristic function is known, and what is known of its zeros."""

ROUNDING = 8.0  # in units of the last digit


class Noise(NamedTuple):
    """The distributions of a program's observations by site, and whether more than their location moves with latents.

    Of kinds that the table doesn't have, this isn't asked.
    """

    kinds: dict[str, type]
    moving: dict[str, bool]


@torch.no_grad()
@pyro.validation_enabled(False)
def noise(program: Program, episode: Episode) -> Noise:
    """Run a program twice, and look at how it observes: whatever the latents, the noise should be the same.

    Arguments:
        program: the model.
        episode: trajectories of some tasks, with their support.
    """
    first, second = (_observed(program, episode) for _ in range(2))
    kinds = {
        name: next((kind for kind in CHARACTERISTIC if isinstance(fn, kind)), type(fn))
        for name, fn in first.items()
    }
    moving = {
        name: kinds[name] in CHARACTERISTIC and _moves(fn, second[name])
        for name, fn in first.items()
    }
    return Noise(kinds, moving)


def _observed(program: Program, episode: Episode) -> dict[str, td.Distribution]:
    with local_parameters(), failures_as_values(), poutine.block():
        trace = poutine.trace(program).get_trace(episode)
    return {
        name: bare(site["fn"], None)[0]
        for name, site in random_sites(trace).items()
        if site["is_observed"]
    }


def _moves(one: td.Distribution, other: td.Distribution) -> bool:
    """Whether x minus its location is distributed otherwise, by more than rounding; what diverged says nothing."""
    return any(
        bool(((a - b).abs() > ROUNDING * torch.finfo(a.dtype).eps * (size + other_size)).any())
        for (a, size), (b, other_size) in zip(_shape(one), _shape(other), strict=True)
    )


def _shape(fn: td.Distribution) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All parameters but the location, and the size of the numbers that each is made of."""
    if isinstance(fn, td.Uniform):
        return [(fn.high - fn.low, fn.high.abs() + fn.low.abs())]
    if isinstance(fn, td.MultivariateNormal | td.LowRankMultivariateNormal):
        return [(fn.covariance_matrix, fn.covariance_matrix.abs())]
    values = [getattr(fn, name) for name in fn.arg_constraints if name != "loc"]
    return [(value, value.abs()) for value in values]


def judge_noise(found: Noise) -> Check:
    """Looked up in a table; what isn't in it, or isn't additive, isn't covered by the theorem as it stands."""
    name, remedy = (
        "noise (i)",
        "Observe with additive noise, such as dist.Normal(prediction, noise).",
    )
    if not found.kinds:
        return unchecked(
            name, "the program observes nothing of this episode", "Pass obs=episode.query.values."
        )
    for site, kind in found.kinds.items():
        if kind not in CHARACTERISTIC:
            return unchecked(
                name,
                f"{kind.__name__} at {site!r} isn't additive noise that the table knows",
                remedy,
            )
        if found.moving[site]:
            return unchecked(
                name,
                f"the noise of {site!r} depends on the latents, so x = F(z) + noise doesn't hold",
                remedy,
            )
    why = "; ".join(
        f"{site}: {kind.__name__}, {CHARACTERISTIC[kind]}" for site, kind in found.kinds.items()
    )
    return Check(name, "holds", why=why)
