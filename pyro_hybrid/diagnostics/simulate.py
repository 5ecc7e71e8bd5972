"""Simulate queries with latents from the prior, and rank these latents among the guide's draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.diagnostics.ranks import Array
from pyro_hybrid.errors import fail, require
from pyro_hybrid.identifiability.task_beliefs import latent_names
from pyro_hybrid.inference.draws import draws
from pyro_hybrid.programs.run import Program
from pyro_hybrid.programs.sites import Site, random_sites, unwrap
from pyro_hybrid.shapes import Stock

__all__ = ["SimulationScores", "episodes_of", "simulate_and_rank"]

BATCH = 100  # tasks at once


class SimulationScores(NamedTuple):
    """Scores of all simulations and latents, ``(simulation, latent)``.

    Attributes:
        names: of the latents.
        rank: share of the guide's draws below the truth, ties and the last digit broken at random.
        z: (mean - truth) / standard deviation, of the draws.
        contraction: 1 - variance of the draws / variance of the prior, given the latents sampled before it.
        num_diverged: number of simulations that were not finite and were left out.
    """

    names: list[str]
    rank: Array
    z: Array
    contraction: Array
    num_diverged: int


class _Simulation(NamedTuple):
    """Simulated episode, with the sites of the latents that it was simulated from.

    Attributes:
        sites: of the latents.
        episode: with the simulated query.
        is_finite: by task; the others keep their real query.
    """

    sites: dict[str, Site]
    episode: Episode
    is_finite: Tensor


def simulate_and_rank(
    model: Program, guide: Program, tasks: Tasks, repeats: int, num_draws: int, progress: bool
) -> SimulationScores:
    """Simulate every task's query ``repeats`` times, and score the guide's draws."""
    query_site = _query_site(model, tasks)
    episodes = list(episodes_of(model, tasks, BATCH))
    batches: list[Tensor] = []
    names: list[str] = []
    num_diverged = 0
    bar = tqdm(
        itertools.product(episodes, range(repeats)),
        total=len(episodes) * repeats,
        delay=2.0,
        desc="simulating queries",
        unit="batch",
        leave=False,
        disable=not progress,
    )
    for episode, _ in bar:
        simulation = _simulate(model, episode, query_site)
        samples = draws(model, guide, simulation.episode, num_draws)
        scores = _score(simulation.sites, samples)
        names = latent_names({name: score.shape[-1] for name, score in scores.items()})
        batches.append(torch.cat(list(scores.values()), -1)[:, simulation.is_finite])
        num_diverged += int((~simulation.is_finite).sum())
    rank, z, contraction = torch.cat(batches, 1).cpu().numpy()
    _require_scores(z, num_diverged)
    return SimulationScores(names, rank, z, contraction, num_diverged)


def _require_scores(z: Array, num_diverged: int) -> None:
    require(
        len(z) > 1,
        "finite trajectories from the program",
        f"{num_diverged} simulations that diverged",
        "Shorten its steps, or bound the neural term.",
    )
    num_invalid = int((~np.isfinite(z)).any(1).sum())
    require(
        num_invalid == 0,
        "finite draws from the guide, that differ",
        f"others in {num_invalid} simulations",
        "Find out what it does with an episode that the program simulated.",
    )


def _simulate(model: Program, episode: Episode, query_site: str) -> _Simulation:
    sites = random_sites(poutine.trace(model).get_trace(episode.simulation()))
    x = sites.pop(query_site)["value"]
    real = _values_of(episode.query)
    is_finite = torch.isfinite(x).flatten(1).all(1)
    x = x.where(is_finite.reshape(-1, 1, 1, 1), real)
    scored = episode.query.scored
    # Values that are not scored were given, such as measured initial states, and stay.
    states = _simulated_restarts(episode.query, x.where(scored | ~episode.query.observed, real))
    shots = replace(episode.query, values=x.where(scored, real), states=states)
    return _Simulation(sites, replace(episode, query=shots), is_finite)


def _values_of(shots: Shots) -> Tensor:
    if shots.values is None:
        fail("a query with values", "values=None", "Pass tasks with shots beside their support.")
    return shots.values


def _simulated_restarts(shots: Shots, simulated: Tensor) -> Tensor | None:
    """Return the states that segments restart from, those measured by sensors as the simulated sensors show them."""
    if shots.states is None:
        return None
    components = list(shots.states.unbind(-1))
    real = _values_of(shots)
    for sensor in zip(
        real.unbind(-1), simulated.unbind(-1), shots.observed.unbind(-1), strict=True
    ):
        components = [_resimulated(component, *sensor) for component in components]
    return torch.stack(components, -1)


def _resimulated(component: Tensor, real: Tensor, simulated: Tensor, observed: Tensor) -> Tensor:
    """Return the simulated sensor if a component of the states is what this sensor measured."""
    is_measured = component.shape == real.shape and bool(((component == real) | ~observed).all())
    return simulated if is_measured else component


def _score(sites: Mapping[str, Site], samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return rank, z-score and contraction of every latent, ``(3, task, component)``."""
    missing = sorted(set(sites) - set(samples))
    require(
        not missing,
        "a guide that samples every latent of the program",
        f"none of {missing}",
        "Add those sites.",
    )
    return {name: _score_site(site, samples[name]) for name, site in sites.items()}


