"""Draws from the posterior, and predictions from the support alone."""

from __future__ import annotations

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.validate_episode import check_episode
from pyro_hybrid.errors import require
from pyro_hybrid.programs.module import local_parameters, with_belief
from pyro_hybrid.programs.run import Program
from pyro_hybrid.programs.sites import Site, latent_values, random_sites

__all__ = [
    "draws",
    "predict",
    "require_finite_parameters",
    "require_num_samples",
    "sample_sites",
]


def draws(model: Program, guide: Program, episode: Episode, num_samples: int) -> dict[str, Tensor]:
    """Draw every latent site given support and query, ``(draw, task, ...)``.

    Arguments:
        model: the program, whose prior reads the support.
        guide: its guide, which adds the evidence of the query.
        episode: tasks with support and query.
        num_samples: number of draws.
    """
    require_num_samples(num_samples)
    require_finite_parameters(model=model, guide=guide)
    episode = _with_belief(model, check_episode(episode))
    return latent_values(sample_sites(guide, episode, num_samples))


def predict(model: Program, episode: Episode, num_samples: int) -> dict[str, Tensor]:
    """Draw every site, observations included, given the support and the starts of the query alone.

    Arguments:
        model: the program.
        episode: tasks with a support; the values of the query are not looked at.
        num_samples: number of draws.
    """
    require_num_samples(num_samples)
    require_finite_parameters(model=model)
    episode = _with_belief(model, check_episode(episode))
    return latent_values(sample_sites(model, episode.simulation(), num_samples))


def sample_sites(program: Program, episode: Episode, num_samples: int) -> dict[str, Site]:
    """Run a program many times at once, and return its latents and observations."""
    with torch.no_grad(), local_parameters(), pyro.plate("draw", num_samples, dim=-2):
        return random_sites(poutine.trace(program).get_trace(episode))


def require_num_samples(num_samples: int) -> None:
    """Refuse a number of draws that is none."""
    require(
        isinstance(num_samples, int) and not isinstance(num_samples, bool) and num_samples >= 1,
        "num_samples as a whole number of 1 or more",
        repr(num_samples),
        "Some hundreds of draws make a smooth picture.",
    )


def require_finite_parameters(**programs: Program) -> None:
    """Refuse parameters that are NaN or infinite, by name: computed evidence would silently return the prior."""
    for role, program in programs.items():
        named = program.named_parameters() if isinstance(program, nn.Module) else ()
        not_finite = [
            name.removesuffix("_unconstrained")
            for name, value in named
            if not bool(torch.isfinite(value.detach()).all())
        ]
        require(
            not not_finite,
            f"finite parameters of the {role}",
            f"NaN or Inf in {', '.join(not_finite)}",
            "Load an earlier checkpoint, or set these parameters to finite values.",
        )


def _with_belief(model: Program, episode: Episode) -> Episode:
    with torch.no_grad(), local_parameters():
        return with_belief(model, episode)
