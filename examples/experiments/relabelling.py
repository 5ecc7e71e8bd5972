"""Grouping of unlabelled trajectories by system, with a program that is trained in turns with it."""

from __future__ import annotations

from dataclasses import replace

import pyro
import torch
from torch import Tensor

from experiments.grouping import concentration, group, misfit
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import fail
from pyro_hybrid.models import MetaHybridVAE
from pyro_hybrid.systems import System

__all__ = ["Unpaired", "dependence", "groups_in", "infer_latents", "pairs", "sets"]

MISFIT = 0.05  # error of a trajectory's latents beyond their sd, in units of the population, before it is estimated
REPEATS = 3
SMALLEST_BATCH = 4  # the estimate of dependence divides by n - 3


class Unpaired(MetaHybridVAE):
    r"""A MetaHybridVAE for single trajectories, which penalizes latents that depend on the initial state.

    A single trajectory is explained as well by any function of the system and of its initial state. A latent of the
    system alone is independent of the initial state, and ``independence`` is the weight of that.

    Arguments:
        system: gives the known equations and where the neural force enters.
        independence: weight of :func:`dependence` between a task's latents and the initial states of its support.
        linear, straightness, noise: see :class:`~pyro_hybrid.models.MetaHybridVAE`.
    """

    def __init__(
        self,
        system: System,
        independence: float = 0.0,
        *,
        linear: bool = True,
        straightness: float = 0.0,
        noise: float = 3.0,
    ) -> None:
        super().__init__(system, linear=linear, straightness=straightness, noise=noise)
        self.independence = independence

    def forward(self, episode: Episode) -> Tensor:
        """Add the penalty to the program while it is trained."""
        observation = super().forward(episode)
        if episode.is_training and self.independence:
            self._penalize_dependence(episode)
        return observation

    def _penalize_dependence(self, episode: Episode) -> None:
        support = episode.support
        if support is None or support.shape[0] < SMALLEST_BATCH:
            return
        means, _ = episode.belief.moments()
        latents = (means - means.mean(0)) / means.std(0).clamp(min=1e-6)
        initial = (support.whole or support).measured_initial.mean(1)
        penalty = len(latents) * dependence(latents, initial)
        pyro.factor("independence", -self.independence * penalty)


def dependence(x: Tensor, y: Tensor) -> Tensor:
    r"""Measure the dependence of two vectors from samples (n, d) and (n, e): 1 if equal, 0 on average if independent.

    .. math:: \frac{\mathrm{HSIC}(x, y)}{\sqrt{\mathrm{HSIC}(x, x)\, \mathrm{HSIC}(y, y)}}

    with Gaussian kernels and the unbiased estimate.

    References:
        Feature Selection via Dependence Maximization (Song et al., 2012), https://jmlr.org/papers/v13/song12a.html
        Similarity of Neural Network Representations Revisited (Kornblith et al., 2019), https://arxiv.org/abs/1905.00414
    """
    one = _kernel(x)
    other = _kernel(y)
    return _hsic(one, other) / (_hsic(one, one) * _hsic(other, other)).sqrt()


def _kernel(x: Tensor) -> Tensor:
    """Evaluate a Gaussian kernel at all pairs of different samples; zero on the diagonal."""
    distance = torch.cdist(x, x).square()
    off_diagonal = 1.0 - torch.eye(len(x), dtype=x.dtype, device=x.device)
    return (-distance / distance.detach().mean()).exp() * off_diagonal


def _hsic(one: Tensor, other: Tensor) -> Tensor:
    """Estimate the Hilbert-Schmidt independence criterion of two kernel matrices without bias."""
    n = len(one)
    product_of_sums = one.sum() * other.sum() / ((n - 1) * (n - 2))
    sum_of_products = 2.0 / (n - 2) * (one.sum(0) @ other.sum(0))
    total = (one * other).sum() + product_of_sums - sum_of_products
    return total / (n * (n - 3))


