"""The support-conditioned hybrid pendulum in numpyro: RK4 in a scan, on whole trajectories. Needs the extra ``bench``.

Weights are a flat dictionary with the names that torch has for them, those of the guide after ``guide.``; what is
constant (standardisation, locations and scales of the families) is in it too. Optimizer, schedule and clipping are
those of ``ph.meta_train``. Two things aren't as one would write them first. Omega is sampled as its logarithm: numpyro
has no KL of LogNormals in closed form and would fall back on samples, torch has one, and it is that of the logarithms.
And the factor that trains the population ``prior.raw`` is here, though its one influence on the rest is that its
gradient counts in the norm by which gradients are clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import torch
from jax.lax import stop_gradient
from meta_rivals import Naive, loss_and_gradients, named, standardise
from numpyro.infer import SVI, TraceMeanField_ELBO
from numpyro.primitives import Messenger
from rivals_jax import scan_rk4

import pyro_hybrid as ph

Array = Any
Weights = dict[str, Array]
CONSTANT = "center", "scale", "loc", "periodic"


class Batch(NamedTuple):
    """An episode of whole trajectories: (task, shot, time, sensor) twice, (task, shot, component) and (time,)."""

    support: Array
    query: Array
    initial: Array
    times: Array


def batch(episode: ph.Episode) -> Batch:
    """A batch of ``tasks.batches(...)`` for JAX."""
    return Batch(
        *(
            x.numpy()
            for x in (
                episode.support.values,
                episode.query.values,
                episode.query.initial,
                episode.query.times,
            )
        )
    )


def weights(model: ph.models.MetaHybridVAE, guide: ph.AmortizedGuide) -> dict[str, np.ndarray]:
    """All that the numpyro program needs to begin where these two are; standardise their encoders before."""
    both = named(model, guide) | {"residual.scale": model.residual.scale}
    for name, encoder in (("prior", model.prior.network.encoder), ("guide", guide.network.encoder)):
        place = f"{name}.network.encoder"
        both |= {f"{place}.center": encoder.center, f"{place}.scale": encoder.scale}
    for key in ("loc", "scale"):
        values = [
            float(getattr(family, key))
            for family in model.prior.families.values()
            for _ in range(family.n)
        ]
        both[f"sites.{key}"] = torch.tensor(values, dtype=model.prior.raw.dtype)
    both["residual.periodic"] = torch.tensor(model.residual.periodic)
    return {name: value.detach().numpy().copy() for name, value in both.items()}


def linear(w: Weights, name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def encode(w: Weights, name: str, values: Array) -> Array:
    """The library's SetEncoder, where nothing is missing."""
    standard = (values - w[f"{name}.center"]) / w[f"{name}.scale"]
    each = jnp.concatenate([standard, jnp.ones_like(standard)], -1).reshape(*values.shape[:2], -1)
    each = linear(w, f"{name}.each.2", jax.nn.silu(linear(w, f"{name}.each.0", each)))
    size = jnp.full((len(values), 1), math.log(values.shape[1]), values.dtype)
    joint = jax.nn.silu(jnp.concatenate([each.mean(1), size], -1))
    return linear(w, f"{name}.joint.3", jax.nn.silu(linear(w, f"{name}.joint.1", joint)))


def located(w: Weights, raw: Array, widest: float) -> tuple[Array, Array]:
    """Location and spread that raw numbers stand for, all sites side by side: (..., component)."""
    place, width = jnp.moveaxis(raw.reshape(*raw.shape[:-1], -1, 2), -1, 0)
    bounded = width * jax.lax.rsqrt(1 + (width / jnp.where(width < 0, -8.0, widest)) ** 2)
    return w["sites.loc"] + w["sites.scale"] * place, w["sites.scale"] * jnp.exp(bounded)


def updated(
    w: Weights, mean: Array, scale: Array, head: str, features: Array
) -> tuple[Array, Array]:
    """Add the evidence of a head of the network to Normals, as mean and scale."""
    place, spread = located(w, linear(w, head, jax.nn.silu(features)), 8.0)
    precision = scale**-2 + spread**-2
    return (mean * scale**-2 + place * spread**-2) / precision, jax.lax.rsqrt(precision)


def prior(w: Weights, features: Array) -> tuple[Array, Array]:
    """The population, through which no gradient flows, plus the support's evidence."""
    population = located(w, stop_gradient(w["prior.raw"]), 2.0)
    return updated(w, *population, "prior.network.head.1", features)


def posterior(w: Weights, support: Array, query: Array) -> tuple[Array, Array]:
    """The prior's natural parameters plus the query's evidence, as mean and scale."""
    of_support = encode(w, "prior.network.encoder", support)
    both = jnp.concatenate([encode(w, "guide.network.encoder", query), of_support], -1)
    return updated(w, *prior(w, of_support), "guide.network.head.1", both)


