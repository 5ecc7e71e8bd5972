"""The same hybrid pendulum in numpyro: RK4 in a scan, and diffrax. Needs the extra ``bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, TraceMeanField_ELBO
from rivals import LATENTS, NOISE, SCALE

import pyro_hybrid as ph

Array = Any
Field = Callable[[Array, Array], Array]


def network(w: dict[str, Array], x: Array, z: Array) -> Array:
    """The formula of ph.Residual, batch first."""
    u = jnp.concatenate([x, z, (z[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)], -1)
    h = jnp.tanh(u @ w["w1"].T + w["b1"])
    h = jnp.tanh(h @ w["w2"].T + w["b2"])
    out = h @ w["w3"].T + w["b3"] + u @ w["straight"].T
    return out[..., :1] + (out[..., 1:] * z).sum(-1, keepdims=True)


def posterior(e: dict[str, Array], query: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Mean and scale of the known equation's latent, and of the others, read by the encoder."""
    h = query.reshape(len(query), -1)
    for i in (0, 1):
        h = jax.nn.silu(h @ e[f"ew{i}"].T + e[f"eb{i}"])
    mean, raw = jnp.split(h @ e["ew2"].T + e["eb2"], 2, -1)
    scale = jnp.exp(raw - 3.0)
    return (mean[:, :1], scale[:, :1]), (mean[:, 1:], scale[:, 1:])


def parameters(start: dict[str, np.ndarray], encoder: bool) -> dict[str, Array]:
    """The encoder's parameters, or the program's."""
    return {
        name: numpyro.param(name, jnp.asarray(value))
        for name, value in start.items()
        if (name[0] == "e") == encoder
    }


def _scan(field: Field, y: Array, knots: Array) -> tuple[Array, Array]:
    @jax.checkpoint
    def step(y: Array, clock: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        t, h = clock
        k1 = field(t, y)
        k2 = field(t + h / 2, y + h / 2 * k1)
        k3 = field(t + h / 2, y + h / 2 * k2)
        k4 = field(t + h, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y, (y, k1)

    last, (path, slopes) = jax.lax.scan(step, y, (knots[:-1], jnp.diff(knots)))
    return jnp.concatenate([y[None], path]), slopes


def scan_rk4(field: Field, y: Array, times: Array) -> Array:
    """A step for each observation, nothing stored but the states."""
    return _scan(field, y, times)[0]


def scan_longer(number: int) -> Callable[[Field, Array, Array], Array]:
    """So many steps, and cubic Hermite interpolation: ``ph.solve(..., step=...)`` in JAX."""

    def integrate(field: Field, y: Array, times: Array) -> Array:
        knots = jnp.linspace(times[0], times[-1], number + 1)
        path, slopes = _scan(field, y, knots)
        slopes = jnp.concatenate([slopes, field(knots[-1], path[-1])[None]])
        h = knots[1] - knots[0]
        index = jnp.clip(jnp.searchsorted(knots, times, side="right") - 1, 0, number - 1)
        x = ((times - knots[index]) / h)[:, None, None]
        return (
            (1 + 2 * x) * (1 - x) ** 2 * path[index]
            + x * x * (3 - 2 * x) * path[index + 1]
            + h * x * (1 - x) ** 2 * slopes[index]
            + h * x * x * (x - 1) * slopes[index + 1]
        )

    return integrate


def adaptive(field: Field, y: Array, times: Array) -> Array:
    """diffrax with the naive program's tolerance."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: field(t, y)),
        diffrax.Dopri5(),
        times[0],
        times[-1],
        times[1] - times[0],
        y,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
    )
    return solution.ys


def weights(residual: ph.Residual, encoder: Any) -> dict[str, np.ndarray]:
    """The torch modules' weights by name; the encoder's names begin with an e."""
    tensors = {"straight": residual.straight}
    for i, layer in enumerate((residual.first, *residual.hidden, residual.last), 1):
        tensors |= {f"w{i}": layer.weight, f"b{i}": layer.bias}
    for i, layer in enumerate(layer for layer in encoder.net if hasattr(layer, "weight")):
        tensors |= {f"ew{i}": layer.weight, f"eb{i}": layer.bias}
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def stepper(
    start: dict[str, np.ndarray],
    integrate: Callable[..., Array],
    learning_rate: float,
    batch: tuple[np.ndarray, ...],
) -> Callable[[], float]:
    """A step of the pendulum's program, from these weights, at every call."""

    def sites(log_omega: tuple[Array, Array], z: tuple[Array, Array]) -> tuple[Array, Array]:
        return (
            numpyro.sample("log_omega", dist.Normal(*log_omega).to_event(1)),
            numpyro.sample("unknown", dist.Normal(*z).to_event(1)),
        )

    def model(times: Array, initial: Array, query: Array) -> None:
        w = parameters(start, encoder=False)
        with numpyro.plate("task", len(query)):
            log_omega, z = sites((jnp.full(1, 0.6), 0.4), (jnp.zeros(LATENTS), 1.0))
            rate = jnp.exp(2.0 * log_omega)

            def field(t: Array, y: Array) -> Array:
                x = jnp.concatenate([jnp.full((len(y), 1), t), y], -1) / jnp.array(SCALE)
                return jnp.concatenate([y[:, 1:], -rate * jnp.sin(y[:, :1]) + network(w, x, z)], -1)

            states = jnp.swapaxes(integrate(field, initial, times), 0, 1)
            numpyro.sample("x", dist.Normal(states, NOISE).to_event(2), obs=query)

    def guide(times: Array, initial: Array, query: Array) -> None:
        log_omega, z = posterior(parameters(start, encoder=True), query)
        with numpyro.plate("task", len(query)):
            sites(log_omega, z)

    return stepping(model, guide, learning_rate, batch)


def stepping(
    model: Callable[..., None],
    guide: Callable[..., None],
    learning_rate: float,
    batch: tuple[np.ndarray, ...],
) -> Callable[[], float]:
    """One compiled SVI step on this batch at every call."""
    svi = SVI(model, guide, numpyro.optim.Adam(learning_rate), TraceMeanField_ELBO())
    update = jax.jit(lambda state: svi.update(state, *batch), donate_argnums=0)
    state = svi.init(jax.random.PRNGKey(0), *batch)

    def step() -> float:
        nonlocal state
        state, loss = update(state)
        return float(loss)

    return step
