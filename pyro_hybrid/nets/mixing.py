"""Mixing: from states to sensors where the instrument is unknown."""

from __future__ import annotations

from torch import Tensor, nn

from pyro_hybrid.errors import require

__all__ = ["Mixing"]


class Mixing(nn.Module):
    r"""Map states to sensors if the instrument is unknown: :math:`g(y) = y W + b + \tanh(y U + c) V`.

    Arguments:
        components: number of state components.
        sensors: number of observed quantities.
        width: size of the nonlinear part; 0 for a linear instrument.
    """

    def __init__(self, components: int, sensors: int, width: int = 0) -> None:
        super().__init__()
        require(
            min(components, sensors) >= 1 and width >= 0,
            "1 or more components and sensors, a width of 0 or more",
            (components, sensors, width),
            "Pass the numbers of state components and of observed quantities.",
        )
        self.components = components
        self.straight = nn.Linear(components, sensors)
        self.bent: nn.Sequential | None = None
        if width:
            inner = nn.Linear(components, width)
            self.bent = nn.Sequential(inner, nn.Tanh(), nn.Linear(width, sensors, bias=False))

    def forward(self, states: Tensor) -> Tensor:
        """Map states ``(..., component)`` to sensors ``(..., sensor)``."""
        require(
            states.shape[-1] == self.components,
            f"{self.components} components in the last axis",
            tuple(states.shape),
            "Build the Mixing with as many components as the state has.",
        )
        sensors: Tensor = self.straight(states)
        return sensors if self.bent is None else sensors + self.bent(states)
