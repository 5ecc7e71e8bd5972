"""Check the theorem's premise, a maximum of the ELBO: the program must at least explain its trajectories."""

from __future__ import annotations

from typing import NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.inference.draws import draws
from pyro_hybrid.programs.module import local_parameters
from pyro_hybrid.programs.run import Observation, Program, run_at
from pyro_hybrid.scores.check import Check, Threshold

__all__ = ["FACTOR", "Misfit", "judge_misfit", "measure_misfit"]

FACTOR = Threshold(holds=2.0, fails=2.0, larger=False)
RESAMPLES = 200


class Misfit(NamedTuple):
    """Errors of reconstructed trajectories.

    Attributes:
        error: mean squared error in variances of the program's own noise, by task; tasks without observations are
            left out.
    """

    error: Tensor


@torch.no_grad()
@pyro.validation_enabled(False)
def measure_misfit(
    model: Program, guide: Program, episode: Episode, *, num_samples: int = 50
) -> Misfit:
    r"""Measure how far observations are from the program's prediction at the median of its posterior.

    .. math:: \tfrac{1}{N} \sum_{i=1}^{N} (x_i - \mu_i(\bar z))^2 / \sigma_i^2,
              \qquad \bar z = \operatorname{median} \, q(z \mid S, x)

    At a maximum of the ELBO it is near 1 where the noise was learned: a noise that does not match the errors could be
    improved, whatever else is wrong. The median is used because draws from a factorized posterior miss where latents
    correlate.

    Arguments:
        model, guide: the program and its guide.
        episode: trajectories of some tasks, with their support.
        num_samples: draws from the posterior, for their median.
    """
    samples = draws(model, guide, episode, num_samples)
    medians = {name: value.median(0).values for name, value in samples.items()}
    with local_parameters():
        observations = run_at(model, episode, medians).observations
    total = torch.zeros(episode.query.shape[0], dtype=torch.float64)
    count = torch.zeros_like(total)
    for observation in observations:
        squared, is_counted = _squared_errors(observation)
        total += squared
        count += is_counted
    has_observations = count > 0.0
    return Misfit(total[has_observations] / count[has_observations])


def _squared_errors(site: Observation) -> tuple[Tensor, Tensor]:
    """Return each task's sum of squared errors in variances of the noise, and the number of observations."""
    error = ((site.value - site.mean) / site.scale).square().double().expand(site.value.shape)
    is_counted = site.mask.expand_as(error)
    error = error.where(is_counted, 0.0).nan_to_num(torch.inf)
    return error.flatten(1).sum(1).cpu(), is_counted.double().flatten(1).sum(1).cpu()


def judge_misfit(misfit: Misfit, *, seed: int = 0) -> Check:
    """Judge by what factor the typical task's errors are larger or smaller than the noise that the program claims.

    Arguments:
        misfit: result of :func:`measure_misfit`.
        seed: of the resampling of tasks.
    """
    num_tasks = len(misfit.error)
    if num_tasks == 0:
        return Check.skipped(
            "fit",
            "No system has observations beside its support.",
            "Take fewer shots into the support, or record more.",
        )
    typical = float(misfit.error.median().sqrt())
    largest = float(misfit.error.max().sqrt())
    why = (
        f"Errors of reconstructed trajectories are typically {typical:.2g} times the noise that the program claims, "
        f"and {largest:.2g} times in the worst of {num_tasks} system{'s' * (num_tasks > 1)}."
    )
    if typical < 1.0:
        remedy = "Learn the noise, or train until it has come down."
    else:
        remedy = "Train longer, or let the neural term express what is missing: the theorem is about a maximum of the ELBO."
    value = float(_factor(misfit.error.median()))
    check = Check.from_interval(
        "fit", value, _resampled_interval(misfit.error, seed), FACTOR, why, remedy
    )
    if check.status == "fails" and typical < 1.0:
        # A noise that is still too large shows that the ELBO can rise, not that anything is beyond the program.
        return check._replace(status="undecided")
    return check


def _resampled_interval(error: Tensor, seed: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(error), (RESAMPLES, len(error)), generator=generator)
    factors = _factor(error[rows].median(1).values)
    return float(factors.quantile(0.025)), float(factors.quantile(0.975))


def _factor(error: Tensor) -> Tensor:
    """Return the ratio of error to noise, or its inverse where that is larger."""
    ratio = error.sqrt().clamp(1e-12, 1e12)
    return torch.maximum(ratio, ratio.reciprocal())
