"""Scale the intervals of computed evidence so that halves of a task agree as often as they should."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hybrid.beliefs.belief import Gaussian
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.data.tasks import Tasks, require_tasks
from pyro_hybrid.errors import fail, require
from pyro_hybrid.inference.prior import SupportPrior, update
from pyro_hybrid.programs.module import HybridModel, local_parameters

__all__ = ["measure_interval_scale"]

BATCH = 100  # tasks that are read at once
NARROWEST, WIDEST = (
    0.1,
    100.0,
)  # limits of the factor: a program that is further off must be trained first


@torch.no_grad()
def measure_interval_scale(model: HybridModel, tasks: Tasks, prob: float = 0.9) -> Tensor:
    r"""Measure by which factor standard deviations of computed evidence are too small, from data alone.

    A neural term is never quite right, and its error differs from shot to shot: posteriors of one task from two halves
    of its shots then lie further apart than they claim. If the evidence of half i has precision :math:`P_i` and its
    posterior has covariance :math:`C_i`, the difference of the means has the covariance

    .. math:: C_1 P_1 C_1 + C_2 P_2 C_2 + (C_1 - C_2) P_0 (C_1 - C_2)

    for tasks of a population of precision :math:`P_0`. It is less than the sum of the posteriors' covariances, for both
    halves share the population, which pulls the half of weaker evidence more than the other.

    Arguments:
        model: a trained program whose prior has computed evidence.
        tasks: training tasks.
        prob: the share of tasks whose difference should lie inside its interval of this probability.

    Returns:
        The factor of each latent in unconstrained coordinates, ``(d,)``.
    """
    require(
        isinstance(prob, float) and 0.0 < prob < 1.0,
        "prob as a number between 0 and 1",
        repr(prob),
        "The default, 0.9, is a good choice.",
    )
    require_tasks(tasks)
    num_shots = tasks.values.shape[1]
    require(num_shots >= 2, "tasks of two shots or more", num_shots, "Record another shot.")
    half = num_shots // 2
    ratios = []
    with local_parameters():
        for start in range(0, len(tasks), BATCH):
            batch = tasks[start : start + BATCH]
            one = _read(model, batch.shots(slice(0, half)))
            other = _read(model, batch.shots(slice(half, None)))
            variance = _difference_variance(model, one, other)
            difference = one.task_marginal.mean - other.task_marginal.mean
            ratio = difference.abs() / variance.clamp(min=0.0).sqrt()
            ratios.append(ratio.where(variance > 0.0, torch.nan))
    nominal = torch.special.ndtri(torch.tensor(0.5 + 0.5 * prob, dtype=torch.float64))
    scale: Tensor = torch.cat(ratios).nanquantile(prob, 0) / nominal
    # A latent that no trajectory says anything about keeps its intervals.
    return scale.nan_to_num(1.0).clamp(NARROWEST, WIDEST)


def _read(model: HybridModel, shots: Shots) -> Gaussian:
    prior = model.prior
    require(
        isinstance(prior, SupportPrior),
        "a model with a SupportPrior",
        type(prior).__name__,
        "Intervals can be compared only if the prior reads a support.",
        TypeError,
    )
    before = prior.population().expand(shots.shape[0])
    scale = torch.ones_like(prior.interval_scale)
    belief = update(before, prior.evidence, shots.sorted_shots, model, scale)
    if not isinstance(belief, Gaussian):
        fail(
            "a prior with computed evidence",
            "an encoder alone",
            "Compute evidence first: posterior = ph.compute_evidence(posterior).",
            TypeError,
        )
    return belief


def _difference_variance(model: HybridModel, one: Gaussian, other: Gaussian) -> Tensor:
    """Variance of the difference of two posteriors' means of the same task, (task, d)."""
    population = model.prior.population().gaussian().own.precision
    first = one.task_marginal.covariance
    second = other.task_marginal.covariance
    difference = first - second
    covariance: Tensor = (
        first @ (one.task_marginal.precision - population) @ first
        + second @ (other.task_marginal.precision - population) @ second
        + difference @ population @ difference
    )
    return covariance.diagonal(dim1=-2, dim2=-1)