def _score_site(site: Site, samples: Tensor) -> Tensor:
    fn = site["fn"]
    prior = _by_component(_unwrapped(fn.sample(samples.shape[:1]), fn)).double()
    together = torch.cat([site["value"][None], samples])
    together = _by_component(_unwrapped(together, fn)).double()
    truth = together[0]
    posterior = together[1:]
    num_below = (posterior < truth).sum(0)
    num_ties = (posterior == truth).sum(0)
    rank = (num_below + (1 + num_ties) * torch.rand_like(truth)) / (len(posterior) + 1)
    z = (posterior.mean(0) - truth) / posterior.std(0)
    contraction = 1.0 - posterior.var(0) / prior.var(0)
    return torch.stack([rank, z, contraction])


def _by_component(values: Tensor) -> Tensor:
    """Return latents as ``(draw, task, component)``; of shots' latents, those of the first shot."""
    require(
        values.dim() in (3, 4),
        "latents of shape (task, component) or (task, shot, component)",
        tuple(values.shape[1:]),
        "Give them a component axis: .to_event(1) of a task, .to_event(2) of its shots.",
    )
    return values if values.dim() == 3 else values[:, :, 0]


def _unwrapped(values: Tensor, fn: Stock) -> Tensor:
    """Return angles as numbers on a circle that is cut opposite to their mean."""
    if not isinstance(unwrap(fn, None)[0], dist.VonMises):
        return values
    center = torch.atan2(values.sin().mean(0), values.cos().mean(0))
    return torch.remainder(values - center + math.pi, 2 * math.pi) - math.pi


def _query_site(model: Program, tasks: Tasks) -> str:
    """Return the name of the site at which the program observes the query."""
    episode = next(episodes_of(model, tasks, 1))
    sites = random_sites(poutine.trace(model).get_trace(episode))
    observed = {name: site["value"] for name, site in sites.items() if site["is_observed"]}
    require(
        len(observed) == 1 and all(value is episode.query.values for value in observed.values()),
        "a program that observes episode.query.values as it is, at one site",
        sorted(observed) or "nothing observed",
        "Write obs=episode.query.values: where that is None, it simulates.",
    )
    return next(iter(observed))


def episodes_of(model: Program, tasks: Tasks, size: int) -> Iterator[Episode]:
    """Yield episodes of ``size`` tasks at once, on the device of the model."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    for start in range(0, len(tasks), size):
        episode = tasks[start : start + size].episode()
        yield episode if parameter is None else episode.to(parameter.device)
