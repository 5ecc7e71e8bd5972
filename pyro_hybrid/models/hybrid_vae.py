"""HybridVAE: the physics-integrated VAE, over any system."""

from __future__ import annotations

from typing import Any

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
from pyro_hybrid.inference.prior import UnconditionalPrior
from pyro_hybrid.models.parts import build_residual, neural_force, sample_physics, split_state
from pyro_hybrid.models.physics_guide import PhysicsGuide, Reading
from pyro_hybrid.nets.hybrid_field import Force
from pyro_hybrid.nets.residual import Residual
from pyro_hybrid.programs.module import HybridModel
from pyro_hybrid.shapes import Times
from pyro_hybrid.systems import System

__all__ = ["HybridVAE"]


class HybridVAE(HybridModel):
    r"""Known equations, a neural force with latents of its own, and a prior that is the same for all tasks.

    .. math::
        z_P, z_N, z_B &\sim p(z), \qquad \dot y = f_P(y; z_P) + f_N(y; z_N), \qquad y_0 = \hat y_0 \\
        x &\sim \mathrm{Normal}(m, \sigma), \qquad m = g(y) + b(t, g(y); z_B)

    The prior of :class:`MetaHybridVAE` depends on the support; this prior doesn't. In the steps of a training
    (``episode.is_training``), three penalties tie the latents to the physics:

    .. math::
        R_1 = \tfrac12 \lVert (m - m_P) / \sigma \rVert^2, \qquad
        R_2 = \tfrac12 \lVert (\tilde x - m_P) / \sigma \rVert^2, \qquad
        R_3 = \tfrac12 \lVert (\hat u(m_P(u^*)) - u^*) / s \rVert^2

    Here :math:`m_P` is the prediction of the known equations alone, and :math:`\tilde x` is the trajectory that
    :class:`~pyro_hybrid.models.physics_guide.PhysicsGuide` estimates without the effect of the neural latents. From
    trajectories simulated with random latents :math:`u^*`, the guide estimates :math:`\hat u`, both in unconstrained
    coordinates of scale s.

    R₁ is the KL divergence between the prediction of the whole model and that of the known equations. With two neural
    terms it is a mean over the orders in which they can be left out. Its gradient reaches model and guide. R₂ and R₃
    train the guide alone, since :math:`m_P` is computed without gradient. Unlike in the paper, population and noise are
    learned. As in the paper, the weights of the penalties are relative to the likelihood.

    The guide reads the query and never the support. In the paper, the query is one trajectory:
    ``dataclasses.replace(tasks, num_support=shots - 1)`` are tasks of this kind. To read a support, pass it as the
    query: ``ph.draws(model, guide, ph.Episode(None, episode.support), n)``.

    References:
        Physics-Integrated Variational Autoencoders for Robust and Interpretable Generative Modeling (Takeishi and
        Kalousis, 2021), https://arxiv.org/abs/2102.13156

    Arguments:
        system: gives the known equations and where the neural force enters.
        latents: number of neural latents; by default as many as the system has.
        outside: number of latents of the correction b of the observation; 0 for no such correction.
        linear: whether the force is linear in its latents.
        discrepancy, unmixing, recovery: weights of R₁, R₂ and R₃.
        noise: initial value of the learned noise, in units of the system's noise.
        width, depth: size and number of the neural terms' hidden layers.
        substeps: number of solver steps between two observations; see :func:`~pyro_hybrid.solve`.
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
            "Leave a penalty out by a weight of 0.",
        )
        self.system = system
        self.substeps = substeps
        self.discrepancy = discrepancy
        self.unmixing = unmixing
        self.recovery = recovery
        num_latents = latents or len(system.unknown)
        sites = {**system.physics, "unknown": Normal(num_latents)}
        if outside:
            sites["outside"] = Normal(outside)
        self.prior = UnconditionalPrior(**sites)
        self.residual = build_residual(system, num_latents, linear=linear, width=width, depth=depth)
        self.correction = _build_correction(system, outside, width, depth) if outside else None
        self.encoder = PhysicsGuide(self.prior, system)
        self.noise = PyroParam(noise * torch.tensor(system.noise), constraints.positive)

    def guide(self) -> PhysicsGuide:
        """Return the guide, which is the model's own encoder, since two of the penalties train it."""
        return self.encoder

    def forward(self, episode: Episode) -> Tensor:
        p = self.prior(episode)
        query = episode.query
        is_penalized = episode.is_training and query.values is not None
        reading = self.encoder.read(episode) if is_penalized else None
        with episode.plate:
            physics = sample_physics(self.system, p)
            unknown = pyro.sample("unknown", p["unknown"])
            outside = pyro.sample("outside", p["outside"]) if "outside" in p else None

            inside = self.predict(physics, self.force(unknown), query)
            mean = self.correct(inside, outside, query.times)
            if reading is not None and self.discrepancy:
                bare = self.predict(physics, self.zero_force, query)
                without_force = self.correct(bare, outside, query.times)
                penalty = self.discrepancy_penalty(mean, inside, without_force, bare, reading)
                pyro.factor("discrepancy", -self.discrepancy * penalty)
            if reading is not None and self.unmixing:
                pyro.factor("unmixing", -self.unmixing * self.unmixing_penalty(physics, reading))
            if reading is not None and self.recovery:
                pyro.factor("recovery", -self.recovery * self.recovery_penalty(reading))
            x = dist.Normal(mean, self.noise).mask(query.scored)
            return pyro.sample("x", x.to_event(3), obs=query.values)

    def force(self, unknown: Tensor) -> Force:
        """Return the neural force of neural latents (..., task, component)."""
        return neural_force(self.system, self.residual, unknown)

    def zero_force(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return no force, in the form of the neural force."""
        zero = torch.zeros_like(inputs[-1])
        return zero if self.system.outputs == 1 else (zero,) * self.system.outputs

    def predict(self, physics: dict[str, Tensor], force: Force, shots: Shots) -> Tensor:
        """Solve the known equations with a force in them, and return the sensors without noise."""
        field = self.system.known(physics, force)
        start = split_state(self.system, shots.measured_initial)
        return self.system.observe(solve(field, start, shots.times, substeps=self.substeps))

    def correct(self, sensors: Tensor, outside: Tensor | None, times: Times) -> Tensor:
        """Add the neural correction of the observation to sensors (..., time, sensor), if there is one."""
        if self.correction is None or outside is None:
            return sensors
        shift = self.correction.given(outside[..., None, None, :])(times, *sensors.unbind(-1))
        if isinstance(shift, tuple):
            return sensors + torch.stack(shift, -1)
        return sensors + shift.unsqueeze(-1)

    def discrepancy_penalty(
        self,
        mean: Tensor,
        without_correction: Tensor,
        without_force: Tensor,
        bare: Tensor,
        reading: Reading,
    ) -> Tensor:
        """Compute R₁ of each task.

        Arguments:
            mean, without_correction, without_force, bare: predictions with both neural terms, without one of them, and
                with none.
            reading: what the guide has read.
        """
        pairs = [
            (without_correction, bare),
            (without_force, bare),
            (mean, without_correction),
            (mean, without_force),
        ]
        noise = self.noise.detach()
        squares = [((one - other) / noise).square().mean((-3, -2, -1)) for one, other in pairs]
        # Of segments too, the penalty is on the scale of all observations.
        return 0.25 * torch.stack(squares).sum(0) * reading.unmixed[0].numel()

    def unmixing_penalty(self, physics: dict[str, Tensor], reading: Reading) -> Tensor:
        """Compute R₂ of each task: the distance of the unmixed trajectories from the known equations' prediction."""
        with torch.no_grad():
            bare = self.predict(physics, self.zero_force, reading.shots)
        errors: Tensor = (reading.unmixed - bare) / self.noise.detach()
        return 0.5 * errors.square().sum((-3, -2, -1))

    def recovery_penalty(self, reading: Reading) -> Tensor:
        """Compute R₃ of each task: the guide's error about random latents that trajectories were simulated with."""
        families = self.system.physics
        with torch.no_grad():
            truth = self._random_physics(reading.unmixed)
            physics = {name: f.constrained(truth[name])[..., 0] for name, f in families.items()}
            bare = self.predict(physics, self.zero_force, reading.shots)
        estimates = self.encoder.recover_physics(bare)
        total = reading.unmixed.new_zeros(())
        for name, family in families.items():
            errors = (estimates[name] - truth[name]) / family.scale
            total = total + (0.5 * errors.square()).sum((-2, -1))
        return total

    def _random_physics(self, values: Tensor) -> dict[str, Tensor]:
        """Draw unconstrained physics latents for each shot, uniformly within two scales of their families."""
        latents = {}
        for name, family in self.system.physics.items():
            uniform = torch.rand(
                *values.shape[:2], family.n, dtype=values.dtype, device=values.device
            )
            latents[name] = family.loc + family.scale * (4.0 * uniform - 2.0)
        return latents


def _build_correction(system: System, num_latents: int, width: int, depth: int) -> Residual:
    """Build the correction of the sensors, a function of time and of the sensors; before training it is zero."""
    last_time = system.step * (system.points - 1)
    correction = Residual(
        1 + system.sensors,
        num_latents,
        system.sensors,
        width=width,
        depth=depth,
        scale=(last_time, *[1.0] * system.sensors),
    )
    nn.init.zeros_(correction.straight)
    nn.init.zeros_(correction.last.weight)
    return correction
