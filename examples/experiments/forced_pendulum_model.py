"""A MetaHybridVAE for a pendulum that is pushed several times a second, and computed evidence for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyro_hybrid.beliefs.belief import Belief, Gaussian
from pyro_hybrid.beliefs.families import Family
from pyro_hybrid.data.segments import truncate
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.errors import fail
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.evidence.least_squares import LeastSquares
from pyro_hybrid.models import MetaHybridVAE
from pyro_hybrid.nets.correction import projection_penalty
from pyro_hybrid.nets.hybrid_field import Force
from pyro_hybrid.nets.residual import Residual
from pyro_hybrid.programs.run import Program
from pyro_hybrid.systems import ForcedPendulum

__all__ = ["Driven", "FromBeginnings", "Oscillation"]


class Oscillation(nn.Module):
    r"""A function of time: sine units, whose amplitudes and frequencies are linear in the latents.

    .. math:: u(t; z) = a \sum_k (c_k + C_k z) \sin((w_k + W_k z)\, t + b_k)

    Arguments:
        latents: number of them.
        units: number of sine units. They begin at half the highest frequency that the sampling can show.
        size: rough size a of the function.
        step: time between two observations.
    """

    def __init__(self, latents: int, units: int, size: float, step: float) -> None:
        super().__init__()
        self.size = size
        self.step = step
        self.amplitude = nn.Linear(latents, units)
        self.frequency = nn.Linear(latents, units)
        self.phase = nn.Parameter(torch.pi * (torch.arange(units) + 0.25) / units)
        with torch.no_grad():
            self.amplitude.bias.fill_(1.0 / units)
            self.frequency.bias.fill_(0.5 * torch.pi)
            self.frequency.weight.mul_(0.3)

    def given(self, latents: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function for latents (..., task, 1, latent), of times that broadcast with (..., task, shot)."""
        amplitude = self.size * self.amplitude(latents)
        frequency = self.frequency(latents) / self.step

        def function(t: Tensor) -> Tensor:
            return (amplitude * torch.sin(frequency * t.unsqueeze(-1) + self.phase)).sum(-1)

        return function


class Driven(MetaHybridVAE):
    r"""A MetaHybridVAE whose push depends on time alone, and whose friction depends on the state alone.

    .. math:: \ddot\theta = \omega^2 (u(t; z_N) - \sin\theta) + v(\theta, \dot\theta; z_N)

    If both could depend on everything, :math:`v = A\omega^2 \cos(2\pi\phi t)` would explain the data as well as
    :math:`u = A\cos(2\pi\phi t)`, and no latent would have to mean :math:`A`.

    Both are linear in the latents. A friction that is not may learn to depend on the square of a latent. It predicts
    as well, but a strong and a weak friction then have the same latent.

    The projection penalty applies to the friction alone. A push that doesn't depend on the angle can't do gravity's
    work, and is so much larger that chance correlations with gravity would hide those of the friction.

    Arguments:
        system: the pendulum.
        latents: number of neural latents; by default as many as the system has.
        correction: weight of the projection penalty.
        noise: where the learned noise starts, in units of the system's.
        substeps: number of solver steps between two observations.
        units: number of sine units of the push.
        size: rough size of the push.
    """

    def __init__(
        self,
        system: ForcedPendulum,
        *,
        latents: int | None = None,
        correction: float = 0.0,
        noise: float = 3.0,
        substeps: int = 1,
        units: int = 1,
        size: float = 20.0,
    ) -> None:
        super().__init__(
            system,
            latents=latents,
            linear=False,
            correction=correction,
            noise=noise,
            substeps=substeps,
        )
        num_latents = self.residual.latents
        scale = tuple(largest / 3.0 for largest in system.inputs[1:])
        self.residual = Residual(2, num_latents, 1, linear=True, width=16, depth=1, scale=scale)
        self.push = Oscillation(num_latents, units, size, system.step)

    def force(self, unknown: Tensor) -> Force:
        """Return push and friction of neural latents (..., task, component)."""
        push = self.push.given(unknown[..., None, :])
        friction = self.residual.given(unknown[..., None, :])
        return lambda t, angle, speed: (push(t), friction(angle, speed))

    def penalty(
        self, physics: dict[str, Tensor], unknown: Tensor, times: Tensor, states: Tensor
    ) -> Tensor:
        """Penalize the part of each task's friction that gravity could explain."""
        angles, speeds = states.detach().flatten(-3, -2).unbind(-1)
        angles = _shuffled(angles)
        speeds = _shuffled(speeds)
        friction = self.residual.given(unknown.detach()[..., None, :])(angles, speeds)
        weight = self.penalty_weights["projection"]
        return weight * projection_penalty(friction.unsqueeze(-1), [angles.sin().unsqueeze(-1)])


def _shuffled(values: Tensor) -> Tensor:
    return values.flatten()[torch.randperm(values.numel())].view_as(values)


@dataclass(frozen=True)
class FromBeginnings:
    """Evidence computed on the beginnings of trajectories first and then on more of them, for a fast oscillation.

    A short time gives the frequency roughly, and from any start. Each longer time refines it from there.

    Arguments:
        horizons: for each Gauss-Newton step on a beginning, the number of time intervals of that beginning.
        whole: evidence on the whole trajectories, which starts where the last beginning led.
    """

    horizons: tuple[int, ...]
    whole: GaussNewton = GaussNewton(2)

    @property
    def network(self) -> nn.Module | None:
        """None: nothing is learned."""
        return None

    @torch.no_grad()
    def __call__(
        self,
        belief: Belief,
        shots: Shots,
        program: Program | None,
        *,
        start: Belief | None = None,
        given: Shots | None = None,
    ) -> Belief:
        """Return the increment of the whole trajectories."""
        if program is None:
            fail("a program to linearize", "none", "Pass program=model.")
        last = shots.times.shape[-1] - 1
        shorter = (horizon for horizon in self.horizons if horizon < last)
        for horizon, repeats in itertools.groupby(shorter):
            beginning = LeastSquares(program, truncate(shots, horizon), belief)
            num_iterations = len(list(repeats))
            steps = replace(self.whole, num_iterations=num_iterations, num_restarts=0)
            iterate = steps.minimize(beginning, start)
            start = Gaussian.around(belief.families, iterate.task, 1.0)
        return self.whole(belief, shots, program, start=start, given=given)

    def bind(
        self, families: Mapping[str, Family], context: nn.Module | None = None
    ) -> FromBeginnings:
        """Return itself: the program says what its latents are."""
        return self
