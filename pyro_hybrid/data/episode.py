"""Episode: the support that conditions the prior, and the query that a program explains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pyro
import torch
from torch import Tensor

from pyro_hybrid.beliefs.belief import Belief
from pyro_hybrid.data.shots import Shots

__all__ = ["Episode"]


@dataclass(frozen=True, eq=False)
class Episode:
    """Hold one batch of tasks: support shots, which condition the prior, and query shots, to be explained.

    Arguments:
        support: shots of the same tasks, or None for the population's prior.
        query: the shots that a program explains, or simulates if they have no values.
        belief: the belief about the tasks' latents given the support, if it was computed already.
        is_training: whether a program adds its penalties. :class:`~pyro_hybrid.SVI` sets it for gradient steps of a
            model in ``train()`` mode; for a plain Pyro ELBO, pass ``dataclasses.replace(episode, is_training=True)``.

    >>> import pyro_hybrid as ph
    >>> shots = ph.Shots.from_tensors(torch.arange(3.0), torch.zeros(5, 4, 3, 1), torch.zeros(5, 4, 1))
    >>> ph.Episode(None, shots).plate.size
    5
    """

    support: Shots | None
    query: Shots
    belief: Belief | None = None
    is_training: bool = False

    @property
    def plate(self) -> pyro.plate:
        """The plate of independent tasks: ``with episode.plate: ...``."""
        return pyro.plate("task", self.query.shape[0], dim=-1)

    def map_shots(self, change: Callable[[Shots], Shots]) -> Episode:
        """Apply ``change`` to support and query, and drop the belief, which no longer fits them."""
        support = self.support and change(self.support)
        return Episode(support, change(self.query), is_training=self.is_training)

    def select_tasks(self, rows: int | Tensor) -> Episode:
        """Select one task, or several by index."""
        return self.map_shots(lambda shots: shots.select_tasks(rows))

    def to(self, device: torch.device | str) -> Episode:
        """Move all tensors to a device."""
        return self.map_shots(lambda shots: shots.to(device))

    def double(self) -> Episode:
        """Convert all numbers to float64."""
        return self.map_shots(lambda shots: shots.double())

    def simulation(self) -> Episode:
        """Remove the values of the query, so that a program simulates them; a simulation is no step of a training."""
        return replace(self, query=self.query.simulation(), is_training=False)
