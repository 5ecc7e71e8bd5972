"""The support-conditioned hybrid VAE, over any system."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from pyro_hybrid.beliefs.families import Normal
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.dynamics.solve import solve
from pyro_hybrid.errors import require
from pyro_hybrid.evidence.gauss_newton import Linearised
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.inference.prior import SupportPrior, UnconditionalPrior
from pyro_hybrid.nets.encoders import SetEncoder
from pyro_hybrid.nets.residual import Residual, explained, overlap
from pyro_hybrid.programs.module import HybridModel
from pyro_hybrid.systems import System
from pyro_hybrid.systems.system import Force

__all__ = ["MetaHybridVAE"]


class Places(NamedTuple):
    """Where a neural force is judged: times (place,), and states (place, component)."""

    clock: Tensor
    states: Tensor


SHUFFLES = (
    3  # how often each state is used to judge the neural force, every time with other partners
)


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
        correction, straightness: weights of the two preferences.
        noise: where the learned noise starts, in units of the system's. A high one is slow and safe: it anneals.
        substeps, step, compile: how :func:`~pyro_hybrid.solve` takes its steps.
        conditional: False for a prior that doesn't look at the support (not identifiable).
    """

    clock: Tensor | None
    samples: Tensor | None
    noise: Any  # set as a PyroParam, read as a Tensor
    start_noise: Any

    def __init__(
        self,
        system: System,
        evidence: Linearised | None = None,
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
        self.correction, self.straightness = correction, straightness
        sites = {**system.physics, "unknown": Normal(latents or len(system.unknown))}
        self.prior = (
            SupportPrior(self.encoder(), evidence, **sites)
            if conditional
            else UnconditionalPrior(None, **sites)
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
        self.register_buffer("clock", None, persistent=False)
        self.register_buffer("samples", None, persistent=False)
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
            physics = {
                name: pyro.sample(name, p[name])[..., None, 0] for name in self.system.physics
            }
            unknown = pyro.sample("unknown", p["unknown"])
            start = pyro.sample(
                "initial", dist.Normal(episode.query.measured_initial, self.start_noise).to_event(2)
            )

            states = self.trajectories(physics, unknown, start, episode.query.times)
            if self.training and torch.is_grad_enabled() and (self.correction or self.straightness):
                latents = (
                    {name: value.detach() for name, value in physics.items()},
                    unknown.detach(),
                )
                pyro.factor(
                    "preference", -self.objections(*latents, *self.places(episode, states.detach()))
                )
            x = dist.Normal(self.system.observe(states), self.noise).mask(episode.query.scored)
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)

    def trajectories(
        self, physics: dict[str, Tensor], unknown: Tensor, start: Tensor, times: Tensor
    ) -> Tensor:
        """States over time, of physics latents (..., task, 1), neural ones and initial states."""
        field = self.system.known(self.settled(physics, unknown), self.force(unknown))
        return solve(field, start if self.system.grid else start.unbind(-1), times, **self.steps)

    def settled(self, physics: dict[str, Tensor], unknown: Tensor) -> dict[str, Tensor]:
        """The physics latents less what the neural force does in their place: see :meth:`settle`."""
        if self.clock is None or self.samples is None:
            return physics
        size = (
            max(1, 256 // self.samples.shape[-1]) if self.system.grid else 256
        )  # what a processor's cache holds
        pieces = map(Places, self.clock.split(size), self.samples.split(size))
        shape = torch.broadcast_shapes(
            unknown.shape[:-1], *(value.shape[:-1] for value in physics.values())
        )
        unknown, few = (
            unknown.expand(*shape, -1),
            {name: value.expand(*shape, 1) for name, value in physics.items()},
        )
        first, back = _distinct(
            *few.values(), unknown
        )  # a Jacobian moves the shots' latents in most of its copies
        few = {name: value[first] for name, value in few.items()}
        share = (
            1e-3
            * explained(
                (
                    (self.corrections(few, unknown[first], piece), self.tangents(few, piece))
                    for piece in pieces
                ),
                centred=not self.system.grid,
            )[back]
        )
        return {
            name: value * (1.0 - share[..., i, None])
            for i, (name, value) in enumerate(physics.items())
        }

    @torch.no_grad()
    def settle(self, tasks: Tasks, points: int | None = None) -> None:
        """From now on the physics explains all it can, exactly, and not as nearly as training got there.

        What the neural force does in the physics' place is a shift of the physics latents, and is taken off: the same
        trajectories, with other names. Say it after training or loading, with training tasks.

        Arguments:
            tasks: of which the initial states are used. Components, and time, are spread evenly over the middle nine
                tenths of what they are on trajectories from there, and independently; fields are taken as they began.
            points: number of places; by default 2048, or 512 fields.
        """
        require(
            points is None or points >= 1,
            "1 place or more",
            points,
            "Leave points out for as many as are needed.",
        )
        shots = tasks.shots()
        if self.system.grid:
            fields = shots.measured_initial.flatten(0, 1)[: points or 512]
            self.clock, self.samples = shots.times[:1].expand(len(fields)), fields
            return
        self.clock = self.samples = None
        average = {name: fn.mean.expand(len(tasks), -1) for name, fn in self.prior(None).items()}
        unknown = average.pop("unknown")
        physics = {name: value[..., None, 0] for name, value in average.items()}
        states = self.trajectories(physics, unknown, shots.measured_initial, shots.times).flatten(
            0, -2
        )
        states = states[states.isfinite().all(-1)].sort(0).values
        even = torch.quasirandom.SobolEngine(states.shape[-1] + 1, scramble=True, seed=0).draw(
            points or 2048
        )
        rank = (0.05 + 0.9 * even.to(states.device)).to(states.dtype)
        self.samples = states.gather(0, (rank[:, 1:] * (len(states) - 1)).round().long())
        self.clock = shots.times[0] + rank[:, 0] * (shots.times[-1] - shots.times[0])

    def force(self, unknown: Tensor) -> Force:
        """The neural force, given neural latents (..., task, component)."""
        return self.residual.given(
            unknown[..., None, None, :] if self.system.grid else unknown[..., None, :]
        )

    def places(self, episode: Episode, states: Tensor) -> tuple[Tensor, Tensor]:
        """Times and states at which a neural force is judged: along the trajectories; of fields, the initial ones."""
        whole = episode.query.whole or episode.query
        return (
            (whole.times[:1], whole.measured_initial.unsqueeze(-2))
            if self.system.grid
            else (episode.query.times, states)
        )

    def objections(
        self, physics: dict[str, Tensor], unknown: Tensor, times: Tensor, states: Tensor
    ) -> Tensor:
        """What is held against the neural force of each task, beyond its fit: see ``correction`` and ``straightness``.

        Both are judged where time and the components of the state come from unrelated trajectories, and fields, which
        can't be taken apart, as they were before anything acted on them: along its own, a true correction is correlated
        with the known terms (friction shrinks the angles that gravity acts on), and the least one would be biased.
        """
        copies = 1 if self.system.grid else SHUFFLES
        clock = times.expand(states.shape[-3], -1).flatten().repeat(copies)
        flat = torch.cat([states.flatten(-3, -2)] * copies, -2)
        places = (
            Places(clock, flat)
            if self.system.grid
            else Places(clock, torch.stack([_unrelated(x) for x in flat.unbind(-1)], -1))
        )
        mine = self.corrections(physics, unknown, places)
        total = self.correction * overlap(mine, self.tangents(physics, places))
        if self.straightness and not self.residual.linear:
            other = unknown.roll(1, -2)
            theirs, halfway = (
                self.corrections(physics, z, places) for z in (other, 0.5 * (unknown + other))
            )
            total = total + self.straightness * (halfway - 0.5 * (mine + theirs)).square().sum(
                -1
            ).mean(-1)
        return total

    def corrections(self, physics: dict[str, Tensor], unknown: Tensor, places: Places) -> Tensor:
        """What the neural force adds to the slopes, (..., task, place, component)."""
        return self._slopes(physics, self.force(unknown), places) - self._slopes(
            physics, self._nothing, places
        )

    @torch.no_grad()
    def tangents(self, physics: dict[str, Tensor], places: Places) -> list[Tensor]:
        """What a thousandth more of each physics latent would add to them."""
        without = self._slopes(physics, self._nothing, places)
        return [
            self._slopes(physics | {name: 1.001 * value}, self._nothing, places) - without
            for name, value in physics.items()
        ]

    def _slopes(self, physics: dict[str, Tensor], force: Force, places: Places) -> Tensor:
        states = places.states if self.system.grid else places.states.unbind(-1)
        clock = places.clock.unsqueeze(-1) if self.system.grid else places.clock
        out = self.system.known(physics, force)(clock, states)
        return torch.stack(torch.broadcast_tensors(*out), -1) if isinstance(out, tuple) else out

    def _nothing(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        zero = torch.zeros_like(inputs[-1])
        return zero if self.system.outputs == 1 else (zero,) * self.system.outputs


def _unrelated(values: Tensor) -> Tensor:
    return values.flatten()[torch.randperm(values.numel(), device=values.device)].view_as(values)


def _distinct(*values: Tensor) -> tuple[Tensor, Tensor]:
    """Of values side by side, the rows that differ from the one before; and for every row, which of these it is."""
    rows = torch.cat(values, -1).detach()
    _, back, counts = torch.unique_consecutive(rows, dim=0, return_inverse=True, return_counts=True)
    return counts.cumsum(0) - counts, back
