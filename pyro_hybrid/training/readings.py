"""What is inferred of systems while weights are trained: their latents, and the population that these make up."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hybrid.beliefs.belief import Belief, Gaussian
from pyro_hybrid.beliefs.quadratic import Quadratic
from pyro_hybrid.inference.prior import Prior

__all__ = ["FollowedPopulation", "Readings"]

RECENT = 25  # batches
MEMORY = 0.9  # share of what was inferred before that counts after one more batch


class FollowedPopulation:
    """The population of all systems as a joint Gaussian, which follows those inferred lately."""

    def __init__(self, prior: Prior) -> None:
        self.belief: Belief = prior.population()
        d = self.belief.size
        self.count = 0.0
        self.sum = torch.zeros(d, dtype=torch.float64)
        self.outer = torch.zeros(d, d, dtype=torch.float64)

    def follow(self, posterior: Gaussian, kept: Tensor) -> None:
        """Take in what was inferred of one more batch."""
        marginal = posterior.task_marginal
        mean, covariance = marginal.mean, marginal.covariance
        usable = kept & mean.isfinite().all(-1) & covariance.isfinite().flatten(1).all(-1)
        mean, covariance = mean[usable], covariance[usable]
        self.count = MEMORY * self.count + len(mean)
        self.sum = MEMORY * self.sum + mean.sum(0)
        self.outer = MEMORY * self.outer + (mean[:, :, None] * mean[:, None] + covariance).sum(0)
        d = len(self.sum)
        if self.count < 3 * d + 3:
            return
        center = self.sum / self.count
        spread = self.outer / self.count - torch.outer(center, center)
        precision = torch.linalg.inv(spread + 1e-9 * torch.diag(spread.diagonal()))
        factor = Quadratic.centered(center, precision)
        self.belief = Gaussian(self.belief.families, factor, posterior.dtype)


class Readings:
    """Moments of each task as it was last inferred, and when that was."""

    def __init__(self, num_tasks: int, prior: Prior) -> None:
        self.families = prior.population().families
        d = prior.population().size
        self.mean = torch.zeros(num_tasks, d)
        self.scale = torch.ones(num_tasks, d)
        self.age = torch.full((num_tasks,), RECENT + 1)

    def note(self, rows: Tensor, posterior: Gaussian) -> None:
        """Note what was inferred of some tasks; all others are one batch older."""
        mean, scale = posterior.moments()
        usable = (mean + scale).isfinite().all(-1)
        rows = rows[usable]
        self.age += 1
        self.mean[rows] = mean[usable].to(self.mean)
        self.scale[rows] = scale[usable].to(self.scale)
        self.age[rows] = 0

    def start(self, rows: Tensor) -> Belief | None:
        """Return a belief around what was inferred of these tasks before; None if it wasn't of all of them lately."""
        if bool((self.age[rows] > RECENT).any()):
            return None
        return Gaussian.around(self.families, self.mean[rows], 1.0)

    def unread(self, number: int) -> Tensor:
        """Return tasks that weren't inferred lately, so many that with the others there are ``number``."""
        old = (self.age > RECENT).nonzero().squeeze(1)
        missing = max(min(number, len(self.age)) - (len(self.age) - len(old)), 0)
        return old[torch.linspace(0, max(len(old) - 1, 0), missing).long()]

    def recent(self) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations of the tasks inferred lately."""
        recent = self.age <= RECENT
        return self.mean[recent], self.scale[recent]
