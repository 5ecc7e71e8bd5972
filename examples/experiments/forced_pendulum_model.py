"""A MetaHybridVAE for a pendulum that is pushed several times a second, and the evidence computed for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hybrid.beliefs.belief import Belief
from pyro_hybrid.data.segments import truncate
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.evidence.least_squares import LeastSquares
from pyro_hybrid.models import MetaHybridVAE
from pyro_hybrid.nets.correction import projection_penalty
from pyro_hybrid.nets.hybrid_field import Force
from pyro_hybrid.nets.residual import Residual
from pyro_hybrid.systems import ForcedPendulum

__all__ = ["Driven", "Growing", "Oscillation"]


class Oscillation(nn.Module):
    r"""A sum of sine units, whose amplitudes and frequencies are linear in the latents.

    .. math:: u(t; z) = a \sum_k (c_k + C_k z) \sin((w_k + W_k z)\, t + b_k)

    Arguments:
        latents: number of them.
        units: number of sine units. They begin at half the highest frequency that the sampling can show.
        size: rough size a of the function.
        step: time between two observations.
    """

    def __init__(self, latents: int, units: int, size: float, step: float) -> None:
        super().__init__()
        self.size, self.step = size, step
        self.amplitude, self.frequency = nn.Linear(latents, units), nn.Linear(latents, units)
        self.phase = nn.Parameter(torch.pi * (torch.arange(units) + 0.25) / units)
        with torch.no_grad():
            self.amplitude.bias.fill_(1.0 / units)
            self.frequency.bias.fill_(0.5 * torch.pi)
            self.frequency.weight.mul_(0.3)

    def given(self, latents: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function of time, given latents (..., task, 1, latent); times broadcast with (..., task, shot)."""
        amplitude, frequency = (
            self.size * self.amplitude(latents),
            self.frequency(latents) / self.step,
        )

        def function(t: Tensor) -> Tensor:
            return (amplitude * torch.sin(frequency * t.unsqueeze(-1) + self.phase)).sum(-1)

        return function


class Driven(MetaHybridVAE):
    r"""A MetaHybridVAE whose push depends on time alone, and whose friction on the state alone.

    .. math:: \ddot\theta = \omega^2 (u(t; z_N) - \sin\theta) + v(\theta, \dot\theta; z_N)

    If both could depend on everything, :math:`v = A\omega^2 \cos(2\pi\phi t)` would explain the data as well as
    :math:`u = A\cos(2\pi\phi t)`, and no latent would need to mean :math:`A`.

    Both are linear in the latents. A nonlinear friction may learn to depend on the square of one: it predicts as well,
    but gives a strong and a weak friction the same latent.

    The projection onto gravity is penalized for the friction alone. A push that doesn't depend on the angle can't
    replace gravity, and is so much larger that chance correlations with it would hide those of the friction.

    Arguments:
        units: number of sine units of the push.
        size: rough size of the push.
    """

    def __init__(
        self,
        system: ForcedPendulum,
        evidence: GaussNewton | None = None,
        *,
        units: int = 1,
        size: float = 20.0,
        **options: Any,
    ) -> None:
        super().__init__(system, evidence, linear=False, **options)
        latents, typical = self.residual.latents, tuple(most / 3.0 for most in system.inputs[1:])
        self.residual = Residual(2, latents, 1, linear=True, width=16, depth=1, scale=typical)
        self.push = Oscillation(latents, units, size, system.step)

    def force(self, unknown: Tensor) -> Force:
        push, friction = (
            self.push.given(unknown[..., None, :]),
            self.residual.given(unknown[..., None, :]),
        )
        return lambda t, angle, speed: (push(t), friction(angle, speed))

    def penalty(
        self, physics: dict[str, Tensor], unknown: Tensor, times: Tensor, states: Tensor
    ) -> Tensor:
        angle, speed = (
            x.flatten()[torch.randperm(x.numel())].view_as(x)
            for x in states.detach().flatten(-3, -2).unbind(-1)
        )
        friction: Any = self.residual.given(unknown.detach()[..., None, :])(angle, speed)
        return self.penalty_weights["projection"] * projection_penalty(
            friction.unsqueeze(-1), [angle.sin().unsqueeze(-1)]
        )


class Growing(GaussNewton):
    """Evidence computed for a fast oscillation: from the beginnings of trajectories first, then from more of them.

    A short time gives the frequency roughly, and from any start; each longer time refines it from there.

    Arguments:
        iterations: Gauss-Newton steps on the whole trajectories.
        horizons: lengths, in steps between observations, of the iterations before those.
        restarts: further starts, spread over the prior.
    """

    def __init__(
        self, iterations: int = 2, *, horizons: Sequence[int] = (), restarts: int = 0
    ) -> None:
        super().__init__(iterations, restarts=restarts)
        self.horizons = tuple(horizons)

    @torch.no_grad()
    def __call__(self, problem: LeastSquares, start: Tensor) -> Belief:
        """The posterior of a problem's latents to second order."""
        last = problem.episode.query.times.shape[-1] - 1
        for horizon, group in itertools.groupby(h for h in self.horizons if h < last):
            part = LeastSquares(
                problem.program,
                problem.episode.map_shots(partial(truncate, num_intervals=horizon)),
                problem.families,
                problem.mean,
                problem.precision,
            )
            start = self.descend(part, _better(part, start), len(list(group))).task
        return super().__call__(problem, start)
