"""PhysicsGuide: the guide of the physics-integrated VAE, which reads each trajectory on its own."""

from __future__ import annotations

from typing import NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.inference.prior import Prior
from pyro_hybrid.nets.encoders import SetEncoder
from pyro_hybrid.shapes import Latent, Natural, Trajectories
from pyro_hybrid.systems import System

__all__ = ["PhysicsGuide", "Reading"]

NUM_FEATURES = 64  # of each encoder
WIDTH = 128  # of the hidden layers


class Reading(NamedTuple):
    """Shots that a guide has read, and what it computed from them.

    Attributes:
        shots: the whole trajectories.
        natural: natural parameters of the guide, by site.
        unmixed: the trajectories without the effect of the neural latents, as the guide estimates them.
    """

    shots: Shots
    natural: dict[str, Natural]
    unmixed: Trajectories


class PhysicsGuide(nn.Module):
    r"""Guide that reads the neural latents first, and then the physics in what is left of a trajectory without them.

    .. math:: q(z \mid x_1 \dots x_k) \propto \exp \Big\langle T(z), \lambda_0 + \sum_i \eta(x_i) \Big\rangle, \qquad
              \eta_P(x_i) = \eta_P(\tilde x_i), \quad \tilde x_i = x_i + u(x_i, \mathrm{E}[z_N])

    The paper reads one trajectory. Several trajectories, which share their latents, each contribute evidence
    :math:`\eta(x_i)`, and evidence adds up. Where nothing is observed the guide is the prior.

    Arguments:
        prior: the model's own prior.
        system: says which sites are physics, and how many times and sensors a trajectory has.
    """

    def __init__(self, prior: Prior, system: System) -> None:
        super().__init__()
        self.prior = prior
        self.physics = tuple(system.physics)
        self.neural = tuple(name for name in prior.families if name not in self.physics)
        self.first = SetEncoder(system.sensors, system.points, NUM_FEATURES, WIDTH)
        self.second = SetEncoder(system.sensors, system.points, NUM_FEATURES, WIDTH)
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.SiLU(), nn.Linear(NUM_FEATURES, family.n * family.k))
                for name, family in prior.families.items()
            }
        )
        size = system.points * system.sensors
        num_latents = sum(prior.families[name].n for name in self.neural)
        self.unmixer = nn.Sequential(
            nn.Linear(2 * size + num_latents, WIDTH), nn.SiLU(), nn.Linear(WIDTH, size)
        )

    def forward(self, episode: Episode) -> dict[str, Tensor]:
        """Sample every latent site of the program."""
        natural = self.natural_parameters(episode)
        with episode.plate:
            return {
                name: pyro.sample(name, self.prior.families[name].distribution(natural[name]))
                for name in natural
            }

    def natural_parameters(self, episode: Episode) -> dict[str, Natural]:
        """Return the natural parameters of each site."""
        reading = self.read(episode)
        return dict(self.prior.population().natural) if reading is None else reading.natural

    def read(self, episode: Episode) -> Reading | None:
        """Read the query's whole shots; return None if nothing was observed."""
        shots = episode.query.whole or episode.query
        if shots.values is None:
            return None
        values = torch.as_tensor(shots.values)
        observed = shots.observed
        neural = self._add_evidence(self.neural, self._encode(self.first, values, observed), shots)
        unmixed = self._unmix(values, observed, self._means(self.neural, neural))
        physics = self._add_evidence(self.physics, self._encode(self.second, unmixed, None), shots)
        return Reading(shots, physics | neural, unmixed)

    def recover_physics(self, values: Trajectories) -> dict[str, Latent]:
        """Estimate the physics latents of each unmixed trajectory, unconstrained, (task, shot, component)."""
        features = self._encode(self.second, values, None)
        return {
            name: self.prior.families[name].gaussian(self._evidence(name, features))[0]
            for name in self.physics
        }

    def _means(self, names: tuple[str, ...], natural: dict[str, Natural]) -> Tensor:
        """Return the unconstrained means of some sites, side by side: (task, component)."""
        return torch.cat(
            [self.prior.families[name].gaussian(natural[name])[0] for name in names], -1
        )

    def _unmix(self, values: Tensor, observed: Tensor, latents: Tensor) -> Trajectories:
        """Estimate the trajectories without the effect of the neural latents."""
        center = self.second.center
        scale = self.second.scale
        standardized = ((values - center) / scale).where(observed, 0.0)
        known = torch.cat([standardized, observed.to(standardized.dtype)], -1).flatten(-2)
        inputs = torch.cat([known, latents.unsqueeze(-2).expand(*known.shape[:-1], -1)], -1)
        correction: Tensor = self.unmixer(inputs).view_as(standardized)
        return center + scale * (standardized + correction)

    def _add_evidence(
        self, names: tuple[str, ...], features: Tensor, shots: Shots
    ) -> dict[str, Natural]:
        """Add the evidence of all shots in which something is scored to the population, for some sites."""
        is_scored = shots.scored.flatten(2).any(-1)[..., None, None]
        population = self.prior.population().natural
        return {
            name: population[name] + self._evidence(name, features).where(is_scored, 0.0).sum(-3)
            for name in names
        }

    def _evidence(self, name: str, features: Tensor) -> Natural:
        family = self.prior.families[name]
        return family.evidence(self.heads[name](features).unflatten(-1, (family.n, family.k)))

    def _encode(self, encoder: SetEncoder, values: Trajectories, observed: Tensor | None) -> Tensor:
        """Encode every shot as a set of its own: (task, shot, features)."""
        shots = Shots.from_tensors(
            values[0, 0, :, 0],  # in place of times, which an encoder doesn't read
            values.flatten(0, 1).unsqueeze(1),
            observed=None if observed is None else observed.flatten(0, 1).unsqueeze(1),
        )
        features: Tensor = encoder(shots).unflatten(0, values.shape[:2])
        return features
