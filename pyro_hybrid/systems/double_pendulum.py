"""Two point masses on two rods with friction in the joints; the frictionless equations are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyro_hybrid.beliefs.families import LogNormal
from pyro_hybrid.dynamics.slopes import Field
from pyro_hybrid.nets.hybrid_field import Force
from pyro_hybrid.shapes import State
from pyro_hybrid.systems.system import System

__all__ = ["DoublePendulum"]


NAMES = ("upper angle", "lower angle", "upper speed", "lower speed")


class DoublePendulum(System):
    r"""Double pendulum of equal rods, in units of the upper mass and the rod's length.

    .. math::
        (1+\mu)\ddot\theta_1 + \mu\cos\Delta\,\ddot\theta_2 + \mu\sin\Delta\,\dot\theta_2^2
            + (1+\mu) G \sin\theta_1 &= u_1 - u_2 \\
        \mu\cos\Delta\,\ddot\theta_1 + \mu\ddot\theta_2 - \mu\sin\Delta\,\dot\theta_1^2 + \mu G \sin\theta_2 &= u_2

    with :math:`G = g/l_1`, :math:`\mu = m_2/m_1`, :math:`\Delta = \theta_1 - \theta_2`. Known: no torque in a joint.
    The force is the pair of joint torques ``force(bend1, bend2, rate1, rate2)`` of the joints' own angles and rates
    (:math:`\theta_1, \theta_2 - \theta_1` and their derivatives); in truth :math:`u_i = -\gamma_i \cdot rate_i`.

    Arguments:
        angles_only: observe the two angles alone.
    """

    ranges = {
        "gravity": (6.0, 14.0),
        "ratio": (0.5, 2.0),
        "upper": (0.0, 0.8),
        "lower": (0.0, 0.8),
        "angle": (-1.2, 1.2),
        "speed": (-0.5, 0.5),
    }
    physics = {
        "gravity": LogNormal(1, loc=2.3, scale=0.3),
        "ratio": LogNormal(1, loc=0.0, scale=0.5),
    }
    unknown = ("upper", "lower")
    inputs = (1.0, 1.5, 3.0, 6.0)
    outputs = 2

    def __init__(self, angles_only: bool = False) -> None:
        self.step = 0.05
        self.noise = (0.01, 0.01) if angles_only else (0.01, 0.01, 0.05, 0.05)
        self.names = NAMES[: len(self.noise)]
        self.start_noise = (0.01, 0.01, 4.0, 4.0) if angles_only else self.noise

    def known(self, physics: Mapping[str, Tensor], force: Force) -> Field:
        gravity, ratio = physics["gravity"], physics["ratio"]
        total, pull = 1.0 + ratio, gravity * (1.0 + ratio)

        def field(t: Tensor, state: State) -> State:
            upper, lower, speed1, speed2 = state
            bend = lower - upper
            sin, cos = bend.sin(), bend.cos()
            torque1, torque2 = force(upper, bend, speed1, speed2 - speed1)
            push1 = torque1 - torque2 + ratio * sin * speed2.square() - pull * upper.sin()
            push2 = torque2 / ratio - sin * speed1.square() - gravity * lower.sin()
            turn1 = (push1 - ratio * cos * push2) / (total - ratio * cos.square())
            return speed1, speed2, turn1, push2 - cos * turn1

        return field

    def truth(self, unknown: Tensor) -> Force:
        upper, lower = unknown.unbind(-1)
        return lambda bend1, bend2, rate1, rate2: (-upper * rate1, -lower * rate2)

    def initial(self, draw: Callable[[str], Tensor]) -> State:
        return draw("angle"), draw("angle"), draw("speed"), draw("speed")

    def measured(self, values: Tensor) -> Tensor:
        if self.sensors > 2:
            return values
        return torch.cat([values, torch.zeros_like(values)], -1)
