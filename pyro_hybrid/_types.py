"""Shape aliases: axes are always (task, shot, time, sensor), natural parameters (..., component, statistic)."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

Latent = Float[Tensor, "*batch component"]
Natural = Float[Tensor, "*batch component statistic"]
Times = Float[Tensor, "*shot time"]
Trajectories = Float[Tensor, "*task shot time sensor"]
Mask = Bool[Tensor, "*task shot time sensor"]
State = Tensor | tuple[Tensor, ...]

__all__ = ["Latent", "Mask", "Natural", "State", "Times", "Trajectories"]
