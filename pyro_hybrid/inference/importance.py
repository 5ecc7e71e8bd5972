"""Importance weights of posterior draws, and what their tail says about the guide."""

from __future__ import annotations

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
from pyro_hybrid.inference.draws import require_num_samples
from pyro_hybrid.programs.module import local_parameters, with_belief
from pyro_hybrid.programs.run import Program

__all__ = ["pareto_k"]

AT_ONCE = 20_000_000  # observations that are predicted at once


def pareto_k(
    model: Program,
    guide: Program,
    episode: Episode,
    num_samples: int = 1000,
    *,
    progress: bool = False,
) -> NDArray[np.floating]:
    """PSIS k̂ of each task: below 0.7 the guide can be trusted as a proposal for the program's exact posterior."""
    episode = check_episode(episode)
    if episode.query.values is None:
        fail("a query with values", "values=None", "There is no posterior without data.")
    require_num_samples(num_samples)
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
    return arviz_data.pareto_k(torch.cat(weights, 1).T.double().cpu().numpy())


def _log_weights(model: Program, guide: Program, episode: Episode, num_samples: int) -> Tensor:
    """log p(x, z | S) - log q(z | S, x), by draw and task."""
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
