"""APHYNITY: known equations and the least neural force that the data ask for, over many systems or of one."""

from __future__ import annotations

from collections.abc import Mapping
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
from pyro_hybrid.nets.encoders import SetEncoder
from pyro_hybrid.nets.hybrid_field import Force
from pyro_hybrid.nets.residual import Residual
from pyro_hybrid.programs.module import HybridModel
from pyro_hybrid.systems import System

__all__ = ["APHYNITY", "OriginalAPHYNITY"]


class APHYNITY(HybridModel):
    r"""Known equations and the least neural force, with latents that an encoder infers under an unconditional prior.

    .. math::
        z_P, z_N &\sim p(z), \qquad y_0 \sim \mathrm{Normal}(\hat y_0, s) \\
        \dot y &= f_P(y; z_P) + f_N(y; z_N), \qquad x \sim \mathrm{Normal}(g(y), \sigma)

    Training minimises :math:`\lambda L + \lVert f_N \rVert^2` with a reconstruction error L that counts the more the
    longer it lasts, :math:`\lambda_{j+1} = \lambda_j + \tau_2 L`. Divided by :math:`2 \sigma^2 \lambda / n`, for n
    observations, that is the ELBO's reconstruction and a penalty
    :math:`n \lVert f_N \rVert^2 / 2 \sigma^2 \lambda`, here a factor of the training. :math:`\lVert f_N \rVert^2` is
    the squared norm of what the neural force adds to the slopes, averaged over the states of the model's own
    trajectories; L is the mean squared error, sensors weighed by their noise.

    One update of :math:`\lambda` is one training run: a run with an episode whose ``is_training`` is set. L is the
    error of that run, on segments if trajectories are cut. Other runs change nothing. Checkpoints keep :math:`\lambda`
    as the buffer ``constraint.weight``.

    The paper knows one system; latents of many with their KL, a learned noise and inferred initial states are
    additions. The guide reads the query, and never the support. As published, that is one trajectory at a time:
    ``dataclasses.replace(tasks, num_support=shots - 1)`` are tasks whose query is one. A support is read as if it were
    the query: ``ph.draws(model, guide, ph.Episode(None, episode.support), n)``.

    References:
        Augmenting Physical Models with Deep Networks for Complex Dynamics Forecasting (Yin et al., 2021),
        https://arxiv.org/abs/2010.04456

    Arguments:
        system: gives the known equations and where the neural force enters.
        latents: number of neural latents; by default as many as the system has.
        linear: whether the force is linear in its latents.
        weight, growth: :math:`\lambda_0` and :math:`\tau_2`. By default those of the paper's pendulum, made for 50 000
            epochs of whole trajectories; some thousand steps, on segments with their small L, want one of 100 to 1000.
        noise: where the learned noise starts, in units of the system's.
        substeps, step, compile: how :func:`~pyro_hybrid.solve` takes its steps.
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
        sites = {**system.physics, "unknown": Normal(latents or len(system.unknown))}
        self.prior = UnconditionalPrior(**sites)
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
        self.constraint = Constraint(weight, growth)
        self.noise = PyroParam(noise * torch.tensor(system.noise), constraints.positive)
        self.start_noise = PyroParam(torch.tensor(system.start_noise), constraints.positive)

    def guide(self) -> AmortizedGuide:
        """A guide that reads the query, one trajectory or a set of them."""
        return AmortizedGuide(self, SetEncoder(self.system.sensors, self.system.points))

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

            force = self.residual.given(
                unknown[..., None, None, :] if self.system.grid else unknown[..., None, :]
            )
            states = solve(
                self.system.known(physics, force),
                start if self.system.grid else start.unbind(-1),
                episode.query.times,
                **self.steps,
            )
            mean = self.system.observe(states)
            if self.constraint.applies(episode):
                norm = squared_norm(self.system, physics, force, episode.query.times, states)
                pyro.factor("least", -self.constraint(norm, mean, self.noise, episode))
            x = dist.Normal(mean, self.noise).mask(episode.query.scored)
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)


class OriginalAPHYNITY(HybridModel):
    r"""APHYNITY as it was published: one system, whose physics are parameters, and no latents.

    .. math:: \dot y = f_P(y; \theta_P) + f_N(y; \theta_N), \qquad x \sim \mathrm{Normal}(g(y), 1)

    The objective is that of :class:`APHYNITY`; with a noise of one, L is the mean squared error. Trajectories begin
    where they were measured, and all of them are shots of one task. Of the paper's several gradient steps for each
    update of :math:`\lambda` there is one.

    References:
        Augmenting Physical Models with Deep Networks for Complex Dynamics Forecasting (Yin et al., 2021),
        https://arxiv.org/abs/2010.04456

    Arguments:
        system: gives the known equations, where the neural force enters, and with the means of its families where the
            parameters begin.
        weight, growth: as for :class:`APHYNITY`.
        substeps, step, compile: how :func:`~pyro_hybrid.solve` takes its steps.
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
            begin: Any = family.distribution(family.from_raw(torch.zeros(family.n, family.k)))
            setattr(self, name, PyroParam(begin.mean, begin.support))
        self.residual = Residual(
            len(system.inputs),
            1,
            system.outputs,
            linear=True,
            width=width,
            depth=depth,
            scale=system.inputs,
            periodic=system.periodic,
        )
        self.constraint = Constraint(weight, growth)
        self.register_buffer("nothing", torch.zeros((1, 1, 1, 1) if system.grid else (1, 1, 1)))

    def guide(self) -> nn.Module:
        """The guide of a program without latents, which samples nothing."""
        return Silent()

    def physics(self) -> dict[str, Tensor]:
        """The parameters of the known equations."""
        return {name: getattr(self, name)[..., None, 0] for name in self.system.physics}

    def force(self) -> Force:
        """The neural force; its one latent is nothing."""
        return self.residual.given(self.get_buffer("nothing"))

    def trajectories(self, episode: Episode) -> Tensor:
        """States at all times, from the measured initial ones."""
        initial = episode.query.measured_initial
        return solve(
            self.system.known(self.physics(), self.force()),
            initial if self.system.grid else initial.unbind(-1),
            episode.query.times,
            **self.steps,
        )

    def forward(self, episode: Episode) -> Tensor:
        with episode.plate:
            states = self.trajectories(episode)
            mean, noise = self.system.observe(states), states.new_ones(())
            if self.constraint.applies(episode):
                norm = squared_norm(
                    self.system, self.physics(), self.force(), episode.query.times, states
                )
                pyro.factor("least", -self.constraint(norm, mean, noise, episode))
            x = dist.Normal(mean, noise).mask(episode.query.scored)
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)


