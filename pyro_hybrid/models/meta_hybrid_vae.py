"""The support-conditioned hybrid VAE, over any system."""

from __future__ import annotations

from typing import Any

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
from ..mixing import Residual, overlap
from ..module import HybridModel
from ..prior import SupportPrior, UnconditionalPrior
from ..systems import System
from ..systems.system import Force
from ..tasks import Episode

__all__ = ["MetaHybridVAE"]


SHUFFLES = 3  # how often each state is used to judge the neural force, every time with other partners


class MetaHybridVAE(HybridModel):
    r"""Known equations, a neural force with latents of its own, and a prior conditioned on a few support shots.

    .. math::
        z_P, z_N &\sim p(z \mid S), \qquad y_0 \sim \mathrm{Normal}(\hat y_0, s) \\
        \dot y &= f_P(y; z_P) + f_N(y; z_N), \qquad x \sim \mathrm{Normal}(g(y), \sigma)

    Two preferences decide, while training, what the data leave open. ``correction``: the physics explains all it can
    (:func:`~pyro_hybrid.mixing.overlap`). ``straightness``: halfway between two systems lies the average of their
    neural forces, so that what stays ambiguous about the latents is as nearly linear as it can be.

    References:
        Augmenting Physical Models with Deep Networks for Complex Dynamics Forecasting (Yin et al., 2021),
        https://arxiv.org/abs/2010.04456

    Arguments:
        system: gives the known equations and where the neural force enters.
        evidence: how the support is read: computed evidence, or None for the encoder alone.
        latents: number of neural latents; by default as many as the system has.
        linear: whether the force is linear in its latents.
        correction, straightness: weights of the two preferences.
        noise: where the learned noise starts, in units of the system's. A high one is slow and safe: it anneals.
        substeps, step, compile: how :func:`~pyro_hybrid.solve` takes its steps.
        conditional: False for a prior that doesn't look at the support (not identifiable).
    """

    noise: Any  # set as a PyroParam, read as a Tensor
    start_noise: Any

    def __init__(self, system: System, evidence: Linearised | None = None, *, latents: int | None = None,
                 linear: bool = True, correction: float = 0.0, straightness: float = 0.0, noise: float = 3.0,
                 width: int = 32, depth: int = 1, substeps: int = 1, step: float | None = None, compile: bool = False,
                 conditional: bool = True) -> None:
        super().__init__()
        self.system = system
        self.steps: dict[str, Any] = {"substeps": substeps, "step": step, "compile": compile}
        self.correction, self.straightness = correction, straightness
        sites = {**system.physics, "unknown": Normal(latents or len(system.unknown))}
        self.prior = (SupportPrior(self.encoder(), evidence, **sites) if conditional else
                      UnconditionalPrior(None, **sites))
        self.residual = Residual(len(system.inputs), sites["unknown"].n, system.outputs, linear, width=width,
                                 depth=depth, scale=system.inputs, periodic=system.periodic)
        self.noise = PyroParam(noise * torch.tensor(system.noise), constraints.positive)
        self.start_noise = PyroParam(torch.tensor(system.start_noise), constraints.positive)

    def encoder(self) -> SetEncoder:
        """An encoder that fits the system's trajectories."""
        return SetEncoder(self.system.sensors, self.system.points, features=64)

    def guide(self, evidence: Linearised | None = None) -> AmortizedGuide:
        """A guide for this model, of the same kind as its prior."""
        return AmortizedGuide(self.prior, None if evidence else self.encoder(), evidence)

    def forward(self, episode: Episode) -> Tensor:
        p = self.prior(episode.support)
        with episode.plate:
            physics = {name: pyro.sample(name, p[name])[..., None, 0] for name in self.system.physics}
            unknown = pyro.sample("unknown", p["unknown"])
            start = pyro.sample("initial", dist.Normal(episode.measured, self.start_noise).to_event(2))

            force = self.force(unknown)
            states = solve(self.system.known(physics, force), start if self.system.grid else start.unbind(-1),
                           episode.times, **self.steps)
            if self.training and torch.is_grad_enabled() and (self.correction or self.straightness):
                latents = {name: value.detach() for name, value in physics.items()}, unknown.detach()
                pyro.factor("preference", -self.objections(*latents, *self.places(episode, states.detach())))
            x = dist.Normal(self.system.observe(states), self.noise).mask(episode.mask)
            return pyro.sample("x", x.to_event(3), obs=episode.query)

    def force(self, unknown: Tensor) -> Force:
        """The neural force, given neural latents (..., task, component)."""
        return self.residual.given(unknown[..., None, None, :] if self.system.grid else unknown[..., None, :])

    def places(self, episode: Episode, states: Tensor) -> tuple[Tensor, Tensor]:
        """Times and states at which a neural force is judged: along the trajectories; of fields, the initial ones."""
        whole = episode.whole or episode
        return (whole.times[:1], whole.measured.unsqueeze(-2)) if self.system.grid else (episode.times, states)

    def objections(self, physics: dict[str, Tensor], unknown: Tensor, times: Tensor, states: Tensor) -> Tensor:
        """What is held against the neural force of each task, beyond its fit: see ``correction`` and ``straightness``.

        Both are judged where time and the components of the state come from unrelated trajectories, and fields, which
        can't be taken apart, as they were before anything acted on them: along its own, a true correction is correlated
        with the known terms (friction shrinks the angles that gravity acts on), and the least one would be biased.
        """
        copies = 1 if self.system.grid else SHUFFLES
        clock = times.expand(states.shape[-3], -1).flatten().repeat(copies)
        flat = torch.cat([states.flatten(-3, -2)] * copies, -2)
        parts = flat if self.system.grid else tuple(_unrelated(x) for x in flat.unbind(-1))
        clock = clock.unsqueeze(-1) if self.system.grid else clock

        def slopes(physics: dict[str, Tensor], force: Force) -> Tensor:
            out = self.system.known(physics, force)(clock, parts)
            return torch.stack(torch.broadcast_tensors(*out), -1) if isinstance(out, tuple) else out

        def nothing(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            zero = torch.zeros_like(inputs[-1])
            return zero if self.system.outputs == 1 else (zero,) * self.system.outputs

        with torch.no_grad():
            without = slopes(physics, nothing)
            tangents = [slopes(physics | {name: 1.001 * value}, nothing) - without for name, value in physics.items()]
        mine = slopes(physics, self.force(unknown)) - without
        total = self.correction * overlap(mine, tangents)
        if self.straightness and not self.residual.linear:
            other = unknown.roll(1, -2)
            theirs, halfway = (slopes(physics, self.force(z)) - without for z in (other, 0.5 * (unknown + other)))
            total = total + self.straightness * (halfway - 0.5 * (mine + theirs)).square().sum(-1).mean(-1)
        return total


def _unrelated(values: Tensor) -> Tensor:
    return values.flatten()[torch.randperm(values.numel(), device=values.device)].view_as(values)
