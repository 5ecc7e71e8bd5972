"""MetaHybridVAE: the hybrid VAE with a support-conditioned prior, over any system."""

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
from pyro_hybrid.models.parts import build_residual, neural_force, sample_physics, split_state
from pyro_hybrid.nets.encoders import SetEncoder
from pyro_hybrid.nets.gauge import Gauge
from pyro_hybrid.nets.hybrid_field import Force, HybridField
from pyro_hybrid.programs.module import HybridModel
from pyro_hybrid.systems import System

__all__ = ["MetaHybridVAE"]


class MetaHybridVAE(HybridModel):
    r"""Known equations, a neural force with latents of its own, and a prior conditioned on a few support shots.

    .. math::
        z_P, z_N &\sim p(z \mid S), \qquad y_0 \sim \mathrm{Normal}(\hat y_0, s) \\
        \dot y &= f_P(y; z_P) + f_N(y; z_N), \qquad x \sim \mathrm{Normal}(g(y), \sigma)

    In the steps of a training (``episode.is_training``), two penalties choose among the descriptions that fit the data
    equally well. The projection penalty lets the physics explain all it can
    (:func:`~pyro_hybrid.projection_penalty`); :func:`ph.fix_gauge <pyro_hybrid.fitting.stages.fix_gauge>` makes this exact after the training. The
    nonlinearity penalty asks that the neural force halfway between two systems be the average of their forces
    (:func:`~pyro_hybrid.nets.correction.nonlinearity_penalty`), so that the remaining ambiguity of the latents is as
    nearly linear as possible.

    References:
        Augmenting Physical Models with Deep Networks for Complex Dynamics Forecasting (Yin et al., 2021),
        https://arxiv.org/abs/2010.04456

    Arguments:
        system: gives the known equations and where the neural force enters.
        evidence: computed evidence of the support, which starts from the encoder's; None for the encoder alone.
        latents: number of neural latents; by default as many as the system has.
        linear: whether the force is linear in its latents.
        correction, straightness: weights of the two penalties, ``penalty_weights["projection"]`` and
            ``penalty_weights["nonlinearity"]``.
        noise: initial value of the learned noise, in units of the system's noise. A large value makes the training
            slower and more robust, since the likelihood sharpens as the noise falls.
        width, depth: size and number of the neural force's hidden layers.
        substeps, step, compile: options of :func:`~pyro_hybrid.solve`.
        conditional: False for a prior that doesn't depend on the support, which the theorem doesn't cover.
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
        num_latents = latents or len(system.unknown)
        sites = {**system.physics, "unknown": Normal(num_latents)}
        self.prior = (
            SupportPrior(self._support_evidence(evidence), **sites)
            if conditional
            else UnconditionalPrior(**sites)
        )
        self.residual = build_residual(system, num_latents, linear=linear, width=width, depth=depth)
        self.gauge = Gauge(system.components, grid=system.grid)
        self.noise = PyroParam(noise * torch.tensor(system.noise), constraints.positive)
        self.start_noise = PyroParam(torch.tensor(system.start_noise), constraints.positive)

    def _support_evidence(self, evidence: GaussNewton | None) -> Evidence:
        encoder = Encoder(self.encoder())
        return encoder if evidence is None else encoder.then(evidence)

    def encoder(self) -> SetEncoder:
        """Return a new encoder for the system's trajectories."""
        return SetEncoder(self.system.sensors, self.system.points)

    def guide(self, evidence: GaussNewton | None = None) -> AmortizedGuide:
        """Return a guide whose prior is the model's, with an encoder or with computed evidence for the query."""
        return AmortizedGuide(self, evidence or self.encoder())

    def forward(self, episode: Episode) -> Tensor:
        p = self.prior(episode)
        query = episode.query
        with episode.plate:
            physics = sample_physics(self.system, p)
            unknown = pyro.sample("unknown", p["unknown"])
            measured = dist.Normal(query.measured_initial, self.start_noise)
            start = pyro.sample("initial", measured.to_event(2))

            states = self.trajectories(physics, unknown, start, query.times)
            if episode.is_training and any(self.penalty_weights.values()):
                times_and_states = self.collocation_states(episode, states)
                pyro.factor("preference", -self.penalty(physics, unknown, *times_and_states))
            x = dist.Normal(self.system.observe(states), self.noise).mask(query.scored)
            return pyro.sample("x", x.to_event(3), obs=query.values)

    def trajectories(
        self, physics: dict[str, Tensor], unknown: Tensor, start: Tensor, times: Tensor
    ) -> Tensor:
        """Solve for states over time, given physics latents (..., task, 1), neural ones and initial states."""
        equations = self.equations
        field = equations(self.gauge(equations, physics, unknown), unknown)
        return solve(field, split_state(self.system, start), times, **self.steps)

    @property
    def equations(self) -> HybridField:
        """Return the known equations and the neural force in one field."""
        return HybridField(self.system.known, self.force, grid=self.system.grid)

    def force(self, unknown: Tensor) -> Force:
        """Return the neural force of neural latents (..., task, component)."""
        return neural_force(self.system, self.residual, unknown)

    def collocation_states(self, episode: Episode, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the times and states of the penalties: those of trajectories, or the initial ones of fields."""
        if not self.system.grid:
            return episode.query.times, states
        whole = episode.query.whole or episode.query
        return whole.times[..., :1], whole.measured_initial.unsqueeze(-2)

    def penalty(
        self, physics: dict[str, Tensor], unknown: Tensor, times: Tensor, states: Tensor
    ) -> Tensor:
        """Add up the weighted penalties of each task's neural force."""
        equations = self.equations
        points = equations.collocation_points(times, states.detach())
        weights = self.penalty_weights
        total = weights["projection"] * equations.projection_penalty(physics, unknown, points)
        if weights["nonlinearity"] and not self.residual.linear:
            nonlinearity = equations.nonlinearity_penalty(physics, unknown, points)
            total = total + weights["nonlinearity"] * nonlinearity
        return total