def sample(
    mean: Array, scale: Array, measured: Array, start_noise: Array
) -> tuple[Array, Array, Array]:
    """Omega (task, 1), unknown (task, latent) and the initial states (task, shot, component)."""
    with numpyro.plate("task", len(mean)):
        log_omega = numpyro.sample("log_omega", dist.Normal(mean[:, :1], scale[:, :1]).to_event(1))
        unknown = numpyro.sample("unknown", dist.Normal(mean[:, 1:], scale[:, 1:]).to_event(1))
        initial = numpyro.sample("initial", dist.Normal(measured, start_noise).to_event(2))
        return jnp.exp(log_omega), unknown, initial


def divergence(mean: Array, scale: Array, to_mean: Array, to_scale: Array) -> Array:
    ratio = (scale / to_scale) ** 2
    return 0.5 * (ratio + ((mean - to_mean) / to_scale) ** 2 - 1.0 - jnp.log(ratio)).sum()


def term(w: Weights, t: Array, y: Array, z: Array) -> Array:
    """The library's Residual, batch first."""
    unit, hidden = jnp.sin if w["residual.periodic"] else jnp.tanh, 0
    x = jnp.concatenate([jnp.full((*y.shape[:-1], 1), t), y], -1) / w["residual.scale"]
    z = jnp.broadcast_to(z, (*y.shape[:-1], z.shape[-1]))
    u = jnp.concatenate([x, z, (z[..., :, None] * x[..., None, :]).reshape(*y.shape[:-1], -1)], -1)
    h = unit(linear(w, "residual.first", u))
    while f"residual.hidden.{hidden}.weight" in w:
        h, hidden = unit(linear(w, f"residual.hidden.{hidden}", h)), hidden + 1
    out = linear(w, "residual.last", h) + u @ w["residual.straight"].T
    return out[..., :1] + (out[..., 1:] * z).sum(-1, keepdims=True)


def program(start: Weights) -> tuple[Callable[..., None], Callable[..., None]]:
    """Model and guide, starting from these weights; both are called with the four fields of a Batch."""

    def read() -> Weights:
        return {
            name: value
            if name.rpartition(".")[2] in CONSTANT
            else numpyro.param(name, jnp.asarray(value))
            for name, value in start.items()
        }

    def model(support: Array, query: Array, initial: Array, times: Array) -> None:
        w = read()
        mean, scale = prior(w, encode(w, "prior.network.encoder", support))
        aside = divergence(
            stop_gradient(mean), stop_gradient(scale), *located(w, w["prior.raw"], 2.0)
        )
        numpyro.factor("proposals", stop_gradient(aside) - aside)
        omega, unknown, y = sample(mean, scale, initial, jnp.exp(w["start_noise_unconstrained"]))
        rate, z = omega[:, None] ** 2, unknown[:, None]

        def field(t: Array, y: Array) -> Array:
            return jnp.concatenate([y[..., 1:], term(w, t, y, z) - rate * jnp.sin(y[..., :1])], -1)

        states = jnp.moveaxis(scan_rk4(field, y, times)[1:], 0, -2)
        with numpyro.plate(
            "task", len(query)
        ):  # the first observation has become the initial state
            x = dist.Normal(states, jnp.exp(w["noise_unconstrained"])).to_event(3)
            numpyro.sample("x", x, obs=query[:, :, 1:])

    def guide(support: Array, query: Array, initial: Array, times: Array) -> None:
        w = read()
        sample(
            *posterior(w, support, query),
            initial,
            stop_gradient(jnp.exp(w["start_noise_unconstrained"])),
        )

    return model, guide


def schedule(learning_rate: float, steps: int) -> Callable[[Array], Array]:
    """That of ``ph.meta_train``."""

    def rate(step: Array) -> Array:
        rise = jnp.minimum(1.0, (step + 1) / (0.05 * steps))
        return learning_rate * rise * (0.02 + 0.49 * (1 + jnp.cos(jnp.pi * step / steps)))

    return rate


def clipped(most: float = 4.0) -> optax.GradientTransformation:
    """Gradients longer than so many times their running mean are shortened, as in ``ph.meta_train``."""

    def update(
        gradients: Weights, mean: Array, parameters: Weights | None = None
    ) -> tuple[Weights, Array]:
        norm, first = (
            jnp.sqrt(sum((gradient**2).sum() for gradient in jax.tree.leaves(gradients))),
            mean == 0.0,
        )
        limit = jnp.where(first, jnp.inf, most * mean)
        mean = jnp.where(first, norm, 0.95 * mean + 0.05 * jnp.minimum(norm, limit))
        shrink = jnp.minimum(1.0, limit / (norm + 1e-6))
        return jax.tree.map(lambda gradient: gradient * shrink, gradients), mean

    return optax.GradientTransformation(lambda parameters: jnp.zeros(()), update)


