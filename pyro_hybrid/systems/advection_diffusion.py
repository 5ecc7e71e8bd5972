"""Heat that diffuses and is carried along; only the diffusion is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyro_hybrid.beliefs.families import LogNormal
from pyro_hybrid.dynamics.slopes import Field
from pyro_hybrid.errors import fail
from pyro_hybrid.nets.hybrid_field import Force
from pyro_hybrid.shapes import State
from pyro_hybrid.systems.system import System

__all__ = ["AdvectionDiffusion"]


class AdvectionDiffusion(System):
    r"""Advection and diffusion of a temperature on a rod whose ends are held at zero.

    .. math:: T_t = a\, T_{ss} - b\, T_s, \qquad T(s, 0) = m \sin(\pi s / s_{\max})

    Known: :math:`T_t = a\, T_{ss}`. The force is a rate of warming ``force(temperature, slope)`` at each inner point.
    The field is a tensor ``(..., task, shot, point)``; its ends stay where they are.
    """

    ranges = {"diffusion": (0.01, 0.1), "advection": (0.01, 0.1), "height": (0.5, 1.5)}
    physics = {"diffusion": LogNormal(1, loc=-3.0, scale=0.6)}
    unknown = ("advection",)
    inputs = (1.0, 1.0)
    outputs = 1
    grid = True
    width = 0.1

    def __init__(self, size: int = 20) -> None:
        self.step, self.size = 0.02, size
        self.noise = (1e-3,) * size
        self.names = tuple(f"point {i}" for i in range(size))
        self.start_noise = self.noise

    def known(self, physics: Mapping[str, Tensor], force: Force) -> Field:
        rate = physics["diffusion"].unsqueeze(-1) / self.width**2

        def field(t: Tensor, state: State) -> State:
            if not isinstance(state, Tensor):
                fail("one tensor of temperatures", type(state).__name__, "Pass the grid as it is.")
            left, here, right = state[..., :-2], state[..., 1:-1], state[..., 2:]
            warming = rate * (left - 2.0 * here + right) + force(
                here, (right - left) / (2.0 * self.width)
            )
            return torch.nn.functional.pad(warming, (1, 1))

        return field

    def truth(self, unknown: Tensor) -> Force:
        speed = unknown  # (..., task, 1, 1): one more axis than a shot's, for the points
        return lambda temperature, slope: -speed * slope

    def initial(self, draw: Callable[[str], Tensor]) -> State:
        place = torch.linspace(0.0, 1.0, self.size, dtype=torch.float64)
        return draw("height").unsqueeze(-1) * torch.sin(torch.pi * place)
