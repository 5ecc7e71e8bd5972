"""One hybrid model on a grid, written the ways people write it: what ``grid_step.py`` and ``scaling.py`` compare.

    T_t = a T_ss + f(T, T_s; z),   f(x; z) = z-weighted outputs of a 64-64 tanh network, at every inner point

Two latent sites, log a ~ Normal(-3, 0.6) and z ~ Normal(0, 1)^3; the guide is a mean field whose parameters an MLP
reads off the whole trajectory; 50 observations of 20 points, the initial state being measured. All versions start from
the same weights and have the same loss, so that they differ in speed only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import rivals
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_hybrid as ph

INPUTS, LATENTS, WIDTH, SIZE, POINTS = 2, 3, 64, 20, 50
LOC, SPREAD, NOISE = -3.0, 0.6, 0.02  # prior of the diffusion's logarithm; noise of the likelihood

Field = Callable[[Tensor, Tensor], Tensor]


def queries(tasks: int, seed: int = 0, size: int = SIZE) -> ph.Episode:
    """Tasks of advection and diffusion, one query shot each."""
    episode = ph.systems.AdvectionDiffusion(size).simulate(tasks, 2, seed).episode()
    return part(episode, torch.arange(tasks))


def part(episode: ph.Episode, index: Tensor) -> ph.Episode:
    """The first query shot of some tasks."""
    query = episode.query
    shots = ph.Shots.from_tensors(query.times, query.values[index, :1], query.initial[index, :1])
    return ph.Episode(None, shots)


def residual() -> ph.Residual:
    """The neural term that all versions start from."""
    return ph.Residual(INPUTS, LATENTS, 1, width=WIDTH, depth=2)


def encoder(size: int = SIZE) -> rivals.Encoder:
    """The pendulum's, for a grid; it begins at the prior's location, where steps are stable."""
    made = rivals.Encoder(POINTS * size // 2, LATENTS)  # it expects two sensors
    with torch.no_grad():
        made.net[-1].bias[0] += LOC
    return made


class Guide(PyroModule):
    """Mean field, amortised."""

    def __init__(self, encoder: rivals.Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, episode: ph.Episode) -> None:
        mean, scale = self.encoder(episode.query.values)
        with episode.plate:
            pyro.sample("log_diffusion", dist.Normal(mean[:, :1], scale[:, :1]).to_event(1))
            pyro.sample("unknown", dist.Normal(mean[:, 1:], scale[:, 1:]).to_event(1))


class Ours(ph.HybridModel):
    """The program with ph.solve, ph.Residual and the known equation of ph.systems."""

    def __init__(self, residual: ph.Residual, size: int = SIZE, **options: object) -> None:
        super().__init__()
        self.residual, self.system, self.options = (
            residual,
            ph.systems.AdvectionDiffusion(size),
            options,
        )

    def forward(self, episode: ph.Episode) -> None:
        with episode.plate:
            log_diffusion = pyro.sample(
                "log_diffusion", dist.Normal(torch.full((1,), LOC), SPREAD).to_event(1)
            )
            z = pyro.sample("unknown", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            field = self.system.known(
                {"diffusion": log_diffusion.exp()}, self.residual.given(z[..., None, None, :])
            )
            shots = episode.query
            states = ph.solve(field, shots.initial, shots.times, **self.options)
            pyro.sample("x", dist.Normal(states, NOISE).to_event(3), obs=shots.values)


class PlainTerm(nn.Module):
    """The neural term, of temperature and slope (task, point)."""

    def __init__(self, like: ph.Residual) -> None:
        super().__init__()
        self.network = rivals.Network(like)

    def forward(self, temperature: Tensor, slope: Tensor, z: Tensor) -> Tensor:
        z = z.unsqueeze(-2).expand(-1, temperature.shape[-1], -1)
        return self.network(torch.stack([temperature, slope], -1), z).squeeze(-1)


def plain_field(term: nn.Module, diffusion: Tensor, z: Tensor) -> Field:
    """The right-hand side of states (task, point)."""
    width = ph.systems.AdvectionDiffusion.width

    def field(t: Tensor, y: Tensor) -> Tensor:
        left, here, right = y[:, :-2], y[:, 1:-1], y[:, 2:]
        bend, slope = (left - 2 * here + right) / width**2, (right - left) / (2 * width)
        return nn.functional.pad(diffusion * bend + term(here, slope, z), (1, 1))

    return field


class Plain(PyroModule):
    """A plain Pyro program around an integrator of plain tensors (task, point)."""

    def __init__(self, term: PlainTerm, integrate: Callable[..., Tensor]) -> None:
        super().__init__()
        self.term, self.integrate = term, integrate

    def forward(self, episode: ph.Episode) -> None:
        with episode.plate:
            log_diffusion = pyro.sample(
                "log_diffusion", dist.Normal(torch.full((1,), LOC), SPREAD).to_event(1)
            )
            z = pyro.sample("unknown", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            field = plain_field(self.term, log_diffusion.exp(), z)
            states = (
                self.integrate(field, episode.query.initial[:, 0], episode.query.times)
                .transpose(0, 1)
                .unsqueeze(1)
            )
            pyro.sample("x", dist.Normal(states, NOISE).to_event(3), obs=episode.query.values)


def numpyro_stepper(
    start: dict[str, np.ndarray],
    integrate: Callable[..., Any],
    learning_rate: float,
    episode: ph.Episode,
) -> Callable[[], float]:
    """One compiled SVI step of the same program in numpyro at every call. Needs the extra ``bench``."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as ndist
    from rivals_jax import network, parameters, posterior, stepping

    width = ph.systems.AdvectionDiffusion.width
    batch = (
        episode.query.times.numpy(),
        episode.query.initial[:, 0].numpy(),
        episode.query.values[:, 0].numpy(),
    )

    def sites(log_diffusion: Any, z: Any) -> tuple[Any, Any]:
        return (
            numpyro.sample("log_diffusion", ndist.Normal(*log_diffusion).to_event(1)),
            numpyro.sample("unknown", ndist.Normal(*z).to_event(1)),
        )

    def term(w: dict[str, Any], here: Any, slope: Any, z: Any) -> Any:
        z = jnp.broadcast_to(z[:, None], (*here.shape, LATENTS))
        return network(w, jnp.stack([here, slope], -1), z)[..., 0]

    def model(times: Any, initial: Any, query: Any) -> None:
        w = parameters(start, encoder=False)
        with numpyro.plate("task", len(query)):
            log_diffusion, z = sites((jnp.full(1, LOC), SPREAD), (jnp.zeros(LATENTS), 1.0))
            diffusion = jnp.exp(log_diffusion)

            def field(t: Any, y: Any) -> Any:
                left, here, right = y[:, :-2], y[:, 1:-1], y[:, 2:]
                bend, slope = (left - 2 * here + right) / width**2, (right - left) / (2 * width)
                return jnp.pad(diffusion * bend + term(w, here, slope, z), ((0, 0), (1, 1)))

            states = jnp.swapaxes(integrate(field, initial, times), 0, 1)
            numpyro.sample("x", ndist.Normal(states, NOISE).to_event(2), obs=query)

    def guide(times: Any, initial: Any, query: Any) -> None:
        log_diffusion, z = posterior(parameters(start, encoder=True), query)
        with numpyro.plate("task", len(query)):
            sites(log_diffusion, z)

    return stepping(model, guide, learning_rate, batch)
