"""The literature's pendulum, pushed several times a second and seen by its angle alone; only gravity is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyro_hybrid.beliefs.families import LogNormal
from pyro_hybrid.dynamics.slopes import Field
from pyro_hybrid.nets.hybrid_field import Force
from pyro_hybrid.shapes import State
from pyro_hybrid.systems.system import System

__all__ = ["ForcedPendulum"]


class ForcedPendulum(System):
    r"""Damped pendulum under a fast force that is measured in units of gravity's.

    .. math:: \ddot\theta + \gamma \dot\theta + \omega^2 \sin\theta = A \omega^2 \cos(2\pi\phi t)

    Known: :math:`\ddot\theta = \omega^2 (u - \sin\theta) + v` without :math:`u` and :math:`v`. The force is the pair
    ``force(t, angle, speed)`` of a push :math:`u` in units of gravity's and an acceleration :math:`v`; in truth
    :math:`u = A \cos(2\pi\phi t)` and :math:`v = -\gamma\dot\theta`. A force that enters in one place and is blind to
    :math:`\omega` would have to mean :math:`A\omega^2` there, or :math:`\gamma / \omega^2`.

    Only the angle is observed, and the pendulum starts at rest. Its speed is known there and nowhere else, so that
    trajectories can't be cut: train with ``meta_train(..., curriculum={0.0: None})``.

    References:
        Physics-Integrated Variational Autoencoders for Robust and Interpretable Generative Modeling (Takeishi &
        Kalousis, 2021), https://arxiv.org/abs/2102.13156
    """

    ranges = {
        "omega": (0.785, 3.14),
        "damping": (0.0, 0.8),
        "amplitude": (0.0, 40.0),
        "frequency": (3.14, 6.28),
        "angle": (-1.57, 1.57),
    }
    physics = {"omega": LogNormal(1, loc=0.6, scale=0.4)}
    unknown = ("damping", "amplitude", "frequency")
    inputs = (0.05, 1.5, 10.0)
    periodic = True
    outputs = 2
    substeps = 4  # at 2, 3 and 4 the worst error of 60 tasks is 0.04, 0.007 and 0.002 of the noise; at 1 it is 0.6

    def __init__(self) -> None:
        self.step, self.noise, self.names = 0.05, (0.01,), ("angle",)
        self.start_noise = (0.01, 1e-3)

    def known(self, physics: Mapping[str, Tensor], force: Force) -> Field:
        rate = physics["omega"] ** 2

        def field(t: Tensor, state: State) -> State:
            angle, speed = state
            push, turn = force(t, angle, speed)
            return speed, rate * (push - angle.sin()) + turn

        return field

    def truth(self, unknown: Tensor) -> Force:
        damping, amplitude, frequency = unknown.unbind(-1)
        return lambda t, angle, speed: (
            amplitude * torch.cos(2 * torch.pi * frequency * t),
            -damping * speed,
        )

    def initial(self, draw: Callable[[str], Tensor]) -> State:
        angle = draw("angle")
        return angle, torch.zeros_like(angle)

    def measured(self, values: Tensor) -> Tensor:
        angle = values[..., :1]
        return torch.cat([angle, torch.zeros_like(angle)], -1)
