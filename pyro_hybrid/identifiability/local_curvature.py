"""Measure derivatives of the tasks' losses at a point, and walk from it by Newton's method."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hybrid.errors import require_finite
from pyro_hybrid.scores.check import Interval, Threshold

__all__ = [
    "CURVED",
    "LocalCurvature",
    "Losses",
    "SmallestCurvature",
    "curvature_at",
    "jacobian_rows",
    "newton_optimum",
    "smallest_curvature",
]

Losses = Callable[[Tensor], Tensor]
CURVED = Threshold(holds=1e-7, fails=1e-9)  # smallest curvature, relative to the largest
DRAWS = 2000
CHUNK = 64
WEAKEST = 4


class LocalCurvature(NamedTuple):
    """Derivatives of each task's loss at a point, and the spectrum of the mean loss's Hessian.

    Attributes:
        at: the point, (P,).
        losses: of the tasks, (T,).
        gradients: of the tasks, (T, P).
        hessians: of the tasks, (T, P, P).
        eigenvalues, eigenvectors: of the mean Hessian, ascending, (P,) and in columns (P, P).
        scale: largest curvature, or one that counts as large where the tasks' curvatures cancel.
    """

    at: Tensor
    losses: Tensor
    gradients: Tensor
    hessians: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    scale: float

    @property
    def gradient(self) -> Tensor:
        """Gradient of the mean loss."""
        return self.gradients.mean(0)

    @property
    def gradient_size(self) -> float:
        """Root mean square over tasks of the gradients' lengths."""
        return _rms_length(self.gradients)

    @property
    def is_curved(self) -> Tensor:
        """True for directions that are not flat up to rounding."""
        return self.eigenvalues.abs() > CURVED.fails * self.scale

    def newton(self, gradient: Tensor, is_curved: Tensor) -> tuple[float, Tensor]:
        """Return the gain and the step of Newton's method in the curved directions, which may lead to a saddle."""
        slopes = (self.eigenvectors.T @ gradient)[is_curved]
        moves = slopes / self.eigenvalues[is_curved]
        gain = 0.5 * float((slopes * moves).abs().sum())
        return gain, -self.eigenvectors[:, is_curved] @ moves

    def walk_length(self, direction: Tensor) -> float:
        """Return how far to walk along a direction: a tenth of the parameters that take part in it."""
        return _walk_length(self.at, direction)


class SmallestCurvature(NamedTuple):
    """Smallest curvature of a mean loss, relative to its scale.

    Attributes:
        value: by derivatives.
        walked: from the loss some way off, the other parameters following; ``value`` where that has margin.
        interval: for other weights of the tasks, and as walked.
    """

    value: float
    walked: float
    interval: Interval


def curvature_at(losses: Losses, at: Tensor, *, progress: bool = True) -> LocalCurvature:
    """Measure the losses' first and second derivatives at a point.

    Arguments:
        losses: a function of parameters (P,) that returns each task's loss, (T,).
        at: the point, (P,).
        progress: show a progress bar if it takes longer than two seconds.
    """
    at = at.detach().requires_grad_()
    values = losses(at) + 0.0 * at.sum()  # a linear loss has a Hessian too: 0
    gradients = []
    hessians = []
    bar = tqdm(
        values.unbind(),
        desc="second derivatives",
        unit="task",
        delay=2.0,
        leave=False,
        disable=not progress,
    )
    for value in bar:
        (gradient,) = torch.autograd.grad(value, at, create_graph=True, retain_graph=True)
        rows = jacobian_rows(gradient + 0.0 * at, at)
        gradients.append(gradient.detach())
        hessians.append(0.5 * (rows + rows.T))
    by_task = torch.stack(hessians)
    require_finite("second derivatives of the losses", by_task)
    eigenvalues, eigenvectors = torch.linalg.eigh(by_task.mean(0))
    slopes = torch.stack(gradients)
    at = at.detach()
    largest_of_task = float(by_task.flatten(1).norm(dim=1).max())
    of_slopes = _rms_length(slopes) / _walk_length(at, eigenvectors[:, 0])
    # Where curvatures of the tasks cancel, only rounding is left of them: that is not a scale.
    scale = max(float(eigenvalues.abs().max()), 1e-3 * max(largest_of_task, of_slopes))
    return LocalCurvature(
        at=at,
        losses=values.detach(),
        gradients=slopes,
        hessians=by_task,
        eigenvalues=eigenvalues,
        eigenvectors=eigenvectors,
        scale=scale,
    )


