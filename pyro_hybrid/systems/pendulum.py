"""A pendulum with friction and a driving force; only gravity is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyro_hybrid.beliefs.families import LogNormal
from pyro_hybrid.dynamics.slopes import Field
from pyro_hybrid.nets.hybrid_field import Force
from pyro_hybrid.shapes import State
from pyro_hybrid.systems.system import System

__all__ = ["Pendulum"]


NAMES = ("angle", "speed")


class Pendulum(System):
    r"""Forced, damped pendulum.

    .. math:: \ddot\theta + \gamma \dot\theta + \omega^2 \sin\theta = A \cos(2\pi\phi t)

    Known: :math:`\ddot\theta + \omega^2 \sin\theta = 0`.
    The force is an angular acceleration ``force(t, angle, speed)``.

    Arguments:
        angles_only: observe the angle alone.
    """

    ranges = {
        "omega": (1.0, 3.0),
        "damping": (0.0, 0.8),
        "amplitude": (0.5, 2.0),
        "frequency": (0.2, 0.6),
        "angle": (-1.57, 1.57),
        "speed": (-0.5, 0.5),
    }
    physics = {"omega": LogNormal(1, loc=0.6, scale=0.4)}
    unknown = ("damping", "amplitude", "frequency")
    inputs = (0.5, 1.5, 2.0)
    periodic = True
    outputs = 1

    def __init__(self, angles_only: bool = False) -> None:
        self.step, self.angles_only = 0.1, angles_only
        self.noise = (0.01,) if angles_only else (0.01, 0.01)
        self.names = NAMES[: len(self.noise)]
        self.start_noise = (0.01, 2.0) if angles_only else (0.01, 0.01)

    def known(self, physics: Mapping[str, Tensor], force: Force) -> Field:
        rate = physics["omega"] ** 2

        def field(t: Tensor, state: State) -> State:
            angle, speed = state
            return speed, force(t, angle, speed) - rate * angle.sin()

        return field

    def truth(self, unknown: Tensor) -> Force:
        damping, amplitude, frequency = unknown.unbind(-1)
        return lambda t, angle, speed: (
            amplitude * torch.cos(2 * torch.pi * frequency * t) - damping * speed
        )

    def initial(self, draw: Callable[[str], Tensor]) -> State:
        return draw("angle"), draw("speed")

    def measured(self, values: Tensor) -> Tensor:
        if not self.angles_only:
            return values
        return torch.cat([values, torch.zeros_like(values)], -1)
