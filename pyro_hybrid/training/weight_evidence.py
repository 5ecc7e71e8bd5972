"""What a batch of systems says about the weights of a network, its latents being integrated out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_hybrid.beliefs.quadratic import Quadratic
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.evidence.least_squares import Iterate, LeastSquares, select_rows
from pyro_hybrid.training.weight_slopes import weight_slopes

__all__ = ["WeightEvidence", "misfit", "move_latents", "usable_tasks", "weight_evidence"]

POOR_FIT = 2.0  # deviances per observation beyond which a task counts by their logarithm


class WeightEvidence(NamedTuple):
    """The evidence of one batch on the weights.

    Attributes:
        factor: over a change of the weights.
        kept: the tasks that it is from.
        cost: deviance per observation of these tasks.
        iterate: where the tasks were linearized, its slopes fresh.
        slopes: derivatives of the residuals by the latents, ``(task, shot, d + m, number)``.
        by_weight: and by the weights, ``(task, shot, weight, number)``.
    """

    factor: Quadratic
    kept: Tensor
    cost: float
    iterate: Iterate
    slopes: Tensor
    by_weight: Tensor


def weight_evidence(
    problem: LeastSquares, iterate: Iterate, network: nn.Module, outlier_factor: float
) -> WeightEvidence:
    """Integrate the latents of shots and tasks out of each task's factor, and multiply what is left."""
    residuals, slopes = problem.jacobian(iterate.task, iterate.shot)
    by_weight = weight_slopes(problem, iterate, network)
    kept = usable_tasks(iterate.cost, outlier_factor)
    kept &= slopes.isfinite().flatten(1).all(1) & by_weight.isfinite().flatten(1).all(1)
    slopes = select_rows(kept, slopes, torch.zeros_like(slopes)).double()
    by_weight = select_rows(kept, by_weight, torch.zeros_like(by_weight)).double()
    residuals = select_rows(kept, residuals, torch.zeros_like(residuals)).double()
    iterate = iterate._replace(
        gram=slopes @ slopes.mT, gradient=(slopes @ residuals.unsqueeze(-1)).squeeze(-1)
    )
    num_observed = problem.num_observed
    importance = (POOR_FIT * num_observed / iterate.cost).clamp(max=1.0)
    size = by_weight.shape[2]
    total = Quadratic(slopes.new_zeros(size), slopes.new_zeros(size, size))
    for task in kept.nonzero().squeeze(1).tolist():
        jacobian = torch.cat([by_weight[task], slopes[task]], 1)
        factor = _task_factor(problem, iterate, task, jacobian, residuals[task])
        total = total + float(importance[task]) * factor
    cost = float(iterate.cost[kept].sum() / num_observed[kept].sum().clamp(min=1.0))
    return WeightEvidence(total, kept, cost, iterate, slopes, by_weight)


def _task_factor(
    problem: LeastSquares, iterate: Iterate, task: int, jacobian: Tensor, residuals: Tensor
) -> Quadratic:
    """Factor of a change of the weights from one task; rows of the Jacobian are weights, task's and shots' latents."""
    num_weights = jacobian.shape[1] - problem.d - problem.m
    information = -(jacobian @ residuals.unsqueeze(-1)).squeeze(-1)
    precision = jacobian @ jacobian.mT
    if problem.m:
        own = slice(num_weights + problem.d, None)
        offset = (iterate.shot[task] - problem.shot_mean[task]).double()
        information[:, own] -= problem.shot_precision[task] * offset
        precision[:, own, own] += torch.diag_embed(problem.shot_precision[task])
    factor = Quadratic(information, precision).marginal(num_weights + problem.d).sum(0)
    prior = problem.prior.precision[task]
    offset = (iterate.task[task] - problem.mean[task]).double()
    factor.information[num_weights:] -= prior @ offset
    factor.precision[num_weights:, num_weights:] += prior
    return factor.marginal(num_weights)


def move_latents(problem: LeastSquares, evidence: WeightEvidence, move: Tensor) -> Iterate:
    """Let the latents follow a move of the weights: to first order, where this lowers a task's cost.

    The weights have moved already; ``evidence`` is from before.
    """
    iterate = evidence.iterate
    change = evidence.by_weight.mT @ move
    following = iterate._replace(
        gradient=iterate.gradient + (evidence.slopes @ change.unsqueeze(-1)).squeeze(-1)
    )
    task, shot = GaussNewton().step(problem, following, torch.zeros_like(iterate.cost))
    is_better = problem.cost_at(task, shot) < problem.cost_at(iterate.task, iterate.shot)
    return iterate._replace(
        task=select_rows(is_better, task, iterate.task),
        shot=select_rows(is_better, shot, iterate.shot),
    )


def misfit(problem: LeastSquares, cost: Tensor) -> Tensor:
    """Costs by task, where a task that is explained badly counts by the logarithm."""
    most = POOR_FIT * problem.num_observed
    return torch.where(cost <= most, cost, most * (1.0 + (cost / most).log()))


def usable_tasks(cost: Tensor, outlier_factor: float) -> Tensor:
    """Tasks whose cost isn't an outlier among those of a batch."""
    finite = cost[cost.isfinite()]
    if not len(finite):
        return torch.zeros_like(cost, dtype=torch.bool)
    return cost < outlier_factor * finite.median()
