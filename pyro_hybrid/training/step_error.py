"""step_error: the error of fixed solver steps, in standard deviations of the noise."""

from __future__ import annotations

from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.validate_episode import check_episode
from pyro_hybrid.dynamics.modes import halve_steps, nan_on_failure
from pyro_hybrid.errors import require
from pyro_hybrid.programs.run import Program, run_at
from pyro_hybrid.programs.sites import random_sites

__all__ = ["StepError", "step_error"]


class StepError(NamedTuple):
    """Errors of predicted observations, in standard deviations of their noise.

    Attributes:
        typical: root mean square over all observations.
        worst: the largest error.
        by_task: the largest error of each task.
    """

    typical: float
    worst: float
    by_task: Tensor


@torch.no_grad()
@pyro.validation_enabled(False)  # predictions that diverge are part of the result
def step_error(program: Program, episode: Episode) -> StepError:
    """Measure how far predictions move if every fixed step of :func:`~pyro_hybrid.solve` is halved.

    Latents are drawn from the program itself, given the support. The steps are short enough if ``typical`` is well
    below one: at 0.1, integration adds half a percent to the noise. Adaptive methods aren't affected: their tolerances
    bound their errors.

    Arguments:
        program: the model.
        episode: trajectories to predict.

    >>> import pyro_hybrid as ph, pyro, pyro.distributions as dist
    >>> def swing(episode):
    ...     with episode.plate:
    ...         rate = pyro.sample("rate", dist.LogNormal(torch.zeros(1), 0.1).to_event(1))
    ...         shots = episode.query
    ...         x = ph.solve(lambda t, y: (y[1], -rate * y[0]), shots.initial.unbind(-1), shots.times)
    ...         pyro.sample("x", dist.Normal(x, 0.01).to_event(3), obs=shots.values)
    >>> still = torch.zeros(3, 1)
    >>> start = torch.tensor([1.0, 0.0]).expand(3, 1, 2)
    >>> shots = ph.Shots.from_tensors(torch.arange(10.0), torch.zeros(3, 1, 10, 2), start)
    >>> step_error(swing, ph.Episode(None, shots)).typical > 1.0  # steps of a sixth of a period are too long
    True
    """
    episode = check_episode(episode)
    with poutine.block(), nan_on_failure():
        trace = poutine.trace(program).get_trace(episode)
    latents = {
        name: site["value"] for name, site in random_sites(trace).items() if not site["is_observed"]
    }
    now = run_at(program, episode, latents).observations
    with halve_steps():
        finer = run_at(program, episode, latents).observations
    require(
        bool(now),
        "a program that observes something",
        "no observed sample site with data",
        "Pass an episode whose query has values, and obs=episode.query.values in the program.",
    )
    errors = [
        ((a.mean - b.mean) / b.scale).where(b.mask, 0.0).nan_to_num(torch.inf).flatten(1)
        for a, b in zip(now, finer, strict=True)
    ]
    counts = [b.mask.expand(b.mean.shape).flatten(1) for b in finer]
    error, count = torch.cat(errors, 1), torch.cat(counts, 1)
    typical = (error.square().sum() / count.sum().clamp(min=1)).sqrt()
    return StepError(float(typical), float(error.abs().max()), error.abs().amax(1))
