"""Hold a program, its guide and data for a contract, and measure what contracts compare."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.errors import fail, require
from pyro_hybrid.programs.module import local_parameters
from pyro_hybrid.programs.run import Program
from pyro_hybrid.programs.sites import Site, random_sites, unwrap
from pyro_hybrid.training.svi import SVI

__all__ = [
    "BrokenContract",
    "Case",
    "UncheckableContract",
    "demand",
    "demand_finite",
    "demand_same",
    "density_of",
    "elbo_of",
    "global_settings",
    "log_density",
    "query_sites",
    "rounding_gap",
    "run",
    "sample_latents",
    "shapes_of",
    "sites_of",
]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative, of log densities
UNITS = 4.0  # of the last digit, by which parameters and latents are perturbed
PERTURBATIONS = 3
MARGIN = 10.0  # rounding may be larger by this factor than in the perturbations
HOPELESS = 1e-2  # relative change by rounding alone, beyond which nothing can be compared


class BrokenContract(Exception):
    """Raised where a contract does not hold."""


class UncheckableContract(Exception):
    """Raised where a contract cannot be checked on this episode."""


class Case(NamedTuple):
    """A program, its guide and data, copied so that a contract may change them.

    Attributes:
        model, guide: the program and its guide.
        episode: trajectories with a query and a support.
    """

    model: nn.Module
    guide: nn.Module
    episode: Episode

    def with_episode(self, episode: Episode) -> Case:
        """Return the same program with other data."""
        return self._replace(episode=episode)

    def in_double(self) -> Case:
        """Return the case in float64, where equal numbers differ by little rounding only."""
        return Case(self.model.double(), self.guide.double(), self.episode.double())

    @property
    def query(self) -> Tensor:
        """Observations of the query."""
        if self.episode.query.values is None:
            fail("a query with values", "values=None", "Pass tasks[:3].episode().")
        return self.episode.query.values

    @property
    def support(self) -> Shots:
        """Trajectories of the support."""
        if self.episode.support is None:
            fail("an episode with a support", "support=None", "Pass tasks[:3].episode().")
        return self.episode.support


def global_settings() -> dict[str, Any]:
    """Return the global settings of Pyro and torch, without random states."""
    return {
        **pyro.settings.get(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
    }


def demand(condition: bool, expected: str, came: object, remedy: str) -> None:
    """Raise :class:`BrokenContract` unless the condition holds."""
    require(condition, expected, came, remedy, BrokenContract)


def demand_same(
    case: Case, values: Mapping[str, Tensor], before: Tensor, after: Tensor, remedy: str
) -> None:
    """Demand equal log densities: the program's in the first row and the guide's in the second.

    The tolerance is that of the precision that program and guide really compute in, or the measured effect of rounding
    where that is larger.

    Arguments:
        case: the program, whose sensitivity to rounding is measured if the densities differ.
        values: latents at which the densities were taken, or similar ones.
        before, after: log densities, ``(2, ...)``.
        remedy: advice if they differ.
    """
    gap = _relative_gap(before, after)
    if gap.max() <= TOLERANCE[torch.float64]:
        return
    tolerance = TOLERANCE[_coarsest_dtype(case)]
    if gap.max() > tolerance:
        rounding = rounding_gap(case, values)
        if rounding > HOPELESS:
            raise UncheckableContract(f"rounding alone changes log densities by {rounding:.2g}")
        tolerance = max(tolerance, MARGIN * rounding)
    side = "program" if gap[0].max() > tolerance else "guide"
    demand(
        bool(gap.max() <= tolerance),
        "the same log density",
        f"a relative difference of {float(gap.max()):.2g} in the {side}'s",
        remedy,
    )


def rounding_gap(case: Case, values: Mapping[str, Tensor]) -> float:
    """Measure the relative change of log densities when numbers change in their last digits.

    Parameters and latents are perturbed by a few units in the last digit of the precision that is really computed in.
    """
    epsilon = UNITS * torch.finfo(_coarsest_dtype(case)).eps
    before = log_density(case, values)
    gaps = []
    for seed in range(PERTURBATIONS):
        generator = torch.Generator().manual_seed(seed)
        other = copy.deepcopy(case)
        for module in (other.model, other.guide):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data.copy_(_perturbed(tensor.data, epsilon, generator))
        moved = {name: _perturbed(value, epsilon, generator) for name, value in values.items()}
        gaps.append(float(_relative_gap(before, log_density(other, moved)).max()))
    return max(gap for gap in [0.0, *gaps] if gap < torch.inf)


def _perturbed(value: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    sign = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2.0 - 1.0
    return value * (1.0 + epsilon * sign)


def _relative_gap(before: Tensor, after: Tensor) -> Tensor:
    return ((after - before).abs() / (1.0 + before.abs())).nan_to_num(torch.inf)


def _coarsest_dtype(case: Case) -> torch.dtype:
    """Return float32 where a distribution of program or guide has a parameter of less than double precision."""
    for program in (case.model, case.guide):
        for site in random_sites(run(program.eval(), case.episode)).values():
            if any(value.dtype != torch.float64 for value in _parameters_of(site)):
                return torch.float32
    return torch.float64


def _parameters_of(site: Site) -> Iterator[Tensor]:
    fn = unwrap(site["fn"], None)[0]
    for name in fn.arg_constraints:
        value = getattr(fn, name)
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value


def demand_finite(case: Case, remedy: str) -> None:
    """Demand finite log densities, one for each task."""
    density = log_density(case, sample_latents(case))
    num_tasks = case.episode.query.shape[0]
    demand(
        density.shape == (2, num_tasks) and bool(density.isfinite().all()),
        f"finite log densities of program and guide for each of {num_tasks} tasks",
        density.tolist(),
        remedy,
    )


def run(program: Program, episode: Episode, seed: int = 0) -> poutine.Trace:
    """Trace one run, without gradients."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return poutine.trace(program).get_trace(episode)


