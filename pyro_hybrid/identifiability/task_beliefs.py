"""Collect the natural parameters that a program infers from supports of each task."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_hybrid.beliefs import families as all_families
from pyro_hybrid.beliefs.families import Family
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.dynamics.modes import nan_on_failure
from pyro_hybrid.errors import fail, require, require_integer
from pyro_hybrid.inference.prior import Prior
from pyro_hybrid.programs.module import local_parameters
from pyro_hybrid.programs.run import Program
from pyro_hybrid.programs.sites import random_sites, unwrap
from pyro_hybrid.shapes import Stock

__all__ = ["TaskBeliefs", "copy_in_double", "infer_tasks", "latent_names"]

_T = TypeVar("_T")
BATCH = 100
KNOWN: tuple[type[Family], ...] = (
    all_families.Normal,
    all_families.LogNormal,
    all_families.Gamma,
    all_families.Beta,
    all_families.VonMises,
    all_families.FullNormal,
)


class TaskBeliefs(NamedTuple):
    """Beliefs about the latents of many tasks, given several disjoint supports of each.

    Attributes:
        families: family of each task-level site, in the program's order.
        natural: natural parameters λ of each site, ``(support, task, component, statistic)``, in float64.
        num_support: number of shots in each support.
    """

    families: dict[str, Family]
    natural: dict[str, Tensor]
    num_support: int

    @property
    def names(self) -> list[str]:
        """Names of all latents, such as ``omega`` or ``unknown[1]``."""
        return latent_names({name: family.n for name, family in self.families.items()})

    @property
    def terms(self) -> list[str]:
        """Names of all natural parameters, by the statistic that each belongs to, such as ``omega: z²``."""
        return [
            f"{latent}: {term}"
            for site, family in self.families.items()
            for latent in latent_names({site: family.n})
            for term in family.terms
        ]

    @property
    def flat(self) -> Tensor:
        """Natural parameters as one vector, ``(support, task, number)``, in the order of ``terms``."""
        return torch.cat([natural.flatten(-2) for natural in self.natural.values()], -1)

    @property
    def mean(self) -> Tensor:
        """Means in unconstrained coordinates, ``(support, task, latent)``."""
        return self._moments()[0]

    @property
    def sd(self) -> Tensor:
        """Standard deviations in unconstrained coordinates, ``(support, task, latent)``."""
        return self._moments()[1]

    @property
    def population_mean(self) -> Tensor:
        """Mean of every latent over tasks and supports, ``(latent,)``."""
        return self.mean.flatten(0, 1).mean(0)

    @property
    def population_sd(self) -> Tensor:
        """Standard deviation of every latent over tasks, uncertainty of each task included, ``(latent,)``."""
        mean, sd = (moment.flatten(0, 1) for moment in self._moments())
        return (mean.var(0, correction=0) + sd.square().mean(0)).sqrt()

    def constrained(self, u: Tensor) -> Tensor:
        """Map unconstrained coordinates to latents, ``(..., latent)``."""
        pieces = u.split([family.n for family in self.families.values()], -1)
        pairs = zip(self.families.values(), pieces, strict=True)
        return torch.cat([family.constrained(piece) for family, piece in pairs], -1)

    def _moments(self) -> tuple[Tensor, Tensor]:
        by_site = [self.families[name].gaussian(natural) for name, natural in self.natural.items()]
        means, sds = zip(*by_site, strict=True)
        return torch.cat(means, -1), torch.cat(sds, -1)


def latent_names(sizes: Mapping[str, int]) -> list[str]:
    """Return the names of single latents from the sizes of their sites."""
    return [site if n == 1 else f"{site}[{i}]" for site, n in sizes.items() for i in range(n)]


@torch.no_grad()
@pyro.validation_enabled(False)
def infer_tasks(
    program: Program, tasks: Tasks, *, num_support: int | None = None, progress: bool = True
) -> TaskBeliefs:
    """Run a program on disjoint supports of every task, and collect the natural parameters of the tasks' latents.

    Arguments:
        program: samples latents of shape ``(task, component)`` from exponential families, given ``episode.support``.
        tasks: data of at least two shots per task.
        num_support: shots in each support; by default ``tasks.num_support``, or half of all shots where two supports
            of that size do not fit.
        progress: show a progress bar.
    """
    supports = _disjoint_supports(tasks, num_support)
    families: dict[str, Family] = {}
    by_batch: dict[str, list[Tensor]] = {}
    starts = range(0, len(tasks), BATCH)
    bar = tqdm(starts, desc="inferring tasks", unit="batch", leave=False, disable=not progress)
    for start in bar:
        batch = tasks[start : start + BATCH]
        by_support: dict[str, list[Tensor]] = {}
        for shots in supports:
            support = batch.shots(shots)
            sites = _task_sites(program, Episode(support, support.simulation()))
            families = families or {name: _family(program, name, fn) for name, fn in sites.items()}
            for name, fn in sites.items():
                by_support.setdefault(name, []).append(families[name].natural(fn).double())
        for name, naturals in by_support.items():
            by_batch.setdefault(name, []).append(torch.stack(naturals))
    natural = {name: torch.cat(pieces, 1) for name, pieces in by_batch.items()}
    _require_finite_beliefs(families, natural)
    return TaskBeliefs(families, natural, supports[0].stop)


def _disjoint_supports(tasks: Tasks, num_support: int | None) -> list[slice]:
    total = tasks.values.shape[1]
    require(
        total > 1 or num_support is not None,
        "two shots or more of every task",
        total,
        "One support alone does not show its own noise: record another shot.",
    )
    size = min(tasks.num_support, total // 2) if num_support is None else num_support
    require_integer("num_support", size, 1, f"Each task has {total} shots.", most=total)
    return [slice(i * size, (i + 1) * size) for i in range(total // size)]


def _require_finite_beliefs(families: dict[str, Family], natural: dict[str, Tensor]) -> None:
    for name, value in natural.items():
        _require_finite(value, f"finite natural parameters of {name!r}")
        moments = torch.stack(families[name].gaussian(value), -1)
        _require_finite(moments, f"a finite mean and standard deviation of {name!r}")


def _require_finite(values: Tensor, expected: str) -> None:
    is_lost = ~torch.isfinite(values).flatten(2).all(2).all(0)
    count = int(is_lost.sum())
    first = int(is_lost.float().argmax())
    require(
        count == 0,
        expected,
        f"NaN or Inf in {count} task{'s' * (count > 1)}, the first being task {first}",
        "Find out why the prior fails on them, or drop them.",
    )


def _task_sites(program: Program, episode: Episode) -> dict[str, Stock]:
    """Return the distributions of the latents that belong to a task and not to its shots."""
    with local_parameters(), nan_on_failure(), poutine.block():
        trace = poutine.trace(program).get_trace(episode)
    num_tasks = episode.query.shape[0]
    sites = {}
    for name, site in random_sites(trace).items():
        fn = site["fn"]
        is_plated = any(frame.size == num_tasks for frame in site["cond_indep_stack"])
        is_of_tasks = is_plated and fn.batch_shape == (num_tasks,) and len(fn.event_shape) <= 1
        if site["is_observed"] or not is_of_tasks:
            continue
        require(
            len(fn.event_shape) == 1,
            f"latent {name!r} of shape (task, component)",
            tuple(fn.batch_shape),
            "Give it a component axis: dist.Normal(loc[:, None], scale[:, None]).to_event(1).",
        )
        sites[name] = fn
    require(
        bool(sites),
        "a program with latents of tasks, of shape (task, component)",
        "none",
        "Sample them inside `with episode.plate:`.",
    )
    return sites


def _family(program: Program, name: str, fn: Stock) -> Family:
    """Return the family that the program's own prior declares; without one, that of the distribution's type."""
    for module in program.modules() if isinstance(program, nn.Module) else ():
        if isinstance(module, Prior) and name in module.families:
            return module.families[name]
    num_components = int((fn.batch_shape + fn.event_shape)[-1])
    return _first_that_fits(name, fn, [family(num_components) for family in KNOWN])


def _first_that_fits(name: str, fn: Stock, candidates: Sequence[Family]) -> Family:
    for family in candidates:
        try:
            family.natural(fn)
        except TypeError:
            continue
        return family
    fail(
        f"a prior from an exponential family for {name!r}",
        type(unwrap(fn, None)[0]).__name__,
        "Use one of ph.families, or write a Family and name it in a SupportPrior.",
        TypeError,
    )


def copy_in_double(program: _T) -> _T:
    """Return a copy in float64 of a module; a plain function follows the precision of its data, and is returned."""
    return copy.deepcopy(program).double() if isinstance(program, nn.Module) else program
