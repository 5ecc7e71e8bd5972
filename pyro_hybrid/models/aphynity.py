"""APHYNITY: known equations and the smallest neural force that the data need, of many systems or of one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor, nn

from pyro_hybrid.beliefs.families import Normal
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.dynamics.solve import solve
from pyro_hybrid.errors import fail, require
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.inference.prior import UnconditionalPrior
from pyro_hybrid.models.parts import build_residual, neural_force, sample_physics, split_state
from pyro_hybrid.nets.encoders import SetEncoder
from pyro_hybrid.nets.hybrid_field import CollocationPoints, Force, HybridField, Physics
from pyro_hybrid.programs.module import HybridModel
from pyro_hybrid.systems import System

__all__ = ["APHYNITY", "Constraint", "OriginalAPHYNITY", "squared_norm"]


class APHYNITY(HybridModel):
    r"""Known equations and the smallest neural force, with latents that an encoder infers under an unconditional prior.

    .. math::
        z_P, z_N &\sim p(z), \qquad y_0 \sim \mathrm{Normal}(\hat y_0, s) \\
        \dot y &= f_P(y; z_P) + f_N(y; z_N), \qquad x \sim \mathrm{Normal}(g(y), \sigma)

    Training minimizes :math:`\lambda L + \lVert f_N \rVert^2`, where L is the reconstruction error, and its weight grows
    with every step, :math:`\lambda_{j+1} = \lambda_j + \tau_2 L`. Divided by :math:`2 \sigma^2 \lambda / n`, for n
    observations, this is the ELBO's reconstruction term and a penalty
    :math:`n \lVert f_N \rVert^2 / 2 \sigma^2 \lambda`, which is a factor in the steps of a training
    (``episode.is_training``). :math:`\lVert f_N \rVert^2` is the squared norm of the neural force's contribution to the
    slopes, averaged over the states of the model's own trajectories. L is the mean squared error, with sensors weighted
    by their noise.

    One update of :math:`\lambda` is one training run: a run with an episode whose ``is_training`` is set. L is the
    error of that run, on segments if trajectories are cut. Other runs change nothing. Checkpoints keep :math:`\lambda`
    as the buffer ``constraint.weight``.

    The paper has one system. Latents of many systems with their KL divergence, a learned noise and inferred initial
    states are additions. The guide reads the query and never the support. To read one trajectory, as in the paper, train
    on ``dataclasses.replace(tasks, num_support=shots - 1)``, whose query is one. To read a support, pass it as the
    query: ``ph.draws(model, guide, ph.Episode(None, episode.support), n)``.

    References:
        Augmenting Physical Models with Deep Networks for Complex Dynamics Forecasting (Yin et al., 2021),
        https://arxiv.org/abs/2010.04456

    Arguments:
        system: gives the known equations and where the neural force enters.
        latents: number of neural latents; by default as many as the system has.
        linear: whether the force is linear in its latents.
        weight, growth: :math:`\lambda_0` and :math:`\tau_2`. The defaults are those of the paper's pendulum, for 50 000
            epochs of whole trajectories. For some thousand steps on segments, whose L is small, take a growth of 100 to
            1000.
        noise: initial value of the learned noise, in units of the system's noise.
        width, depth: size and number of the neural force's hidden layers.
        substeps, step, compile: options of :func:`~pyro_hybrid.solve`.
    """

    noise: Any  # set as a PyroParam, read as a Tensor
    start_noise: Any

    def __init__(
        self,
        system: System,
        *,
        latents: int | None = None,
        linear: bool = True,
        weight: float = 1.0,
        growth: float = 1.0,
        noise: float = 3.0,
        width: int = 32,
        depth: int = 1,
        substeps: int = 1,
        step: float | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.system = system
        self.steps: dict[str, Any] = {"substeps": substeps, "step": step, "compile": compile}
        num_latents = latents or len(system.unknown)
        self.prior = UnconditionalPrior(**system.physics, unknown=Normal(num_latents))
        self.residual = build_residual(system, num_latents, linear=linear, width=width, depth=depth)
        self.constraint = Constraint(weight, growth)
        self.noise = PyroParam(noise * torch.tensor(system.noise), constraints.positive)
        self.start_noise = PyroParam(torch.tensor(system.start_noise), constraints.positive)

    def guide(self) -> AmortizedGuide:
        """Return a guide that reads the query, one trajectory or a set of them."""
        return AmortizedGuide(self, SetEncoder(self.system.sensors, self.system.points))

    def forward(self, episode: Episode) -> Tensor:
        p = self.prior(episode)
        query = episode.query
        with episode.plate:
            physics = sample_physics(self.system, p)
            unknown = pyro.sample("unknown", p["unknown"])
            measured = dist.Normal(query.measured_initial, self.start_noise)
            start = pyro.sample("initial", measured.to_event(2))

            # The trajectories and the penalty share one force, whose matrices are computed once.
            force = self.force(unknown)
            equations = HybridField(self.system.known, lambda _: force, grid=self.system.grid)
            field = equations(physics, unknown)
            states = solve(field, split_state(self.system, start), query.times, **self.steps)
            mean = self.system.observe(states)
            if episode.is_training and query.values is not None:
                norm = squared_norm(equations, physics, unknown, query.times, states)
                pyro.factor("least", -self.constraint(norm, mean, self.noise, episode))
            x = dist.Normal(mean, self.noise).mask(query.scored)
            return pyro.sample("x", x.to_event(3), obs=query.values)

    def force(self, unknown: Tensor) -> Force:
        """Return the neural force of neural latents (..., task, component)."""
        return neural_force(self.system, self.residual, unknown)


class OriginalAPHYNITY(HybridModel):
    r"""APHYNITY as published: one system, whose physics are parameters, and no latents.

    .. math:: \dot y = f_P(y; \theta_P) + f_N(y; \theta_N), \qquad x \sim \mathrm{Normal}(g(y), 1)

    The objective is that of :class:`APHYNITY`; with a noise of one, L is the mean squared error. Trajectories begin
    where they were measured, and all of them are shots of one task. The paper takes several gradient steps for each
    update of :math:`\lambda`; this program takes one.

    References:
        Augmenting Physical Models with Deep Networks for Complex Dynamics Forecasting (Yin et al., 2021),
        https://arxiv.org/abs/2010.04456

    Arguments:
        system: gives the known equations and where the neural force enters; the means of its families are the initial
            values of the parameters.
        weight, growth: as for :class:`APHYNITY`.
        width, depth: size and number of the neural force's hidden layers.
        substeps, step, compile: options of :func:`~pyro_hybrid.solve`.
    """

    def __init__(
        self,
        system: System,
        *,
        weight: float = 1.0,
        growth: float = 1.0,
        width: int = 32,
        depth: int = 2,
        substeps: int = 1,
        step: float | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.system = system
        self.steps: dict[str, Any] = {"substeps": substeps, "step": step, "compile": compile}
        for name, family in system.physics.items():
            raw = torch.zeros(family.n, family.k)
            population: Any = family.distribution(family.from_raw(raw))
            setattr(self, name, PyroParam(population.mean, population.support))
        self.residual = build_residual(system, 1, linear=True, width=width, depth=depth)
        self.constraint = Constraint(weight, growth)

    def guide(self) -> nn.Module:
        """Return the guide of a program without latents, which samples nothing."""
        return EmptyGuide()

    def physics(self) -> dict[str, Tensor]:
        """Return the parameters of the known equations."""
        return {name: getattr(self, name)[..., None, 0] for name in self.system.physics}

    @property
    def unknown(self) -> Tensor:
        """Return the only neural latent, which is zero."""
        return self.residual.last.bias.new_zeros(1, 1)

    @property
    def equations(self) -> HybridField:
        """Return the known equations and the neural force in one field."""
        force = partial(neural_force, self.system, self.residual)
        return HybridField(self.system.known, force, grid=self.system.grid)

    def force(self) -> Force:
        """Return the neural force."""
        return self.equations.force(self.unknown)

    def trajectories(self, episode: Episode) -> Tensor:
        """Solve for the states at all times, from the measured initial states."""
        field = self.equations(self.physics(), self.unknown)
        start = split_state(self.system, episode.query.measured_initial)
        return solve(field, start, episode.query.times, **self.steps)

    def squared_norm(self, times: Tensor, states: Tensor) -> Tensor:
        """Average the squared norm of the neural force over states (task, shot, time, component), for each task."""
        return squared_norm(self.equations, self.physics(), self.unknown, times, states)

    def forward(self, episode: Episode) -> Tensor:
        query = episode.query
        with episode.plate:
            states = self.trajectories(episode)
            mean = self.system.observe(states)
            noise = states.new_ones(())
            if episode.is_training and query.values is not None:
                norm = self.squared_norm(query.times, states)
                pyro.factor("least", -self.constraint(norm, mean, noise, episode))
            x = dist.Normal(mean, noise).mask(query.scored)
            return pyro.sample("x", x.to_event(3), obs=query.values)


class Constraint(nn.Module):
    r"""The weight :math:`\lambda` of the reconstruction error against the norm of a neural force.

    Arguments:
        weight: its initial value.
        growth: the factor of the reconstruction error that every training run adds to it.
    """

    weight: Tensor

    def __init__(self, weight: float, growth: float) -> None:
        super().__init__()
        require(
            weight > 0.0 and growth >= 0.0,
            "a positive weight and a growth of 0 or more",
            f"{weight} and {growth}",
            "The paper's pendulum has 1 and 1, its fields 1 and 0.001.",
        )
        self.growth = growth
        # In float64, so that small errors are not lost in a large sum.
        self.register_buffer("weight", torch.tensor(weight, dtype=torch.float64))

    def forward(self, norm: Tensor, mean: Tensor, noise: Tensor, episode: Episode) -> Tensor:
        r"""Return the penalty :math:`n \lVert f_N \rVert^2 / 2 \sigma^2 \lambda` of each task, then raise :math:`\lambda`.

        The number n counts the observations of a task's whole trajectories, even if the query has only some segments.
        """
        whole = episode.query.whole or episode.query
        values = episode.query.values
        if values is None:
            fail(
                "a query with values",
                "none",
                "Add the penalty in training runs alone, where episode.query.values is not None.",
            )
        with torch.no_grad():
            variance = noise.square().mean()
            scored = episode.query.scored
            errors = ((values - mean) / noise).square().where(scored, 0.0)
            # Particles add axes to the errors, but not to the mask.
            num_scored = scored.sum() * errors.numel() / scored.numel()
            loss = variance * errors.sum() / num_scored
            n = whole.scored.flatten(1).sum(1)
        # A copy, since the gradient needs the weight of this run, and the buffer changes in place.
        weight = self.weight.to(norm, copy=True)
        self._raise_weight(loss)
        return n / (2.0 * variance * weight) * norm

    @torch.no_grad()
    def _raise_weight(self, loss: Tensor) -> None:
        if loss.isfinite():
            self.weight += self.growth * loss


class EmptyGuide(nn.Module):
    """Guide of a program without latents."""

    def forward(self, episode: Episode) -> dict[str, Tensor]:
        """Sample nothing."""
        return {}


def squared_norm(
    equations: HybridField, physics: Physics, unknown: Tensor, times: Tensor, states: Tensor
) -> Tensor:
    """Average the squared norm of the neural force's contribution to the slopes over given states, for each task.

    Arguments:
        equations: the field in its two parts.
        physics, unknown: the latents.
        times: ``(time,)``, ``(shot, time)`` or ``(task, shot, time)``.
        states: ``(..., task, shot, time, component)``; no gradient flows through them.
    """
    points = CollocationPoints.along(times, states.detach())
    squares = equations.correction(physics, unknown, points).square()
    return (squares.mean(-1) if equations.grid else squares.sum(-1)).mean(-1)