def jacobian_rows(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Return the Jacobian (outputs, inputs), computed a chunk of rows at a time."""
    basis = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
    chunks = [
        torch.autograd.grad(outputs, inputs, rows, retain_graph=True, is_grads_batched=True)[0]
        for rows in basis.split(CHUNK)
    ]
    return torch.cat(chunks)


def newton_optimum(
    losses: Losses, point: LocalCurvature, start: Tensor, is_curved: Tensor
) -> Tensor:
    """Take Newton steps in the curved directions, with the point's curvature, while each halves the gain that is left."""
    best = start
    left = math.inf
    trial = start
    while True:
        trial = trial.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(losses(trial).mean(), trial)
        gain, step = point.newton(gradient, is_curved)
        if not gain < 0.5 * left:
            return best.detach()
        best = trial
        left = gain
        trial = trial + step


def smallest_curvature(
    losses: Losses, point: LocalCurvature, direction: Tensor
) -> SmallestCurvature:
    """Measure the smallest curvature by derivatives, and by walking along a direction.

    The interval includes curvature that the rest of the gradient could feign.
    """
    scale = max(point.scale, torch.finfo(torch.float64).tiny)
    length = point.walk_length(direction)
    value = float(point.eigenvalues[0]) / scale
    walked = value
    if value < CURVED.holds:
        walked = 2.0 * _rise(losses, point, length * direction) / (scale * length**2)
    rest = (point.eigenvectors.T @ point.gradient)[point.is_curved]
    rounding = len(direction) * torch.finfo(torch.float64).eps
    feigned = float(rest.norm()) / (scale * length) + rounding
    low, high = (bound / scale for bound in _reweighted_bounds(losses, point))
    interval = min(low, value) - feigned, max(high, value, walked) + feigned
    return SmallestCurvature(value, walked, interval)


def _rise(losses: Losses, point: LocalCurvature, move: Tensor) -> float:
    """Return the rise of the mean loss on the better side of a move, once the curved directions have followed it."""
    others = point.is_curved.clone()
    others[0] = False
    ends = [newton_optimum(losses, point, point.at + sign * move, others) for sign in (1.0, -1.0)]
    with torch.no_grad():
        values = torch.stack([losses(end).mean() for end in ends])
        return float(values.nan_to_num(math.inf).min() - point.losses.mean())


def _reweighted_bounds(losses: Losses, point: LocalCurvature) -> tuple[float, float]:
    """Return 95% bounds of the smallest curvature over random weights of the tasks, to first order.

    Each weighting has its own optimum. The lower bound is of the weakest direction of each weighting, the upper bound
    of the direction that is weakest now.
    """
    by_task = _weakest_curvatures(losses, point)
    number = point.hessians[0].numel()
    key = point.hessians.flatten(1) @ torch.arange(1.0, number + 1.0).to(by_task).sqrt()
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(DRAWS, len(by_task), generator=generator, dtype=torch.float64)
    weights = -uniform.log().to(by_task.device)
    weights = weights / weights.sum(1, keepdim=True)
    means = torch.einsum("wt,tij->wij", weights, by_task[key.argsort()])
    low = torch.linalg.eigvalsh(means)[:, 0].quantile(0.025)
    high = means[:, 0, 0].quantile(0.975)
    return float(low), float(high)


def _weakest_curvatures(losses: Losses, point: LocalCurvature) -> Tensor:
    """Return each task's contribution to the Hessian in its weakest directions, (task, direction, direction).

    A task contributes its own curvature, and the change of curvature where it moves the optimum to.
    """
    weakest = point.eigenvectors[:, :WEAKEST]
    at = point.at.detach().requires_grad_()
    loss = losses(at).mean() + 0.0 * at.pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, at, create_graph=True)
    products = [torch.autograd.grad(gradient @ v, at, create_graph=True)[0] for v in weakest.T]
    curvature = torch.stack(products) @ weakest
    bends = jacobian_rows(curvature.flatten(), at).view(*curvature.shape, -1)
    curved = point.eigenvectors[:, point.is_curved]
    moves = -(point.gradients @ curved / point.eigenvalues[point.is_curved]) @ curved.T
    own = weakest.T @ point.hessians @ weakest
    return own + torch.einsum("tp,ijp->tij", moves, bends)


def _rms_length(gradients: Tensor) -> float:
    return float(gradients.square().sum(1).mean().sqrt())


def _walk_length(at: Tensor, direction: Tensor) -> float:
    share = float(direction.abs() @ at.abs())
    typical = float(at.square().mean().sqrt()) or 1.0
    return 0.1 * (share if share > 1e-3 * typical else typical)
