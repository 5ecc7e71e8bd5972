"""Aliases: axes are always (task, shot, time, sensor), natural parameters (..., component, statistic)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor

if (
    TYPE_CHECKING
):  # Pyro's versions of torch's distributions are both of these, and no class of Pyro's says so
    from pyro.distributions import TorchDistribution as Stock
else:
    from torch.distributions import Distribution as Stock

Latent = Float[Tensor, "*batch component"]
Natural = Float[Tensor, "*batch component statistic"]
Times = Float[Tensor, "*clocks time"]
Trajectories = Float[Tensor, "*task shot time sensor"]
Mask = Bool[Tensor, "*task shot time sensor"]
State = Tensor | tuple[Tensor, ...]

__all__ = ["Latent", "Mask", "Natural", "State", "Stock", "Times", "Trajectories"]
