"""The physics-integrated VAE, over any system."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor, nn

from pyro_hybrid.beliefs.families import Normal
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.dynamics.solve import solve
from pyro_hybrid.errors import require
from pyro_hybrid.inference.prior import Prior, UnconditionalPrior
from pyro_hybrid.nets.encoders import SetEncoder
from pyro_hybrid.nets.hybrid_field import Force
from pyro_hybrid.nets.residual import Residual
from pyro_hybrid.programs.module import HybridModel
from pyro_hybrid.shapes import Latent, Natural, Times, Trajectories
from pyro_hybrid.systems import System

__all__ = ["HybridVAE", "PhysicsGuide"]


FEATURES, WIDTH = 64, 128  # of the encoders


class HybridVAE(HybridModel):
    r"""Known equations, a neural force with latents of its own, and a prior that is the same for all tasks.

    .. math::
        z_P, z_N, z_B &\sim p(z), \qquad \dot y = f_P(y; z_P) + f_N(y; z_N), \qquad y_0 = \hat y_0 \\
        x &\sim \mathrm{Normal}(m, \sigma), \qquad m = g(y) + b(t, g(y); z_B)

    The rival of :class:`MetaHybridVAE`. Three factors tie the latents to the physics while training. With
    :math:`m_P` from the known equations alone, the shot :math:`\tilde x` that :class:`PhysicsGuide` unmixes and the
    latents :math:`\hat u` that it reads in trajectories simulated with :math:`u^*`, in unconstrained coordinates:

    .. math::
        R_1 = \tfrac12 \lVert (m - m_P) / \sigma \rVert^2, \qquad
        R_2 = \tfrac12 \lVert (\tilde x - m_P) / \sigma \rVert^2, \qquad
        R_3 = \tfrac12 \lVert (\hat u(m_P(u^*)) - u^*) / s \rVert^2

    R₁ is the divergence between what the whole and the bare model predict (two neural terms: the mean over the orders
    of leaving them out); its gradient goes everywhere. Only the encoder learns from R₂ and R₃: :math:`m_P` is given.
    Unlike in the paper, population and noise are learned; weights are relative to the likelihood, as there.

    The guide reads the query, and never the support. As published, that is one trajectory at a time:
    ``dataclasses.replace(tasks, num_support=shots - 1)`` are tasks whose query is one. A support is read as if it were
    the query: ``ph.draws(model, guide, ph.Episode(None, episode.support), n)``.

    References:
        Physics-Integrated Variational Autoencoders for Robust and Interpretable Generative Modeling (Takeishi and
        Kalousis, 2021), https://arxiv.org/abs/2102.13156

    Arguments:
        system: gives the known equations and where the neural force enters.
        latents: number of neural latents; by default as many as the system has.
        outside: number of latents of the correction b of the observation; 0 for no such correction.
        linear: whether the force is linear in its latents.
        discrepancy, unmixing, recovery: weights of R₁, R₂ and R₃.
        noise: where the learned noise starts, in units of the system's.
        width, depth: size and number of the neural terms' hidden layers.
        substeps: how :func:`~pyro_hybrid.solve` takes its steps.
    """

    noise: Any  # set as a PyroParam, read as a Tensor

    def __init__(
        self,
        system: System,
        *,
        latents: int | None = None,
        outside: int = 0,
        linear: bool = False,
        discrepancy: float = 0.01,
        unmixing: float = 0.001,
        recovery: float = 100.0,
        noise: float = 3.0,
        width: int = 32,
        depth: int = 1,
        substeps: int = 1,
    ) -> None:
        super().__init__()
        require(
            min(discrepancy, unmixing, recovery, outside) >= 0,
            "weights and outside of 0 or more",
            (discrepancy, unmixing, recovery, outside),
            "Leave a regulariser out by a weight of 0.",
        )
        self.system, self.substeps = system, substeps
        self.discrepancy, self.unmixing, self.recovery = discrepancy, unmixing, recovery
        sites = {**system.physics, "unknown": Normal(latents or len(system.unknown))}
        self.prior = UnconditionalPrior(
            **sites, **({"outside": Normal(outside)} if outside else {})
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
        self.correction = _correction(system, outside, width, depth) if outside else None
        self.encoder = PhysicsGuide(self.prior, system)
        self.noise = PyroParam(noise * torch.tensor(system.noise), constraints.positive)

    def guide(self) -> PhysicsGuide:
        """The guide: this model's own encoder, which two of its factors train."""
        return self.encoder

    def forward(self, episode: Episode) -> Tensor:
        p, read = self.prior(episode), self.to_answer_for(episode)
        with episode.plate:
            physics = {
                name: pyro.sample(name, p[name])[..., None, 0] for name in self.system.physics
            }
            unknown = pyro.sample("unknown", p["unknown"])
            outside = pyro.sample("outside", p["outside"]) if "outside" in p else None

            inside = self.observed(physics, self.force(unknown), episode.query)
            mean = self.corrected(inside, outside, episode.query.times)
            if read and self.discrepancy:
                bare = self.observed(physics, self.nothing, episode.query)
                parts = inside, self.corrected(bare, outside, episode.query.times), bare
                pyro.factor(
                    "discrepancy", -self.discrepancy * self.beyond_physics(mean, *parts, read)
                )
            if read and self.unmixing:
                pyro.factor("unmixing", -self.unmixing * self.mixed(physics, read))
            if read and self.recovery:
                pyro.factor("recovery", -self.recovery * self.misread(read))
            x = dist.Normal(mean, self.noise).mask(episode.query.scored)
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)

    def to_answer_for(self, episode: Episode) -> Reading | None:
        """What the guide has read, while training."""
        training = episode.is_training and episode.query.values is not None
        return self.encoder.read(episode) if training else None

    def force(self, unknown: Tensor) -> Force:
        """The neural force, given neural latents (..., task, component)."""
        return self.residual.given(
            unknown[..., None, None, :] if self.system.grid else unknown[..., None, :]
        )

    def nothing(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """No force."""
        zero = torch.zeros_like(inputs[-1])
        return zero if self.system.outputs == 1 else (zero,) * self.system.outputs

    def observed(self, physics: dict[str, Tensor], force: Force, shots: Shots) -> Tensor:
        """What sensors would show of the equations with this force, without noise."""
        field = self.system.known(physics, force)
        initial = shots.measured_initial
        start = initial if self.system.grid else initial.unbind(-1)
        return self.system.observe(solve(field, start, shots.times, substeps=self.substeps))

    def corrected(self, sensors: Tensor, outside: Tensor | None, times: Times) -> Tensor:
        """Sensors (..., time, sensor) with the neural correction of the observation, if there is one."""
        if self.correction is None or outside is None:
            return sensors
        shift = self.correction.given(outside[..., None, None, :])(times, *sensors.unbind(-1))
        return sensors + (
            torch.stack(shift, -1) if isinstance(shift, tuple) else shift.unsqueeze(-1)
        )

    def beyond_physics(
        self, mean: Tensor, inside: Tensor, outside: Tensor, bare: Tensor, read: Reading
    ) -> Tensor:
        """R₁ of each task: both neural terms against each alone, and each alone against none."""
        pairs = (inside, bare), (outside, bare), (mean, inside), (mean, outside)
        squares = [
            ((one - other) / self.noise.detach()).square().mean((-3, -2, -1))
            for one, other in pairs
        ]
        return (
            0.25 * torch.stack(squares).sum(0) * read.unmixed[0].numel()
        )  # of segments too: as if of all

    def mixed(self, physics: dict[str, Tensor], read: Reading) -> Tensor:
        """R₂ of each task: how far what the encoder unmixed is from what its latents make the physics do."""
        with torch.no_grad():
            bare = self.observed(physics, self.nothing, read.shots)
        errors: Tensor = (read.unmixed - bare) / self.noise.detach()
        return 0.5 * errors.square().sum((-3, -2, -1))

    def misread(self, read: Reading) -> Tensor:
        """R₃ of each task: what the encoder misses of latents, drawn by shot, that the physics ran with."""
        families, like = self.system.physics, read.unmixed
        with torch.no_grad():
            spread = {
                name: 4.0 * torch.rand(*like.shape[:2], f.n, dtype=like.dtype, device=like.device)
                - 2.0
                for name, f in families.items()
            }
            truth = {name: f.loc + f.scale * spread[name] for name, f in families.items()}
            bare = self.observed(
                {name: f.constrained(truth[name])[..., 0] for name, f in families.items()},
                self.nothing,
                read.shots,
            )
        found = self.encoder.recovered(bare)
        return sum(
            (
                (0.5 * ((found[name] - truth[name]) / f.scale).square()).sum((-2, -1))
                for name, f in families.items()
            ),
            like.new_zeros(()),
        )


def _correction(system: System, latents: int, width: int, depth: int) -> Residual:
    """Of sensors, as a function of time and of them; at first it does nothing."""
    last = system.step * (system.points - 1)
    made = Residual(
        1 + system.sensors,
        latents,
        system.sensors,
        width=width,
        depth=depth,
        scale=(last, *[1.0] * system.sensors),
    )
    nn.init.zeros_(made.straight), nn.init.zeros_(made.last.weight)
    return made


class Reading(NamedTuple):
    """What a guide made of the shots that it read, all of them whole."""

    shots: Shots
    natural: dict[str, Natural]
    unmixed: Trajectories


class PhysicsGuide(nn.Module):
    r"""Reads shots one by one: the neural latents first, then the physics in what is left without them.

    .. math:: q(z \mid x_1 \dots x_k) \propto \exp \Big\langle T(z), \lambda_0 + \sum_i \eta(x_i) \Big\rangle, \qquad
              \eta_P(x_i) = \eta_P(\tilde x_i), \quad \tilde x_i = x_i + u(x_i, \mathrm{E}[z_N])

    One trajectory is read as published. Several, which share their latents, add up as evidence does, however many there
    are. Where nothing is observed the guide is the prior.

    Arguments:
        prior: the model's own prior.
        system: says which sites are physics, and what a trajectory looks like.
    """

    def __init__(self, prior: Prior, system: System) -> None:
        super().__init__()
        self.prior = prior
        self.physics = tuple(system.physics)
        self.neural = tuple(name for name in prior.families if name not in self.physics)
        self.first, self.second = (
            SetEncoder(system.sensors, system.points, FEATURES, WIDTH) for _ in range(2)
        )
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.SiLU(), nn.Linear(FEATURES, f.n * f.k))
                for name, f in prior.families.items()
            }
        )
        size, latents = (
            system.points * system.sensors,
            sum(prior.families[name].n for name in self.neural),
        )
        self.unmixer = nn.Sequential(
            nn.Linear(2 * size + latents, WIDTH), nn.SiLU(), nn.Linear(WIDTH, size)
        )

    def forward(self, episode: Episode) -> dict[str, Tensor]:
        """Sample every latent site of the program."""
        naturals = self.natural(episode)
        with episode.plate:
            return {
                name: pyro.sample(name, self.prior.families[name].distribution(natural))
                for name, natural in naturals.items()
            }

    def natural(self, episode: Episode) -> dict[str, Natural]:
        """Natural parameters of each site."""
        read = self.read(episode)
        return dict(self.prior.population().natural) if read is None else read.natural

    def read(self, episode: Episode) -> Reading | None:
        """What it makes of the query; None where there is none."""
        whole = episode.query.whole or episode.query
        if whole.values is None:
            return None
        return self._read(whole)

    def recovered(self, values: Trajectories) -> dict[str, Latent]:
        """Unconstrained physics latents that it sees in unmixed trajectories, (task, shot, component)."""
        features = self._features(self.second, values, None)
        return {
            name: self.prior.families[name].gaussian(self._evidence(name, features))[0]
            for name in self.physics
        }

    def _read(self, shots: Shots) -> Reading:
        values, seen, counts = torch.as_tensor(shots.values), shots.observed, shots.scored
        neural = self._believed(self.neural, self._features(self.first, values, seen), counts)
        latents = torch.cat(
            [self.prior.families[name].gaussian(neural[name])[0] for name in self.neural], -1
        )
        unmixed = self._unmixed(values, seen, latents)
        physics = self._believed(self.physics, self._features(self.second, unmixed, None), counts)
        return Reading(shots, physics | neural, unmixed)

    def _unmixed(self, values: Tensor, seen: Tensor, latents: Tensor) -> Trajectories:
        center, scale = self.second.center, self.second.scale
        standard = ((values - center) / scale).where(seen, 0.0)
        known = torch.cat([standard, seen.to(standard.dtype)], -1).flatten(-2)
        inputs = torch.cat([known, latents.unsqueeze(-2).expand(*known.shape[:-1], -1)], -1)
        correction: Tensor = self.unmixer(inputs).view_as(standard)
        return center + scale * (standard + correction)

    def _believed(
        self, names: tuple[str, ...], features: Tensor, counts: Tensor
    ) -> dict[str, Natural]:
        some, before = counts.flatten(2).any(-1)[..., None, None], self.prior.population().natural
        return {
            name: before[name] + self._evidence(name, features).where(some, 0.0).sum(-3)
            for name in names
        }

    def _evidence(self, name: str, features: Tensor) -> Natural:
        family = self.prior.families[name]
        return family.evidence(self.heads[name](features).unflatten(-1, (family.n, family.k)))

    def _features(self, encoder: SetEncoder, values: Trajectories, seen: Tensor | None) -> Tensor:
        """Every shot as a set of its own: (task, shot, features)."""
        one_by_one = values.flatten(0, 1).unsqueeze(1)
        shots = Shots.from_tensors(
            values[0, 0, :, 0],  # an encoder reads no times
            one_by_one,
            observed=None if seen is None else seen.flatten(0, 1).unsqueeze(1),
        )
        features: Tensor = encoder(shots).unflatten(0, values.shape[:2])
        return features