def pairs(heap: Tasks, labels: Tensor, loners: bool = True) -> Tasks:
    """Make a task of each trajectory: itself and the next one of its group, or itself twice if it is alone.

    Arguments:
        heap: tasks of one shot.
        labels: the group of each trajectory, (task,).
        loners: whether to keep trajectories that are alone if others are not.
    """
    order, first, sizes = _sorted_by_group(labels)
    next_place = first + (torch.arange(len(order)) - first + 1) % sizes
    rows = torch.stack([order, order[next_place]], 1)
    has_partner = sizes > 1
    if not loners and has_partner.any():
        rows = rows[has_partner]
    return _join_shots(heap, rows, 1)


def sets(heap: Tasks, labels: Tensor, num_shots: int) -> Tasks:
    """Make a task of each group of two or more, dealt to support and query in turn.

    Small groups are filled up with shots that aren't scored. Trajectories that are alone are left out, if others are
    not alone.

    Arguments:
        heap: tasks of one shot.
        labels: the group of each trajectory, (task,).
        num_shots: number of shots of each new task.
    """
    order, first, sizes = _sorted_by_group(labels)
    is_large = (sizes > 1) | (sizes == 1).all()
    heads = (torch.arange(len(order)) == first) & is_large
    member = torch.cat([torch.arange(0, num_shots, 2), torch.arange(1, num_shots, 2)])
    place = first[heads].unsqueeze(1)
    size = sizes[heads].unsqueeze(1)
    rows = order[place + member % size]
    return _join_shots(heap, rows, (num_shots + 1) // 2, member < size)


def _sorted_by_group(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort trajectories by group, in random order inside a group.

    Returns:
        The order, and for each place in it where its group begins and the size of its group.
    """
    order = torch.randperm(len(labels))
    order = order[labels[order].argsort(stable=True)]
    groups = labels[order].unique_consecutive(return_inverse=True)[1]
    sizes = torch.bincount(groups)
    starts = sizes.cumsum(0) - sizes
    return order, starts[groups], sizes[groups]


def _join_shots(heap: Tasks, rows: Tensor, num_support: int, scored: Tensor | None = None) -> Tasks:
    """Make tasks of the trajectories in ``rows`` (task, shot), of which those in ``scored`` count."""
    states = heap.initial if heap.states is None else heap.states
    if states is None:
        fail("trajectories with measured initial states", "none", "Pass initial= with the data.")
    tasks = Tasks.from_trajectories(
        heap.times,
        heap.values[rows, 0],
        num_support=num_support,
        initial=states[rows, 0],
    )
    if scored is None:
        return tasks
    return replace(tasks, scored=tasks.scored & scored[..., None, None])


@torch.no_grad()
def infer_latents(
    model: MetaHybridVAE, heap: Tasks, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """Infer latents from each trajectory alone: means (n, d) in units of the population, and covariances."""
    means = []
    covariances = []
    for start in range(0, len(heap), batch_size):
        shots = heap[start : start + batch_size].shots(slice(0, 1))
        marginal = model.prior.belief(shots, model).gaussian().task_marginal
        means.append(marginal.mean)
        covariances.append(marginal.covariance)
    location = torch.cat(means)
    whiten = torch.linalg.inv(torch.linalg.cholesky(torch.cov(location.T)))
    return (location - location.mean(0)) @ whiten.T, whiten @ torch.cat(covariances) @ whiten.T


def groups_in(model: MetaHybridVAE, heap: Tasks) -> Tensor:
    """Label trajectories from the latents of each: cluster them, estimate the misfit, and repeat."""
    location, covariance = infer_latents(model, heap)
    extra = MISFIT**2 * torch.eye(location.shape[1], dtype=location.dtype)
    labels = torch.arange(len(heap))
    alpha = len(heap) / 8.0
    for _ in range(REPEATS):
        labels = group(location, covariance, extra, alpha)
        if len(labels.unique()) == len(labels):
            break
        extra = misfit(location, covariance, labels, extra)
        alpha = concentration(labels)
    return labels
