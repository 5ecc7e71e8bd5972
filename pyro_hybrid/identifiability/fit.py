"""The theorem's premise: the ELBO is at its maximum, so that at the least the program explains its trajectories."""

from __future__ import annotations

from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.evidence.gauss_newton import Program, observed
from pyro_hybrid.identifiability.check import Check, Threshold, judged, unchecked
from pyro_hybrid.inference.posterior import draws
from pyro_hybrid.programs.module import local_parameters

__all__ = ["Misfit", "judge_fit", "misfit"]

FACTOR = Threshold(holds=2.0, fails=2.0, larger=False)
RESAMPLES = 200


class Misfit(NamedTuple):
    """Mean squared errors of reconstructed trajectories, in variances of the program's own noise, by task.

    Tasks of which nothing was observed are left out.
    """

    error: Tensor


@torch.no_grad()
@pyro.validation_enabled(False)
def misfit(model: Program, guide: Program, episode: Episode, *, num_samples: int = 50) -> Misfit:
    r"""How far observations are from what the program says at the middle of its posterior.

    .. math:: \tfrac{1}{N} \sum_{i=1}^{N} (x_i - \mu_i(\bar z))^2 / \sigma_i^2,
              \qquad \bar z = \operatorname{median} \, q(z \mid S, x)

    At a maximum of the ELBO it is near 1 where the noise was learned: a noise that doesn't match the errors could be
    improved, whatever the rest. At the median, because draws from a factorised posterior miss where latents correlate.

    Arguments:
        model, guide: the program and its guide.
        episode: trajectories of some tasks, with their support.
        num_samples: draws from the posterior, for their median.
    """
    middle = {
        name: value.median(0).values
        for name, value in draws(model, guide, episode, num_samples).items()
    }
    total, count = torch.zeros(2, episode.query.shape[0], dtype=torch.float64)
    with local_parameters():
        sites = observed(model, episode, middle)[0]
    for site in sites:
        error = ((site.value - site.mean) / site.scale).square().double().expand(site.value.shape)
        counts = site.mask.expand_as(error)
        total += error.where(counts, 0.0).nan_to_num(torch.inf).flatten(1).sum(1).cpu()
        count += counts.double().flatten(1).sum(1).cpu()
    seen = count > 0.0
    return Misfit(total[seen] / count[seen])


def judge_fit(found: Misfit, *, seed: int = 0) -> Check:
    """By what factor the typical task's errors are larger or smaller than the noise that the program claims."""
    generator, tasks = torch.Generator().manual_seed(seed), len(found.error)
    if tasks == 0:
        return unchecked(
            "fit",
            "of no system is anything observed but its support",
            "Take fewer shots into the support, or record more.",
        )
    rows = torch.randint(tasks, (RESAMPLES, tasks), generator=generator)
    resampled = _factor(found.error[rows].median(1).values)
    middle = float(found.error.median().sqrt())
    why = (
        f"errors are typically {middle:.2g} times the noise that the program claims, "
        f"{float(found.error.max().sqrt()):.2g} times in the worst of {tasks} system{'s' * (tasks > 1)}"
    )
    interval = float(resampled.quantile(0.025)), float(resampled.quantile(0.975))
    remedy = (
        "Learn the noise, or train until it has come down."
        if middle < 1.0
        else "Train longer, or let the neural term express what is missing: the theorem speaks of an ELBO's maximum."
    )
    check = judged("fit", float(_factor(found.error.median())), interval, FACTOR, why, remedy)
    # A noise that is still too large says that the ELBO can rise, but not that anything is beyond the program.
    return check._replace(status="undecided") if check.status == "fails" and middle < 1.0 else check


def _factor(error: Tensor) -> Tensor:
    error = error.sqrt().clamp(1e-12, 1e12)
    return torch.maximum(error, error.reciprocal())
