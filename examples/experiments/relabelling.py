"""Grouping of unlabelled trajectories by system, with a program that is trained in turns with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor

from experiments.grouping import concentration, group, misfit
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.models import MetaHybridVAE
from pyro_hybrid.systems import System

__all__ = ["Unpaired", "dependence", "groups_in", "pairs", "read", "sets"]

MISFIT = 0.05  # error of a trajectory's latents beyond their sd, in units of the population, before it is estimated
REPEATS = 3


class Unpaired(MetaHybridVAE):
    r"""A MetaHybridVAE for single trajectories, which penalizes latents that depend on the initial state.

    A single trajectory is explained as well by any function of the system and of its initial state. A latent of the
    system alone is independent of the initial state, and ``independence`` is the weight of that.

    Arguments:
        independence: weight of :func:`dependence` between a task's latents and the initial states of its support.
    """

    def __init__(self, system: System, independence: float = 0.0, **options: Any) -> None:
        super().__init__(system, **options)
        self.independence = independence

    def forward(self, episode: Episode) -> Tensor:
        x = super().forward(episode)
        support = episode.support and (episode.support.whole or episode.support)
        if (
            self.training
            and torch.is_grad_enabled()
            and self.independence
            and support
            and support.shape[0] > 3
        ):
            natural = self.prior.natural(episode.support)
            believed = torch.cat(
                [self.prior.sites[name].gaussian(natural[name])[0] for name in natural], -1
            )
            z = (believed - believed.mean(0)) / believed.std(0).clamp(min=1e-6)
            pyro.factor(
                "independence",
                -self.independence * len(z) * dependence(z, support.initial.mean(1)),
            )
        return x


def dependence(x: Tensor, y: Tensor) -> Tensor:
    r"""Measure the dependence of two vectors from samples (n, d) and (n, e): 1 if equal, 0 on average if independent.

    .. math:: \frac{\mathrm{HSIC}(x, y)}{\sqrt{\mathrm{HSIC}(x, x)\, \mathrm{HSIC}(y, y)}}

    with Gaussian kernels and the unbiased estimate.

    References:
        Feature Selection via Dependence Maximization (Song et al., 2012), https://jmlr.org/papers/v13/song12a.html
        Similarity of Neural Network Representations Revisited (Kornblith et al., 2019), https://arxiv.org/abs/1905.00414
    """
    one, other = _kernel(x), _kernel(y)
    return _hsic(one, other) / (_hsic(one, one) * _hsic(other, other)).sqrt()


def _kernel(x: Tensor) -> Tensor:
    apart = torch.cdist(x, x).square()
    return (-apart / apart.detach().mean()).exp() * (
        1.0 - torch.eye(len(x), dtype=x.dtype, device=x.device)
    )


def _hsic(one: Tensor, other: Tensor) -> Tensor:
    n = len(one)
    sums = one.sum() * other.sum() / ((n - 1) * (n - 2)) - 2.0 / (n - 2) * (
        one.sum(0) @ other.sum(0)
    )
    return ((one * other).sum() + sums) / (n * (n - 3))


def pairs(heap: Tasks, labels: Tensor, loners: bool = True) -> Tasks:
    """Make a task of each trajectory: itself and the next one of its group, or itself again where it is alone.

    ``heap`` has one shot a task, and ``labels`` (task,) number the groups. ``loners=False`` omits trajectories that
    are alone, if there are others.
    """
    order, first, sizes = _dealt(labels)
    after = first + (torch.arange(len(order)) - first + 1) % sizes
    rows = torch.stack([order, order[after]], 1)
    return _together(heap, rows if loners or not (sizes > 1).any() else rows[sizes > 1], 1)


def sets(heap: Tasks, labels: Tensor, shots: int) -> Tasks:
    """Make a task of each group, with its trajectories dealt to support and query in turn.

    Missing shots of small groups are masked. Trajectories that are alone are omitted, if there are others.
    """
    order, first, sizes = _dealt(labels)
    heads = (torch.arange(len(order)) == first) & ((sizes > 1) | (sizes == 1).all())
    member = torch.cat([torch.arange(0, shots, 2), torch.arange(1, shots, 2)])
    place, size = first[heads].unsqueeze(1), sizes[heads].unsqueeze(1)
    return _together(heap, order[place + member % size], (shots + 1) // 2, member < size)


def _dealt(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order trajectories by group, randomly within it; return the order, and each one's group's start and size."""
    order = torch.randperm(len(labels))
    order = order[labels[order].argsort(stable=True)]
    labels = labels[order].unique_consecutive(return_inverse=True)[1]
    sizes = torch.bincount(labels)
    return order, (sizes.cumsum(0) - sizes)[labels], sizes[labels]


def _together(heap: Tasks, rows: Tensor, num_support: int, counts: Tensor | None = None) -> Tasks:
    states = heap.initial if heap.states is None else heap.states
    assert states is not None
    made = Tasks.from_trajectories(
        heap.times,
        heap.values[rows, 0],
        num_support=num_support,
        initial=states[rows, 0],
    )
    if counts is None:
        return made
    return replace(made, scored=made.scored & counts[..., None, None])


@torch.no_grad()
def read(model: MetaHybridVAE, heap: Tasks, size: int = 500) -> tuple[Tensor, Tensor]:
    """Infer latents from each trajectory alone: means (n, d) in units of the population, and covariances."""
    found = [
        model.prior.gaussian(heap[start : start + size].shots(slice(0, 1)))
        for start in range(0, len(heap), size)
    ]
    location, precision = (torch.cat(parts).double() for parts in zip(*found, strict=True))
    white = torch.linalg.inv(torch.linalg.cholesky(torch.cov(location.T)))
    return (location - location.mean(0)) @ white.T, white @ torch.linalg.inv(precision) @ white.T


def groups_in(model: MetaHybridVAE, heap: Tasks) -> Tensor:
    """Label trajectories from the latents of each: cluster them, estimate the misfit, and repeat."""
    location, covariance = read(model, heap)
    extra = MISFIT**2 * torch.eye(location.shape[1], dtype=location.dtype)
    labels, alpha = torch.arange(len(heap)), len(heap) / 8.0
    for _ in range(REPEATS):
        labels = group(location, covariance, extra, alpha)
        if len(labels.unique()) == len(labels):
            break
        extra, alpha = misfit(location, covariance, labels, extra), concentration(labels)
    return labels
