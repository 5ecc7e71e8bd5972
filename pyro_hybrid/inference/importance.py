"""Importance weights of posterior draws, and what they say about the guide."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.validate_episode import check_episode
from pyro_hybrid.errors import fail
from pyro_hybrid.inference import arviz_data
from pyro_hybrid.inference.draws import require_finite_parameters, require_num_samples
from pyro_hybrid.programs.module import local_parameters, with_belief
from pyro_hybrid.programs.run import Program

__all__ = ["RELIABLE_K", "ParetoK", "pareto_k"]

AT_ONCE = 20_000_000  # observations that are predicted at once
RELIABLE_K = 0.7  # k-hat below which importance weights are reliable


class ParetoK(NamedTuple):
    """Diagnostics of the importance weights of a guide's draws, one entry per task.

    Attributes:
        k_hat: PSIS k-hat, the index of the weights' tail; 0 where they are nearly equal (an effective sample size of
            0.999 of the draws or more), since the tail of rounding errors can have any index.
        relative_ess: effective sample size of the weights, as a share of the draws.
    """

    k_hat: NDArray[np.floating]
    relative_ess: NDArray[np.floating]

    @property
    def is_reliable(self) -> NDArray[np.bool_]:
        """True where the guide can be trusted as a proposal for the program's exact posterior: k-hat below 0.7."""
        return np.asarray(self.k_hat < RELIABLE_K)


def pareto_k(
    model: Program,
    guide: Program,
    episode: Episode,
    num_samples: int = 1000,
    *,
    progress: bool = False,
) -> ParetoK:
    """Diagnose, by task, if the guide can be trusted as a proposal for the program's exact posterior.

    Arguments:
        model: the program.
        guide: its guide.
        episode: tasks with support and query.
        num_samples: number of draws from the guide.
        progress: show a progress bar if it takes longer than two seconds.

    Returns:
        PSIS k-hat and effective sample size of each task's importance weights.
    """
    episode = check_episode(episode)
    if episode.query.values is None:
        fail("a query with values", "values=None", "There is no posterior without data.")
    require_num_samples(num_samples)
    require_finite_parameters(model=model, guide=guide)
    size = max(1, AT_ONCE // (num_samples * episode.query.values[:1].numel()))
    pieces = torch.arange(episode.query.shape[0]).split(size)
    weights = [
        _log_weights(model, guide, episode.select_tasks(rows), num_samples)
        for rows in tqdm(
            pieces,
            desc="weighing draws",
            unit="batch",
            leave=False,
            disable=not progress,
            delay=2.0,
        )
    ]
    log_weights = torch.cat(weights, 1).T.double().cpu().numpy()
    return ParetoK(arviz_data.pareto_k(log_weights), arviz_data.relative_ess(log_weights))


def _log_weights(model: Program, guide: Program, episode: Episode, num_samples: int) -> Tensor:
    """Return log p(x, z | S) - log q(z | S, x), by draw and task."""
    with torch.no_grad(), local_parameters():
        episode = with_belief(model, episode)
    with torch.no_grad(), local_parameters(), pyro.plate("draw", num_samples, dim=-2):
        proposed = poutine.trace(guide).get_trace(episode)
        weighed = poutine.trace(poutine.replay(model, trace=proposed)).get_trace(episode)
    return (_log_density(weighed) - _log_density(proposed)).expand(
        num_samples, episode.query.shape[0]
    )


def _log_density(trace: poutine.Trace) -> Tensor:
    trace.compute_log_prob()
    return sum(
        (site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample"),
        torch.zeros(()),
    )
