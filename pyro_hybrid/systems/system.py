"""What the systems have in common: ranges in one place, and simulation of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_hybrid.beliefs.belief import Gaussian
from pyro_hybrid.beliefs.families import Family, Normal
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots, require_shots
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.dynamics.slopes import Field
from pyro_hybrid.dynamics.solve import solve
from pyro_hybrid.errors import require
from pyro_hybrid.evidence.least_squares import LeastSquares, fisher_information
from pyro_hybrid.nets.hybrid_field import Force
from pyro_hybrid.shapes import State

__all__ = ["System"]


class System(ABC):
    """A simulator whose equations are partly known.

    Class attributes say everything in one place: ``ranges`` of every latent and initial component (uniform),
    ``physics`` (family of each physics latent), ``unknown`` (names of the true neural latents), ``inputs`` and
    ``outputs`` (rough sizes of what the force is called with, and how many components it returns), ``periodic`` whether
    the force oscillates in time, ``substeps`` of the simulation between two observations.
    """

    ranges: ClassVar[dict[str, tuple[float, float]]]
    physics: ClassVar[dict[str, Family]]
    unknown: ClassVar[tuple[str, ...]]
    inputs: ClassVar[tuple[float, ...]]
    outputs: ClassVar[int]
    grid: ClassVar[bool] = False
    periodic: ClassVar[bool] = False
    substeps: ClassVar[int] = 10
    step: float
    noise: tuple[float, ...]
    names: tuple[str, ...]
    start_noise: tuple[float, ...]
    points: int = 50

    @property
    def times(self) -> Tensor:
        """Observation times in float64."""
        return self.step * torch.arange(self.points, dtype=torch.float64)

    @property
    def components(self) -> int:
        """Number of components of the state."""
        return len(self.start_noise)

    @property
    def sensors(self) -> int:
        """Number of observed quantities."""
        return len(self.noise)

    @abstractmethod
    def known(self, physics: Mapping[str, Tensor], force: Force) -> Field:
        """The known equations, with the unknown ``force(...)`` where physics would put it.

        Physics latents have shape (..., task, 1), so that they broadcast with (..., task, shot).
        """

    @abstractmethod
    def truth(self, unknown: Tensor) -> Force:
        """The true force, of true neural latents (..., task, 1, component)."""

    @abstractmethod
    def initial(self, draw: Callable[[str], Tensor]) -> State:
        """Initial states from ``draw(name)``, uniform of shape (task, shot) in the range of that name."""

    def observe(self, states: Tensor) -> Tensor:
        """States (..., time, component) to noise-free sensors (..., time, sensor): the first components."""
        return states[..., : self.sensors]

    def measured(self, values: Tensor) -> Tensor:
        """What sensors say about the state at every time: centers for the inference of initial and restart states."""
        return values

    def full(self, latents: Mapping[str, Tensor]) -> Field:
        """The true equations, of latents (..., task, component) by name: the physics ones and ``unknown``."""
        physics = {name: latents[name][..., None, 0] for name in self.physics}
        return self.known(physics, self.truth(latents["unknown"][..., None, :]))

    def trajectories(self, latents: Mapping[str, Tensor], initial: State, times: Tensor) -> Tensor:
        """Noise-free sensors of the true system."""
        return self.observe(solve(self.full(latents), initial, times, substeps=self.substeps))

    def program(self, episode: Episode) -> Tensor:
        """The true system as a Pyro program, with flat priors: for reference posteriors and Cramér-Rao bounds."""
        measured = episode.query.measured_initial
        spread = measured.new_tensor(self.start_noise)

        def flat(site: str, *names: str) -> Tensor:
            bounds = measured.new_tensor([self.ranges[name] for name in names])
            return pyro.sample(site, dist.Uniform(bounds[:, 0], bounds[:, 1]).to_event(1))

        with episode.plate:
            latents = {name: flat(name, name) for name in self.physics} | {
                "unknown": flat("unknown", *self.unknown)
            }
            start = pyro.sample("initial", dist.Normal(measured, spread).to_event(2))
            states = solve(
                self.full(latents),
                start if self.grid else start.unbind(-1),
                episode.query.times,
                substeps=4,
            )
            x = dist.Normal(self.observe(states), measured.new_tensor(self.noise)).mask(
                episode.query.scored
            )
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)

    def cramer_rao(self, support: Shots, truth: Mapping[str, Tensor]) -> Tensor:
        """Smallest variance of an unbiased estimate of every latent from the support, (task, component).

        Computed from the true system at the true latents, the initial states being unknown but for their measurement.
        """
        require_shots(support, "a support")
        require(
            support.values is not None,
            "a support with values",
            "values=None",
            "Pass tasks.episode().support.",
        )
        families = {name: Normal(value.shape[-1]) for name, value in truth.items()}
        latents = torch.cat(list(truth.values()), -1).double()
        unit = latents.abs().mean(0).clamp(min=1e-12)
        flat = torch.diag_embed((1e-9 / unit.square()).expand_as(latents))
        belief = Gaussian.around(families, latents, flat)
        problem = LeastSquares(self.program, support.double(), belief, unit)
        information = fisher_information(problem, latents)
        bound: Tensor = torch.linalg.inv(information).diagonal(dim1=-2, dim2=-1)
        return bound

    def simulate(
        self, tasks: int, shots: int, seed: int, *, num_support: int | None = None
    ) -> Tasks:
        """Tasks with known truth, noise included; half of the shots are support unless ``num_support`` is given."""
        require(
            tasks >= 1 and shots >= 2,
            "at least one task of two shots",
            f"{tasks} of {shots}",
            "One shot conditions the prior, another is to be explained.",
        )
        random = torch.Generator().manual_seed(seed)

        def draw(name: str, *shape: int) -> Tensor:
            low, high = self.ranges[name]
            return low + (high - low) * torch.rand(*shape, generator=random, dtype=torch.float64)

        latents = {name: draw(name, tasks, 1) for name in self.physics}
        latents["unknown"] = torch.cat([draw(name, tasks, 1) for name in self.unknown], -1)
        initial = self.initial(lambda name: draw(name, tasks, shots))
        clean = self.trajectories(latents, initial, self.times)
        noise = torch.randn(clean.shape, generator=random, dtype=torch.float64) * torch.tensor(
            self.noise
        )
        values = (clean + noise).float()
        return Tasks.from_trajectories(
            self.times.float(),
            values,
            initial=self.measured(values),
            num_support=shots // 2 if num_support is None else num_support,
            true_latents={name: value.float() for name, value in latents.items()},
        )