def stepper(
    start: Weights, learning_rate: float | Callable[[Array], Array]
) -> tuple[SVI, Callable[..., Any]]:
    """``svi.init(key, *batch) -> state`` and ``update(state, batch) -> (state, loss)``, compiled at its first call."""
    optimizer = optax.chain(clipped(), optax.adam(learning_rate, b1=0.9, b2=0.99))
    svi = SVI(*program(start), numpyro.optim.optax_to_numpyro(optimizer), TraceMeanField_ELBO())
    return svi, jax.jit(lambda state, batch: svi.update(state, *batch), donate_argnums=0)


@jax.jit
def prior_mean(w: Weights, support: Array) -> Array:
    """Means of (log omega, unknown) given the support alone; ``w = start | svi.get_params(state)``."""
    return prior(w, encode(w, "prior.network.encoder", support))[0]


class Noise(Messenger):
    """Reparametrised samples from given standard normal numbers."""

    def __init__(self, fn: Callable[..., None], noise: dict[str, Array]) -> None:
        super().__init__(fn)
        self.noise = noise

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["value"] is None and msg["name"] in self.noise:
            stock = msg["fn"].base_dist
            msg["value"] = stock.loc + stock.scale * self.noise[msg["name"]]


def agreement(tasks: int = 8, shots: int = 8, periodic: bool = True) -> dict[str, dict[str, float]]:
    """Relative differences from the library's loss and gradients, in float64 with the same random numbers.

    ``jax``: same integrator. ``naive``: dopri5 at its tolerance against RK4 of one step. ``naive refined``: both
    integrators refined, so that what remains isn't theirs.
    """
    torch.manual_seed(0)
    system = ph.systems.Pendulum()
    system.periodic = periodic
    model = ph.models.MetaHybridVAE(system, latents=4, linear=False, noise=10.0)
    data, guide = system.simulate(tasks, shots, seed=0), model.guide()
    standardise(model, guide, data)
    model.double(), guide.double()
    episode, start = data.episode().double(), weights(model, guide)
    shapes = {"omega": (tasks, 1), "unknown": (tasks, 4), "initial": episode.query.initial.shape}
    noise = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    numbers = {
        "log_omega" if name == "omega" else name: value.numpy() for name, value in noise.items()
    }

    def naive(tolerance: float) -> tuple[float, dict[str, Any]]:
        rival = Naive(model, tolerance)
        return loss_and_gradients(rival, rival.guide(guide), episode, noise)

    library = loss_and_gradients(model, guide, episode, noise)
    found = {
        "jax": _apart(_loss_and_gradients(start, batch(episode), numbers), library),
        "naive": _apart(naive(1e-5), library),
    }
    model.steps["substeps"] = 8
    return found | {
        "naive refined": _apart(naive(1e-9), loss_and_gradients(model, guide, episode, noise))
    }


def _loss_and_gradients(
    start: Weights, batch: Batch, noise: dict[str, Array]
) -> tuple[float, Weights]:
    learned = {
        name: value for name, value in start.items() if name.rpartition(".")[2] not in CONSTANT
    }
    model, guide = program(start)

    def loss(w: Weights) -> Array:
        return TraceMeanField_ELBO().loss(jax.random.key(0), w, model, Noise(guide, noise), *batch)

    with jax.enable_x64(True):
        value, gradients = jax.jit(jax.value_and_grad(loss))(learned)
    return float(value), gradients


def _apart(mine: tuple[float, Weights], library: tuple[float, Weights]) -> dict[str, float]:
    """Relative differences of the loss and, by name, of the gradients (largest over largest)."""
    assert mine[1].keys() == library[1].keys()
    pairs = {"loss": (mine[0], library[0])} | {
        name: (mine[1][name], library[1][name]) for name in library[1]
    }
    arrays = {name: tuple(np.asarray(x) for x in pair) for name, pair in pairs.items()}
    return {
        name: float(np.abs(a - b).max() / (np.abs(b).max() or 1.0))
        for name, (a, b) in arrays.items()
    }


if __name__ == "__main__":
    for version, differences in agreement().items():
        loss, (worst, most) = (
            differences.pop("loss"),
            max(differences.items(), key=lambda pair: pair[1]),
        )
        print(f"{version}: loss {loss:.1e}, gradients up to {most:.1e} ({worst})")
