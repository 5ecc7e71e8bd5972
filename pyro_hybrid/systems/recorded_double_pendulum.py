"""The real double pendulum as a system: two point masses without friction are known, the rest is to be found out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn

import torch
from torch import Tensor

from pyro_hybrid.beliefs.families import LogNormal
from pyro_hybrid.dynamics.slopes import Field
from pyro_hybrid.errors import fail
from pyro_hybrid.nets.hybrid_field import Force
from pyro_hybrid.shapes import State
from pyro_hybrid.systems.compound_pendulum import RODS
from pyro_hybrid.systems.system import System

__all__ = ["RecordedDoublePendulum"]


class RecordedDoublePendulum(System):
    r"""Two point masses on arms of known lengths, and torques that nobody has an equation for.

    .. math::
        \ddot\theta_1 + \beta\cos\Delta\,\ddot\theta_2 + \beta\sin\Delta\,\dot\theta_2^2 + G \sin\theta_1
            &= G u_1 - d_1\dot\theta_1 + \alpha d_2(\dot\theta_2 - \dot\theta_1) \\
        \beta\cos\Delta\,\ddot\theta_1 + \alpha\ddot\theta_2 - \beta\sin\Delta\,\dot\theta_1^2 + \beta G \sin\theta_2
            &= \alpha G u_2 - \alpha d_2(\dot\theta_2 - \dot\theta_1)

    with :math:`G = g/l_1`, :math:`\beta = \mu\,l_2/l_1` and :math:`\alpha = \beta\,l_2/l_1` for the lower mass's
    share :math:`\mu`. Known: :math:`u = d = 0`. Any torque is the sum of one that is the same when time runs backwards,
    and of one that isn't. The force is ``force(...)`` of what :meth:`felt` lists: the former, :math:`u_1, u_2`, in
    units of gravity's, and the rates :math:`d_1, d_2` at which the latter damps both joints, per second; all of them
    divided by ``UNITS``. What is felt has no units either. So the pendulum by a clock twice as fast has the same
    :math:`u`, as it must, and only what is said about friction needs a latent: by that clock its :math:`d` is doubled.

    There is no simulator of a real pendulum: take tasks from :class:`Recordings`.

    Arguments:
        share: the lower mass's share of both, one of the constants that all tasks have in common.
    """

    ranges = {
        "gravity": (34.0, 137.0),
        "scale": (0.7, 1.4),
    }  # the real one's is about 70, and goes with the square
    physics = {"gravity": LogNormal(1, loc=4.3, scale=0.4)}
    unknown = ("scale",)
    inputs = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 2.0, 6.0)
    outputs = 4
    UNITS = (
        0.02,
        0.02,
        0.1,
        0.1,
    )  # of the torques in gravity's, and of the rates of damping per second

    def __init__(self, share: float = 0.138) -> None:
        self.share = share
        self.step, self.noise, self.names = 0.01, (0.001, 0.001), ("upper angle", "lower angle")
        self.start_noise = (0.001, 0.001, 0.08, 0.08)

    def known(self, physics: Mapping[str, Tensor], force: Force) -> Field:
        gravity, alpha = physics["gravity"], self.share * RODS**2

        def field(t: Tensor, state: State) -> State:
            upper, lower, speed1, speed2 = state
            free1, free2 = free = self._free(gravity, state)
            found = force(*self.felt(gravity, state, free))
            one, two, rate1, rate2 = (unit * x for unit, x in zip(self.UNITS, found, strict=True))
            friction = alpha * rate2 * (speed2 - speed1)
            turn1, turn2 = self._turned(
                upper - lower,
                gravity * one - rate1 * speed1 + friction,
                alpha * gravity * two - friction,
            )
            return speed1, speed2, free1 + turn1, free2 + turn2

        return field

    def felt(
        self, gravity: Tensor, state: State, free: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """What the unknown torques may depend on: angles, accelerations without them, products of speeds.

        In units of the pendulum's own, and the same when time runs backwards. Accelerations, because an arm whose
        inertia isn't that of a point mass needs a torque in proportion to them.
        """
        upper, lower, speed1, speed2 = state
        bend, (free1, free2) = upper - lower, free or self._free(gravity, state)
        return (
            upper.sin(),
            upper.cos(),
            lower.sin(),
            lower.cos(),
            bend.sin(),
            bend.cos(),
            free1 / gravity,
            free2 / gravity,
            speed1.square() / gravity,
            speed1 * speed2 / gravity,
            speed2.square() / gravity,
        )

    def _free(self, gravity: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Accelerations of the point masses."""
        upper, lower, speed1, speed2 = state
        beta, sin = self.share * RODS, (upper - lower).sin()
        return self._turned(
            upper - lower,
            -beta * sin * speed2.square() - gravity * upper.sin(),
            beta * (sin * speed1.square() - gravity * lower.sin()),
        )

    def _turned(self, bend: Tensor, torque1: Tensor, torque2: Tensor) -> tuple[Tensor, Tensor]:
        """Torques on the arms to their accelerations."""
        alpha, cross = self.share * RODS**2, self.share * RODS * bend.cos()
        inertia = alpha - cross.square()
        return (alpha * torque1 - cross * torque2) / inertia, (torque2 - cross * torque1) / inertia

    def truth(self, unknown: Tensor) -> NoReturn:
        """Nobody knows it."""
        fail(
            "a system whose torques are known",
            "a real pendulum",
            "Judge the latents by Tasks.true_latents: tasks made from recordings know how fast their clocks run.",
            NotImplementedError,
        )

    def initial(self, draw: Callable[[str], Tensor]) -> NoReturn:
        """Nature draws these."""
        fail(
            "a system that can be simulated",
            "a real pendulum",
            "Make tasks with Recordings.tasks(...).",
            NotImplementedError,
        )

    def measured(self, values: Tensor) -> Tensor:
        return torch.cat([values, torch.zeros_like(values)], -1)