def sites_of(program: nn.Module, episode: Episode) -> tuple[dict[str, Site], dict[str, Site]]:
    """Return the latent and the observed sites of a program, or of a guide, in evaluation mode."""
    sites = random_sites(run(program.eval(), episode))
    latent = {name: site for name, site in sites.items() if not site["is_observed"]}
    observed = {name: site for name, site in sites.items() if site["is_observed"]}
    return latent, observed


def shapes_of(sites: Mapping[str, Site], *before: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the sites' values, with further axes before."""
    return {name: (*before, *site["value"].shape) for name, site in sites.items()}


def sample_latents(case: Case) -> dict[str, Tensor]:
    """Draw latents from the guide."""
    latent, _ = sites_of(case.guide, case.episode)
    return {name: site["value"] for name, site in latent.items()}


def density_of(
    program: nn.Module, episode: Episode, values: Mapping[str, Tensor], seed: int = 0
) -> Tensor:
    """Return the log density of a program, or of a guide, with latents at ``values``: (..., task)."""
    trace = run(poutine.condition(program.eval(), data=dict(values)), episode, seed)
    trace.compute_log_prob()
    terms = [site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample"]
    return torch.as_tensor(sum(terms))


def log_density(case: Case, values: Mapping[str, Tensor], seed: int = 0) -> Tensor:
    """Return the log densities of program and guide: (2, ..., task)."""
    model = density_of(case.model, case.episode, values, seed)
    guide = density_of(case.guide, case.episode, values, seed)
    return torch.stack(torch.broadcast_tensors(model, guide))


def elbo_of(case: Case, **options: Any) -> Tensor:
    """Return the loss that training minimizes, penalties included."""
    torch.manual_seed(0)
    guide, model = case.guide.train(), case.model.train()
    svi = SVI(model, guide, PyroOptim(torch.optim.SGD, {"lr": 0.0}), TraceMeanField_ELBO(**options))
    with local_parameters():
        return svi.differentiable_loss(model, guide, replace(case.episode, is_training=True))


def query_sites(case: Case) -> list[str]:
    """Return the names of the sites that observe the whole query."""
    query = case.query
    _, observed = sites_of(case.model, case.episode)
    return [name for name, site in observed.items() if _is_same(site["value"], query)]


def _is_same(value: Tensor, query: Tensor) -> bool:
    return value.shape == query.shape and torch.allclose(value, query, equal_nan=True)
