"""The support-conditioned hybrid VAE, over any system."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from pyro_hybrid.beliefs.families import Normal
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.dynamics.solve import solve
from pyro_hybrid.evidence.encoder import Encoder
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.evidence.protocol import Evidence
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.inference.prior import SupportPrior, UnconditionalPrior
from pyro_hybrid.nets.encoders import SetEncoder
from pyro_hybrid.nets.gauge import Gauge
from pyro_hybrid.nets.hybrid_field import Force, HybridField
from pyro_hybrid.nets.residual import Residual
from pyro_hybrid.programs.module import HybridModel
from pyro_hybrid.systems import System

__all__ = ["MetaHybridVAE"]


class MetaHybridVAE(HybridModel):
    r"""Known equations, a neural force with latents of its own, and a prior conditioned on a few support shots.

    .. math::
        z_P, z_N &\sim p(z \mid S), \qquad y_0 \sim \mathrm{Normal}(\hat y_0, s) \\
        \dot y &= f_P(y; z_P) + f_N(y; z_N), \qquad x \sim \mathrm{Normal}(g(y), \sigma)

    Two preferences decide, while training, what the data leave open. ``correction``: the physics explains all it can
    (:func:`~pyro_hybrid.nets.residual.overlap`). ``straightness``: halfway between two systems lies the average of their
    neural forces, so that what stays ambiguous about the latents is as nearly linear as it can be. :meth:`settle` makes
    the first exact.

    References:
        Augmenting Physical Models with Deep Networks for Complex Dynamics Forecasting (Yin et al., 2021),
        https://arxiv.org/abs/2010.04456

    Arguments:
        system: gives the known equations and where the neural force enters.
        evidence: how the support is read: computed evidence, or None for the encoder alone.
        latents: number of neural latents; by default as many as the system has.
        linear: whether the force is linear in its latents.
        correction, straightness: weights of the two preferences, ``penalty_weights`` "projection" and "nonlinearity".
        noise: where the learned noise starts, in units of the system's. A high one is slow and safe: it anneals.
        substeps, step, compile: how :func:`~pyro_hybrid.solve` takes its steps.
        conditional: False for a prior that doesn't look at the support (not identifiable).
    """

    noise: Any  # set as a PyroParam, read as a Tensor
    start_noise: Any

    def __init__(
        self,
        system: System,
        evidence: GaussNewton | None = None,
        *,
        latents: int | None = None,
        linear: bool = True,
        correction: float = 0.0,
        straightness: float = 0.0,
        noise: float = 3.0,
        width: int = 32,
        depth: int = 1,
        substeps: int = 1,
        step: float | None = None,
        compile: bool = False,
        conditional: bool = True,
    ) -> None:
        super().__init__()
        self.system = system
        self.steps: dict[str, Any] = {"substeps": substeps, "step": step, "compile": compile}
        self.penalty_weights = {"projection": correction, "nonlinearity": straightness}
        sites = {**system.physics, "unknown": Normal(latents or len(system.unknown))}
        self.prior = (
            SupportPrior(self._reads_with(evidence), **sites)
            if conditional
            else UnconditionalPrior(**sites)
        )
        self.residual = Residual(
            len(system.inputs),
            sites["unknown"].n,
            system.outputs,
            linear,
            width=width,
            depth=depth,
            scale=system.inputs,
            periodic=system.periodic,
        )
        self.gauge = Gauge(system.components, grid=system.grid)
        self.noise = PyroParam(noise * torch.tensor(system.noise), constraints.positive)
        self.start_noise = PyroParam(torch.tensor(system.start_noise), constraints.positive)

    def _reads_with(self, evidence: GaussNewton | None) -> Evidence:
        encoder = Encoder(self.encoder())
        return encoder if evidence is None else encoder.then(evidence)

    def encoder(self) -> SetEncoder:
        """An encoder that fits the system's trajectories."""
        return SetEncoder(self.system.sensors, self.system.points)

    def guide(self, evidence: GaussNewton | None = None) -> AmortizedGuide:
        """A guide for this model, of the same kind as its prior."""
        return AmortizedGuide(self, evidence or self.encoder())

    def forward(self, episode: Episode) -> Tensor:
        p = self.prior(episode)
        with episode.plate:
            physics = {
                name: pyro.sample(name, p[name])[..., None, 0] for name in self.system.physics
            }
            unknown = pyro.sample("unknown", p["unknown"])
            start = pyro.sample(
                "initial", dist.Normal(episode.query.measured_initial, self.start_noise).to_event(2)
            )

            states = self.trajectories(physics, unknown, start, episode.query.times)
            if episode.is_training and any(self.penalty_weights.values()):
                judged = self.collocation_states(episode, states)
                pyro.factor("preference", -self.penalty(physics, unknown, *judged))
            x = dist.Normal(self.system.observe(states), self.noise).mask(episode.query.scored)
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)

    def trajectories(
        self, physics: dict[str, Tensor], unknown: Tensor, start: Tensor, times: Tensor
    ) -> Tensor:
        """Solve for states over time, given physics latents (..., task, 1), neural ones and initial states."""
        equations = self.equations
        field = equations(self.gauge(equations, physics, unknown), unknown)
        return solve(field, start if self.system.grid else start.unbind(-1), times, **self.steps)

    @property
    def equations(self) -> HybridField:
        """Return the known equations and the neural force in one field."""
        return HybridField(self.system.known, self.force, grid=self.system.grid)

    def force(self, unknown: Tensor) -> Force:
        """Return the neural force of neural latents (..., task, component)."""
        return self.residual.given(
            unknown[..., None, None, :] if self.system.grid else unknown[..., None, :]
        )

    def collocation_states(self, episode: Episode, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return times and states at which the force is judged: of trajectories, or of fields as they begin."""
        if not self.system.grid:
            return episode.query.times, states
        whole = episode.query.whole or episode.query
        return whole.times[..., :1], whole.measured_initial.unsqueeze(-2)

    def penalty(
        self, physics: dict[str, Tensor], unknown: Tensor, times: Tensor, states: Tensor
    ) -> Tensor:
        """Weigh up both penalties of each task's neural force: see ``penalty_weights``."""
        equations = self.equations
        points = equations.collocation_points(times, states.detach())
        weights = self.penalty_weights
        total = weights["projection"] * equations.projection_penalty(physics, unknown, points)
        if weights["nonlinearity"] and not self.residual.linear:
            bend = equations.nonlinearity_penalty(physics, unknown, points)
            total = total + weights["nonlinearity"] * bend
        return total