class Constraint(nn.Module):
    r"""The weight :math:`\lambda` of a reconstruction against the norm of a neural force; each training run raises it."""

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
        self.register_buffer(
            "weight", torch.tensor(weight, dtype=torch.float64)
        )  # which small errors still add to

    def applies(self, episode: Episode) -> bool:
        """Whether a run is one of training, and not a look or a simulation."""
        return episode.is_training and episode.query.values is not None

    def forward(self, norm: Tensor, mean: Tensor, noise: Tensor, episode: Episode) -> Tensor:
        r""":math:`n \lVert f_N \rVert^2 / 2 \sigma^2 \lambda` of each task; then raise :math:`\lambda`.

        A task has the n of its whole trajectories, however many segments of them are looked at.
        """
        whole = episode.query.whole or episode.query
        values = episode.query.values
        if values is None:
            fail("a query with values", "none", "Ask applies(episode) first.")
        with torch.no_grad():
            variance = noise.square().mean()
            counts = episode.query.scored
            errors = ((values - mean) / noise).square().where(counts, 0.0)
            loss = variance * errors.sum() / (counts.sum() * errors.numel() / counts.numel())
            n = whole.scored.flatten(1).sum(1)
        # A copy, since the gradient needs the weight of this run, and the buffer changes in place.
        weight = self.weight.to(norm, copy=True)
        self._raise_weight(loss)
        return n / (2.0 * variance * weight) * norm

    @torch.no_grad()
    def _raise_weight(self, loss: Tensor) -> None:
        if loss.isfinite():
            self.weight += self.growth * loss


class Silent(nn.Module):
    """The guide of a program that has no latents."""

    def forward(self, episode: Episode) -> dict[str, Tensor]:
        """Sample nothing."""
        return {}


def squared_norm(
    system: System, physics: Mapping[str, Tensor], force: Force, times: Tensor, states: Tensor
) -> Tensor:
    """What a neural force adds to the slopes at given states: squared, over components, and averaged, for each task."""
    clocks = times if times.dim() == 3 else times.expand(states.shape[-3], -1)
    clock, flat = clocks.flatten(-2), states.detach().flatten(-3, -2)

    def slopes(force: Force) -> Tensor:
        out = system.known(physics, force)(
            *((clock.unsqueeze(-1), flat) if system.grid else (clock, flat.unbind(-1)))
        )
        return torch.stack(torch.broadcast_tensors(*out), -1) if isinstance(out, tuple) else out

    def nothing(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        zero = torch.zeros_like(inputs[-1])
        return zero if system.outputs == 1 else (zero,) * system.outputs

    squares = (slopes(force) - slopes(nothing)).square()
    return (squares.mean(-1) if system.grid else squares.sum(-1)).mean(-1)
