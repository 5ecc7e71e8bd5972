"""A program on trial: copies of it, its guide and data, and what a contract may ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.errors import require
from pyro_hybrid.evidence.gauss_newton import Program, Site, random_sites

__all__ = [
    "ROUNDING",
    "Broken",
    "Case",
    "Unchecked",
    "demand",
    "demand_finite",
    "demand_same",
    "density_of",
    "drawn",
    "elbo_of",
    "log_density",
    "query_of",
    "run",
    "settings",
    "shapes_of",
    "sites_of",
    "support_of",
]

ROUNDING = 1e-6  # of log densities in float64: computed evidence takes derivatives by differences


class Broken(Exception):
    """A contract that doesn't hold."""


class Unchecked(Exception):
    """A contract that can't be checked on this episode."""


class Case(NamedTuple):
    """A program, its guide and data: copies, that a contract may change."""

    model: nn.Module
    guide: nn.Module
    episode: Episode

    def on(self, episode: Episode) -> Case:
        """The same on other data."""
        return self._replace(episode=episode)

    def double(self) -> Case:
        """In float64, where what should be equal is so but for little rounding."""
        return Case(self.model.double(), self.guide.double(), self.episode.double())


def settings() -> dict[str, Any]:
    """What is global and not random."""
    return {
        **pyro.settings.get(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
    }


def demand(condition: bool, expected: str, came: object, remedy: str) -> None:
    """Or the contract is broken."""
    require(condition, expected, came, remedy, Broken)


def demand_same(before: Tensor, after: Tensor, remedy: str) -> None:
    """Of log densities, the program's in the first row and the guide's in the second."""
    gap = ((after - before).abs() / (1.0 + before.abs())).nan_to_num(torch.inf)
    whose = "program" if gap[0].max() > ROUNDING else "guide"
    demand(
        bool(gap.max() <= ROUNDING),
        "the same log density",
        f"a relative difference of {float(gap.max()):.2g} in the {whose}'s",
        remedy,
    )


def demand_finite(case: Case, remedy: str) -> None:
    """Of the log densities, one for each task."""
    density, tasks = log_density(case, drawn(case)), case.episode.query.shape[0]
    demand(
        density.shape == (2, tasks) and bool(density.isfinite().all()),
        f"finite log densities of program and guide for each of {tasks} tasks",
        density.tolist(),
        remedy,
    )


def run(program: Program, episode: Episode, seed: int = 0) -> poutine.Trace:
    """One run, without gradients."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return poutine.trace(program).get_trace(episode)


def sites_of(program: nn.Module, episode: Episode) -> tuple[dict[str, Site], dict[str, Site]]:
    """Latent and observed sites of a program, or of a guide, as a density."""
    found = random_sites(run(program.eval(), episode))
    latent = {name: site for name, site in found.items() if not site["is_observed"]}
    return latent, {name: site for name, site in found.items() if site["is_observed"]}


def shapes_of(sites: Mapping[str, Site], *before: int) -> dict[str, tuple[int, ...]]:
    """Shapes of their values, with further axes before."""
    return {name: (*before, *site["value"].shape) for name, site in sites.items()}


def drawn(case: Case) -> dict[str, Tensor]:
    """Latents from the guide."""
    return {name: site["value"] for name, site in sites_of(case.guide, case.episode)[0].items()}


def density_of(
    program: nn.Module, episode: Episode, values: Mapping[str, Tensor], seed: int = 0
) -> Tensor:
    """Log density of a program, or of a guide, its latents being at ``values``: (..., task)."""
    trace = run(poutine.condition(program.eval(), data=dict(values)), episode, seed)
    trace.compute_log_prob()
    return torch.as_tensor(
        sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample")
    )


def log_density(case: Case, values: Mapping[str, Tensor], seed: int = 0) -> Tensor:
    """Of program and guide: (2, ..., task)."""
    densities = [
        density_of(program, case.episode, values, seed) for program in (case.model, case.guide)
    ]
    return torch.stack(torch.broadcast_tensors(*densities))


def elbo_of(case: Case, **options: Any) -> Tensor:
    """What training minimises."""
    torch.manual_seed(0)
    return TraceMeanField_ELBO(**options)(case.model.train(), case.guide.train())(case.episode)


def query_of(case: Case) -> tuple[Tensor, list[str]]:
    """The query, and the sites that are observed at it."""
    query, seen = case.episode.query.values, sites_of(case.model, case.episode)[1]
    assert query is not None
    return query, [
        name
        for name, site in seen.items()
        if site["value"].shape == query.shape
        and torch.allclose(site["value"], query, equal_nan=True)
    ]


def support_of(case: Case) -> Shots:
    """The support; check_hybrid_model has seen to it that there is one."""
    assert case.episode.support is not None
    return case.episode.support
