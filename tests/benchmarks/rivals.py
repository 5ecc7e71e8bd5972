"""One hybrid pendulum, written the ways people write it: what the benchmarks compare.

    theta'' = -omega^2 sin theta + f(t, theta, theta'; z),   f(t, x; z) = z-weighted outputs of a 64-64 tanh network

Two latent sites, log omega ~ Normal(0.6, 0.4) and z ~ Normal(0, 1)^3; the guide is a mean field whose parameters an MLP
reads off the whole trajectory; 50 observations of angle and speed, the initial state being measured. All versions start
from the same weights and have the same loss (a test holds them to it), so that they differ in speed only.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
import torchdiffeq
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_hybrid as ph

INPUTS, LATENTS, WIDTH, HIDDEN, POINTS = 3, 3, 64, 128, 50
SCALE, NOISE, STEP = (0.5, 1.5, 2.0), 0.1, 0.1


def data(tasks: int, points: int = POINTS, seed: int = 0) -> ph.Tasks:
    """Tasks of the pendulum, two shots each."""
    system = ph.systems.Pendulum()
    system.points = points
    return system.simulate(tasks, 2, seed)


class Encoder(nn.Module):
    """A trajectory (task, 1, time, sensor) to mean and scale of omega's logarithm and of the unknowns."""

    def __init__(self, points: int = POINTS, latents: int = LATENTS) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(1),
            nn.Linear(2 * points, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, 2 * (1 + latents)),
        )

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.net(query).chunk(2, -1)
        return mean, (raw - 3.0).exp()


class Guide(PyroModule):
    """Mean field, amortised."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, episode: ph.Episode) -> None:
        mean, scale = self.encoder(episode.query.values)
        with episode.plate:
            pyro.sample("log_omega", dist.Normal(mean[:, :1], scale[:, :1]).to_event(1))
            pyro.sample("unknown", dist.Normal(mean[:, 1:], scale[:, 1:]).to_event(1))


def latents(episode: ph.Episode) -> tuple[Tensor, Tensor]:
    """The prior's two sites."""
    ones = episode.query.times.new_ones(1 + LATENTS)
    return (
        pyro.sample("log_omega", dist.Normal(0.6 * ones[:1], 0.4).to_event(1)),
        pyro.sample("unknown", dist.Normal(0.0 * ones[1:], 1.0).to_event(1)),
    )


class Network(nn.Module):
    """The network of ph.Residual as one would write it: batch first, nn.Linear, torch.tanh."""

    def __init__(self, like: ph.Residual) -> None:
        super().__init__()
        features = like.first.in_features
        self.net = nn.Sequential(
            nn.Linear(features, WIDTH),
            nn.Tanh(),
            nn.Linear(WIDTH, WIDTH),
            nn.Tanh(),
            nn.Linear(WIDTH, like.last.out_features),
        )
        self.straight = nn.Linear(features, like.last.out_features, bias=False)
        for mine, its in zip(
            (self.net[0], self.net[2], self.net[4]),
            (like.first, *like.hidden, like.last),
            strict=True,
        ):
            mine.load_state_dict(its.state_dict())
        self.straight.weight.data.copy_(like.straight.data)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Inputs (..., input) and latents (..., latent), concatenated with their products."""
        u = torch.cat([x, z, (z.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)], -1)
        out = self.net(u) + self.straight(u)
        return out[..., :1] + (out[..., 1:] * z).sum(-1, keepdim=True)


class PlainTerm(nn.Module):
    """The neural term, of time and state (task, component)."""

    def __init__(self, like: ph.Residual) -> None:
        super().__init__()
        self.network = Network(like)
        self.register_buffer("scale", torch.tensor(SCALE))

    def forward(self, t: Tensor, state: Tensor, z: Tensor) -> Tensor:
        return self.network(torch.cat([t.expand(len(state), 1), state], -1) / self.scale, z)


def plain_rk4(field: Callable[[Tensor, Tensor], Tensor], y: Tensor, times: Tensor) -> Tensor:
    """The textbook's loop."""
    path = [y]
    for t0, t1 in zip(times[:-1], times[1:], strict=True):
        h = t1 - t0
        k1 = field(t0, y)
        k2 = field(t0 + h / 2, y + h / 2 * k1)
        k3 = field(t0 + h / 2, y + h / 2 * k2)
        k4 = field(t1, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        path.append(y)
    return torch.stack(path)


def dopri5(field: Callable[[Tensor, Tensor], Tensor], y: Tensor, times: Tensor) -> Tensor:
    return torchdiffeq.odeint(field, y, times, method="dopri5", rtol=1e-5, atol=1e-5)


def rk4(field: Callable[[Tensor, Tensor], Tensor], y: Tensor, times: Tensor) -> Tensor:
    return torchdiffeq.odeint(field, y, times, method="rk4")


class Plain(PyroModule):
    """A plain Pyro program around an integrator of plain tensors (task, component)."""

    def __init__(self, term: PlainTerm, integrate: Callable[..., Tensor]) -> None:
        super().__init__()
        self.term, self.integrate = term, integrate

    def forward(self, episode: ph.Episode) -> None:
        with episode.plate:
            log_omega, z = latents(episode)
            rate = (2.0 * log_omega).exp()

            def field(t: Tensor, y: Tensor) -> Tensor:
                angle, speed = y[:, :1], y[:, 1:]
                return torch.cat([speed, -rate * torch.sin(angle) + self.term(t, y, z)], -1)

            y = episode.query.initial[:, 0]
            states = self.integrate(field, y, episode.query.times).transpose(0, 1).unsqueeze(1)
            pyro.sample("x", dist.Normal(states, NOISE).to_event(3), obs=episode.query.values)


class Ours(ph.HybridModel):
    """The same program with ph.solve and ph.Residual."""

    def __init__(self, residual: ph.Residual, **options: object) -> None:
        super().__init__()
        self.residual, self.options = residual, options

    def forward(self, episode: ph.Episode) -> None:
        with episode.plate:
            log_omega, z = latents(episode)
            rate, push = (2.0 * log_omega).exp(), self.residual.given(z[..., None, :])

            def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                angle, speed = state
                return speed, -rate * angle.sin() + push(t, angle, speed)

            shots = episode.query
            states = ph.solve(field, shots.initial.unbind(-1), shots.times, **self.options)
            pyro.sample("x", dist.Normal(states, NOISE).to_event(3), obs=shots.values)


def residual() -> ph.Residual:
    """The neural term that all versions start from."""
    return ph.Residual(INPUTS, LATENTS, 1, width=WIDTH, depth=2, scale=SCALE)
