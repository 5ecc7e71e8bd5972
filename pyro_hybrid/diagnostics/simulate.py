"""A program's latents from the prior, a query simulated with them, and how the guide's draws compare with them."""

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
from pyro_hybrid.errors import require
from pyro_hybrid.evidence.gauss_newton import Program, Site, bare, random_sites
from pyro_hybrid.identifiability.task_beliefs import names_of
from pyro_hybrid.inference.posterior import draws
from pyro_hybrid.shapes import Stock

__all__ = ["BATCH", "Scores", "batches", "simulations"]

BATCH = 100  # tasks at once


class Scores(NamedTuple):
    """Of every simulation and latent, ``(simulation, latent)``.

    Attributes:
        names: of the latents.
        rank: share of the guide's draws below the truth, ties and the last digit broken at random.
        z: (mean - truth) / standard deviation, of the draws.
        contraction: 1 - variance of the draws / variance of the prior, given the latents sampled before it.
        diverged: how many simulations weren't finite and were left out.
    """

    names: list[str]
    rank: Array
    z: Array
    contraction: Array
    diverged: int


def simulations(
    model: Program, guide: Program, tasks: Tasks, repeats: int, num_draws: int, progress: bool
) -> Scores:
    """Simulate every task's query so often, and score the guide's draws."""
    query, found, lost, episodes = _query_site(model, tasks), [], 0, [*batches(model, tasks, BATCH)]
    for episode, _ in tqdm(
        itertools.product(episodes, range(repeats)),
        total=len(episodes) * repeats,
        delay=2.0,
        desc="simulating queries",
        unit="batch",
        leave=False,
        disable=not progress,
    ):
        sites, simulated, finite = _simulated(model, episode, query)
        scores = _scores(sites, draws(model, guide, simulated, num_draws))
        found.append(torch.cat(list(scores.values()), -1)[:, finite])
        lost += int((~finite).sum())
    rank, z, contraction = torch.cat(found, 1).cpu().numpy()
    require(
        len(rank) > 1,
        "finite trajectories from the program",
        f"{lost} simulations that diverged",
        "Shorten its steps, or bound the neural term.",
    )
    bad = int((~np.isfinite(z)).any(1).sum())
    require(
        bad == 0,
        "finite draws from the guide, that differ",
        f"others in {bad} simulations",
        "See what it does with an episode that the program simulated.",
    )
    return Scores(
        names_of({name: score.shape[-1] for name, score in scores.items()}),
        rank,
        z,
        contraction,
        lost,
    )


def _simulated(
    model: Program, episode: Episode, query: str
) -> tuple[dict[str, Site], Episode, Tensor]:
    """The latents' sites, the episode that they simulate, and in which tasks it is finite."""
    sites = random_sites(poutine.trace(model).get_trace(episode.simulation()))
    x, real = sites.pop(query)["value"], episode.query.values
    assert real is not None
    finite = torch.isfinite(x).flatten(1).all(1)
    x = x.where(finite.reshape(-1, 1, 1, 1), real)
    counts, seen = episode.query.scored, episode.query.observed
    # What doesn't count as an observation was given, such as measured initial states, and stays.
    states = _restarts(episode.query, x.where(counts | ~seen, real))
    shots = replace(episode.query, values=x.where(counts, real), states=states)
    return sites, replace(episode, query=shots), finite


def _restarts(shots: Shots, simulated: Tensor) -> Tensor | None:
    """States from which segments restart: what was read off the sensors is read off the simulated ones."""

    def again(state: Tensor, real: Tensor, new: Tensor, seen: Tensor) -> Tensor:
        return new if state.shape == real.shape and bool(((state == real) | ~seen).all()) else state

    states, real, seen = shots.states, shots.values, shots.observed
    assert real is not None
    if states is None:
        return None
    components = states.unbind(-1)
    for sensor in zip(real.unbind(-1), simulated.unbind(-1), seen.unbind(-1), strict=True):
        components = tuple(again(state, *sensor) for state in components)
    return torch.stack(components, -1)


def _scores(sites: Mapping[str, Site], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rank, z-score and contraction of every latent, ``(3, task, component)``."""
    missing = sorted(set(sites) - set(found))
    require(
        not missing,
        "a guide that samples every latent of the program",
        f"none of {missing}",
        "Add those sites.",
    )
    scores = {}
    for name, site in sites.items():
        truth, posterior, prior = (
            site["value"],
            found[name],
            site["fn"].sample(found[name].shape[:1]),
        )
        both, prior = (
            _ranked(_uncoiled(x, site["fn"])).double()
            for x in (torch.cat([truth[None], posterior]), prior)
        )
        truth, posterior = both[0], both[1:]
        ties = (posterior == truth).sum(0)
        rank = ((posterior < truth).sum(0) + (1 + ties) * torch.rand_like(truth)) / (
            len(posterior) + 1
        )
        z = (posterior.mean(0) - truth) / posterior.std(0)
        scores[name] = torch.stack([rank, z, 1.0 - posterior.var(0) / prior.var(0)])
    return scores


def _ranked(values: Tensor) -> Tensor:
    """``(draw, task, component)``: as they are, or of the first shot."""
    require(
        values.dim() in (3, 4),
        "latents of shape (task, component) or (task, shot, component)",
        tuple(values.shape[1:]),
        "Give them a component axis: .to_event(1) of a task, .to_event(2) of its shots.",
    )
    return values if values.dim() == 3 else values[:, :, 0]


def _uncoiled(values: Tensor, fn: Stock) -> Tensor:
    """Angles as numbers: their circle is cut opposite to their mean."""
    if not isinstance(bare(fn, None)[0], dist.VonMises):
        return values
    centre = torch.atan2(values.sin().mean(0), values.cos().mean(0))
    return torch.remainder(values - centre + math.pi, 2 * math.pi) - math.pi


def _query_site(model: Program, tasks: Tasks) -> str:
    """Where the program observes the query."""
    episode = next(batches(model, tasks, 1))
    sites = random_sites(poutine.trace(model).get_trace(episode))
    seen = {name: site["value"] for name, site in sites.items() if site["is_observed"]}
    require(
        len(seen) == 1 and all(value is episode.query.values for value in seen.values()),
        "a program that observes episode.query.values as it is, at one site",
        sorted(seen) or "nothing observed",
        "Write obs=episode.query.values: where that is None, it simulates.",
    )
    return next(iter(seen))


def batches(model: Program, tasks: Tasks, size: int) -> Iterator[Episode]:
    """So many tasks at once, where the model is."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    for start in range(0, len(tasks), size):
        episode = tasks[start : start + size].episode()
        yield episode if parameter is None else episode.to(parameter.device)
