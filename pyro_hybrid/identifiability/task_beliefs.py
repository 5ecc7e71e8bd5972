"""What any Pyro program says of its tasks' latents: natural parameters by support, as a sample of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_hybrid.beliefs import families as known
from pyro_hybrid.beliefs.families import Family
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.dynamics.solve import failures_as_values
from pyro_hybrid.errors import fail, require
from pyro_hybrid.evidence.gauss_newton import Program, bare, random_sites
from pyro_hybrid.inference.prior import Prior
from pyro_hybrid.programs.module import local_parameters
from pyro_hybrid.shapes import Stock

__all__ = ["Reading", "in_double", "names_of", "read"]

_T = TypeVar("_T")
BATCH = 100
KNOWN = (known.Normal, known.LogNormal, known.Gamma, known.Beta, known.VonMises, known.FullNormal)


class Reading(NamedTuple):
    """What a program believes of many tasks, each known from several disjoint supports.

    Attributes:
        families: the family of each task-level site, in the program's order.
        natural: λ of each site, ``(support, task, component, statistic)``, in float64.
        shots: size of each support.
    """

    families: dict[str, Family]
    natural: dict[str, Tensor]
    shots: int

    @property
    def names(self) -> list[str]:
        """Every latent, ``omega`` or ``unknown[1]``."""
        return names_of({name: family.n for name, family in self.families.items()})

    @property
    def terms(self) -> list[str]:
        """Every natural parameter, by the statistic that it belongs to: ``omega: z²``."""
        terms = {name: family.terms for name, family in self.families.items()}
        return [
            f"{latent}: {term}"
            for site, family in self.families.items()
            for latent in names_of({site: family.n})
            for term in terms[site]
        ]

    @property
    def flat(self) -> Tensor:
        """λ as one vector, ``(support, task, number)``, in the order of ``terms``."""
        return torch.cat([natural.flatten(-2) for natural in self.natural.values()], -1)

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every latent in unconstrained coordinates, ``(support, task, latent)``."""
        parts = [self.families[name].gaussian(natural) for name, natural in self.natural.items()]
        mean, scale = (torch.cat(part, -1) for part in zip(*parts, strict=True))
        return mean, scale

    def constrained(self, u: Tensor) -> Tensor:
        """Latents of unconstrained coordinates, ``(..., latent)``."""
        pieces = u.split([family.n for family in self.families.values()], -1)
        return torch.cat(
            [
                family.constrained(x)
                for family, x in zip(self.families.values(), pieces, strict=True)
            ],
            -1,
        )

    def spread(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every latent over tasks, believed uncertainty included."""
        mean, scale = (x.flatten(0, 1) for x in self.coordinates())
        return mean.mean(0), (mean.var(0, correction=0) + scale.square().mean(0)).sqrt()


def names_of(sizes: Mapping[str, int]) -> list[str]:
    """Sites and their sizes to names of single latents."""
    return [site if n == 1 else f"{site}[{i}]" for site, n in sizes.items() for i in range(n)]


@torch.no_grad()
@pyro.validation_enabled(False)
def read(
    program: Program, tasks: Tasks, *, shots: int | None = None, progress: bool = True
) -> Reading:
    """Run a program on disjoint supports of every task, and collect the natural parameters of its task-level latents.

    Arguments:
        program: samples latents of shape ``(task, component)`` from exponential families, given ``episode.support``.
        tasks: data of at least two shots a task.
        shots: size of the supports; by default ``tasks.num_support``, or half of all shots where these are fewer than
            two such supports.
        progress: show a progress bar.
    """
    total = tasks.values.shape[1]
    require(
        total > 1 or shots is not None,
        "two shots or more of every task",
        total,
        "One support alone doesn't say what its own noise is: record another shot.",
    )
    shots = min(tasks.num_support, total // 2) if shots is None else shots
    require(1 <= shots <= total, f"supports of 1 to {total} shots", shots, "Each task has no more.")
    supports = [slice(i * shots, (i + 1) * shots) for i in range(total // shots)]
    families: dict[str, Family] = {}
    pieces: dict[str, list[Tensor]] = {}
    starts = range(0, len(tasks), BATCH)
    for start in tqdm(
        starts, desc="reading supports", unit="batch", leave=False, disable=not progress
    ):
        batch = tasks[start : start + BATCH]
        by_site: dict[str, list[Tensor]] = {}
        for which in supports:
            support = batch.shots(which)
            sites = _task_sites(program, Episode(support, support.simulation()))
            families = families or {name: _family(program, name, fn) for name, fn in sites.items()}
            for name, fn in sites.items():
                by_site.setdefault(name, []).append(families[name].natural(fn).double())
        for name, naturals in by_site.items():
            pieces.setdefault(name, []).append(torch.stack(naturals))
    natural = {name: torch.cat(parts, 1) for name, parts in pieces.items()}
    for name, value in natural.items():
        _require_numbers(value, f"finite natural parameters of {name!r}")
        _require_numbers(
            torch.stack(families[name].gaussian(value), -1), f"a finite mean and spread of {name!r}"
        )
    return Reading(families, natural, shots)


def _require_numbers(values: Tensor, expected: str) -> None:
    lost = ~torch.isfinite(values).flatten(2).all(2).all(0)
    count = int(lost.sum())
    require(
        count == 0,
        expected,
        f"NaN or Inf in {count} task{'s' * (count > 1)}, the first being task {int(lost.float().argmax())}",
        "Find out why the prior fails on them, or drop them.",
    )


def _task_sites(program: Program, episode: Episode) -> dict[str, Stock]:
    """Distributions of the latents that a task has, and not its shots."""
    with local_parameters(), failures_as_values(), poutine.block():
        trace = poutine.trace(program).get_trace(episode)
    tasks, sites = episode.query.shape[0], {}
    for name, site in random_sites(trace).items():
        batch, event = (tuple(shape) for shape in (site["fn"].batch_shape, site["fn"].event_shape))
        plated = any(frame.size == tasks for frame in site["cond_indep_stack"])
        if site["is_observed"] or not plated or batch != (tasks,) or len(event) > 1:
            continue
        require(
            len(event) == 1,
            f"latent {name!r} of shape (task, component)",
            batch,
            "Give it a component axis: dist.Normal(loc[:, None], scale[:, None]).to_event(1).",
        )
        sites[name] = site["fn"]
    require(
        bool(sites),
        "a program with latents of tasks, of shape (task, component)",
        "none",
        "Sample them inside `with episode.plate:`.",
    )
    return sites


def _family(program: Program, name: str, fn: Stock) -> Family:
    """What the program's own prior says the site's family is; without one, what its distribution's type says."""
    for module in program.modules() if isinstance(program, nn.Module) else ():
        if isinstance(module, Prior) and name in module.sites:
            return module.sites[name]
    stock, components = bare(fn, None)[0], int((fn.batch_shape + fn.event_shape)[-1])
    for family in KNOWN:
        if isinstance(stock, family._stock.__bases__[0]):
            return family(components)
    fail(
        f"a prior from an exponential family for {name!r}",
        type(stock).__name__,
        "Use one of ph.families, or write a Family and name it in a SupportPrior.",
        TypeError,
    )


def in_double(program: _T) -> _T:
    """A copy in float64 where the program is a module; a plain function follows the precision of its data."""
    return copy.deepcopy(program).double() if isinstance(program, nn.Module) else program
