"""The support-conditioned hybrid VAE, over any system."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from ..dynamics import solve
from ..encoders import SetEncoder
from ..families import Normal
from ..guide import AmortizedGuide
from ..linearise import Linearised
from ..mixing import Residual
from ..module import HybridModel
from ..prior import Prior, SupportPrior, UnconditionalPrior
from ..systems import System
from ..systems.system import Force
from ..tasks import Episode

__all__ = ["MetaHybridVAE"]


class MetaHybridVAE(HybridModel):
    r"""Known equations, a neural force with latents of its own, and a prior conditioned on a few support shots.

    .. math::
        z_P, z_N &\sim p(z \mid S), \qquad y_0 \sim \mathrm{Normal}(\hat y_0, s) \\
        \dot y &= f_P(y; z_P) + f_N(y; z_N), \qquad x \sim \mathrm{Normal}(g(y), \sigma)

    ``correction`` weighs the least-correction penalty of the mean square of :math:`f_N`, for each trajectory: the
    physics explains all it can.

    References:
        Augmenting Physical Models with Deep Networks for Complex Dynamics Forecasting (Yin et al., 2021),
        https://arxiv.org/abs/2010.04456

    Arguments:
        system: gives the known equations and where the neural force enters.
        evidence: how the support is read: computed evidence, or None for the encoder alone.
        latents: number of neural latents; by default as many as the system has.
        linear: whether the force is linear in its latents.
        correction: weight of the penalty.
        conditional: False for a prior that doesn't look at the support (not identifiable).
    """

    def __init__(self, system: System, evidence: Linearised | None = None, *, latents: int | None = None,
                 linear: bool = True, correction: float = 0.0, width: int = 32, depth: int = 2, substeps: int = 1,
                 conditional: bool = True) -> None:
        super().__init__()
        self.system, self.substeps, self.correction = system, substeps, correction
        sites = {**system.physics, "unknown": Normal(latents or len(system.unknown))}
        self.prior = SupportPrior(self.encoder(), evidence, **sites) if conditional else UnconditionalPrior(**sites)
        self.residual = Residual(len(system.inputs), sites["unknown"].n, system.outputs, linear, width=width,
                                 depth=depth, scale=system.inputs)
        self.noise = PyroParam(3.0 * torch.tensor(system.noise), constraints.positive)
        self.start_noise = PyroParam(torch.tensor(system.start_noise), constraints.positive)

    def encoder(self) -> SetEncoder:
        """An encoder that fits the system's trajectories."""
        return SetEncoder(self.system.sensors, self.system.points, features=64)

    def guide(self, evidence: Linearised | None = None) -> AmortizedGuide:
        """A guide for this model, of the same kind as its prior."""
        return AmortizedGuide(self.prior, None if evidence else self.encoder(), evidence)

    def forward(self, episode: Episode) -> Tensor:
        p = self.prior(episode.support)
        measured = episode.initial if self.system.grid else torch.stack(episode.initial, -1)
        with episode.plate:
            physics = {name: pyro.sample(name, p[name])[..., None, 0] for name in self.system.physics}
            unknown = pyro.sample("unknown", p["unknown"])
            start = pyro.sample("initial", dist.Normal(measured, self.start_noise).to_event(2))

            force = self.force(unknown)
            states = solve(self.system.known(physics, force), start if self.system.grid else start.unbind(-1),
                           episode.times, substeps=self.substeps)
            if self.correction and torch.is_grad_enabled():
                pyro.factor("least_correction", -self.correction * self.strength(force, physics, episode.times, states))
            x = dist.Normal(self.system.observe(states), self.noise).mask(episode.mask)
            return pyro.sample("x", x.to_event(3), obs=episode.query)

    def force(self, unknown: Tensor) -> Force:
        """The neural force, given neural latents (..., task, component)."""
        return self.residual.given(unknown[..., None, None, :] if self.system.grid else unknown[..., None, :])

    def strength(self, force: Force, physics: dict[str, Tensor], times: Tensor, states: Tensor) -> Tensor:
        """Mean square of the neural force for each task, over inputs that each come from another trajectory.

        Along its own trajectories a true correction is correlated with the known terms (friction shrinks the angles that
        gravity acts on), and the least one would be biased. Between unrelated inputs it isn't.
        """
        heard: list[Tensor] = []

        def listening(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            heard.extend(torch.broadcast_tensors(*inputs))
            return force(*inputs)

        flat = states.detach().flatten(-3, -2)  # (..., task, shot * time, component): parameters still broadcast
        clock = times.expand(states.shape[-3], -1).flatten()
        with torch.no_grad():
            self.system.known(physics, listening)(clock.unsqueeze(-1) if self.system.grid else clock,
                                                  flat if self.system.grid else flat.unbind(-1))
        unrelated = [x.flatten().roll(i * (x.numel() // len(heard) + 1)).view_as(x) for i, x in enumerate(heard)]
        out = force(*unrelated)
        squares = sum(part.square() for part in (out if isinstance(out, tuple) else (out,)))
        return squares.flatten(-2).mean(-1) if self.system.grid else squares.mean(-1)
