"""The support-conditioned hybrid pendulum, written by hand: plain torch around torchdiffeq, on whole trajectories.

    theta'' = -omega^2 sin theta + f(t, theta, theta'; z),   omega, z ~ p(. | support),   y_0 ~ Normal(measured, s)

The program is that of ``ph.models.MetaHybridVAE(ph.systems.Pendulum(), latents=4, linear=False)`` without computed
evidence, and begins from its weights, but what it shares with the library is only what isn't measured: the encoders,
the prior and the loss. ``meta_rivals_jax`` has it in numpyro, and holds all three to the same loss and gradients.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torchdiffeq
from pyro.distributions import constraints
from pyro.nn import PyroParam
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.functional import linear

import pyro_hybrid as ph


class PlainTerm(nn.Module):
    """The formula of ph.Residual as one would write it: batch first, nn.Linear, latents concatenated."""

    def __init__(self, like: ph.Residual) -> None:
        super().__init__()
        outputs, features = like.straight.shape
        width, self.unit = len(like.first.bias), torch.sin if like.periodic else torch.tanh
        self.first = nn.Linear(features, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in like.hidden)
        self.last = nn.Linear(width, outputs)
        self.straight = nn.Parameter(torch.empty(outputs, features))
        self.register_buffer("scale", torch.empty_like(like.scale))
        self.load_state_dict(like.state_dict())

    def forward(self, t: Tensor, state: Tensor, z: Tensor) -> Tensor:
        x = torch.cat([t.expand(*state.shape[:-1], 1), state], -1) / self.scale
        z = z.expand(*x.shape[:-1], -1)
        u = torch.cat([x, z, (z.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)], -1)
        h = self.unit(self.first(u))
        for layer in self.hidden:
            h = self.unit(layer(h))
        out = self.last(h) + linear(u, self.straight)
        return out[..., :1] + (out[..., 1:] * z).sum(-1, keepdim=True)


class Naive(ph.HybridModel):
    """The pendulum's program around torchdiffeq, with weights of its own that begin as those of ``model``."""

    noise: Any
    start_noise: Any

    def __init__(self, model: ph.models.MetaHybridVAE, tolerance: float = 1e-5) -> None:
        super().__init__()
        self.tolerance = tolerance
        self.prior = ph.SupportPrior(model.encoder(), **model.prior.families).to(model.prior.raw)
        self.residual = PlainTerm(model.residual).to(model.prior.raw)
        self.noise = PyroParam(torch.ones_like(model.noise), constraints.positive)
        self.start_noise = PyroParam(torch.ones_like(model.start_noise), constraints.positive)
        state = model.state_dict()
        self.load_state_dict({name: state[name] for name in self.state_dict()})

    def guide(self, like: ph.AmortizedGuide) -> Guide:
        """A guide for this program that begins as ``like``."""
        return Guide(self, like)

    def forward(self, episode: ph.Episode) -> None:
        p = self.prior(episode)
        with episode.plate:
            omega = pyro.sample("omega", p["omega"])
            unknown = pyro.sample("unknown", p["unknown"])
            start = pyro.sample(
                "initial", dist.Normal(episode.query.initial, self.start_noise).to_event(2)
            )
            rate, z = (
                omega.unsqueeze(-2) ** 2,
                unknown.unsqueeze(-2),
            )  # (task, 1, component), for all shots

            def field(t: Tensor, y: Tensor) -> Tensor:
                angle, speed = y[..., :1], y[..., 1:]
                return torch.cat([speed, self.residual(t, y, z) - rate * torch.sin(angle)], -1)

            states = torchdiffeq.odeint(
                field,
                start,
                episode.query.times,
                method="dopri5",
                rtol=self.tolerance,
                atol=self.tolerance,
            ).movedim(0, -2)
            x = dist.Normal(states, self.noise).mask(episode.query.scored)
            pyro.sample("x", x.to_event(3), obs=episode.query.values)


class Guide(nn.Module):
    """The library's guide; that initial states keep their prior is written out, instead of asked of the program.

    The library asks by running the program with ``ph.solve`` standing still, which torchdiffeq doesn't: the naive way
    would be charged for two more integrations.
    """

    def __init__(self, model: Naive, like: ph.AmortizedGuide) -> None:
        super().__init__()
        self.model = model
        same = like.network.encoder
        encoder = ph.SetEncoder(same.num_sensors, same.num_times, same.num_features)
        self.amortized = ph.AmortizedGuide(model, encoder).to(model.prior.raw)
        self.amortized.network.load_state_dict(like.network.state_dict())

    def forward(self, episode: ph.Episode) -> None:
        with episode.plate:
            for name, fn in self.amortized.belief(episode).distributions().items():
                pyro.sample(name, fn)
            start_noise = self.model.start_noise.detach()
            pyro.sample("initial", dist.Normal(episode.query.initial, start_noise).to_event(2))


def standardise(model: nn.Module, guide: nn.Module, tasks: ph.Tasks) -> None:
    """What ``ph.meta_train`` does first: encoders take centre and scale of each sensor from the training tasks."""
    for module in {*model.modules(), *guide.modules()}:
        if isinstance(module, ph.SetEncoder):
            module.standardize(tasks.values, tasks.observed)


def named(model: nn.Module, guide: ph.AmortizedGuide) -> dict[str, Tensor]:
    """Every parameter of a program and of the library's guide, once, by the name that all versions know it by."""
    own = {
        f"guide.{name}": p for name, p in guide.named_parameters() if not name.startswith("model.")
    }
    return dict(model.named_parameters()) | own


class Noise(Messenger):
    """Reparametrised samples from given standard normal numbers, so that versions can be compared to rounding."""

    def __init__(self, noise: dict[str, Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["value"] is None and msg["name"] in self.noise:
            stock = msg["fn"]
            while isinstance(stock, torch.distributions.Independent):
                stock = stock.base_dist
            value = stock.loc + stock.scale * self.noise[msg["name"]]
            msg["value"] = value.exp() if isinstance(stock, dist.LogNormal) else value


def loss_and_gradients(
    model: nn.Module, guide: nn.Module, episode: ph.Episode, noise: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """The loss of ``ph.SVI`` with these standard normal numbers, and its gradients by name."""
    svi = ph.SVI(
        model,
        guide,
        torch.optim.SGD(dict.fromkeys([*model.parameters(), *guide.parameters()]), lr=0.0),
    )
    with Noise(noise):
        loss = float(svi.backward(episode))
    parameters = named(model, guide.amortized if isinstance(guide, Guide) else guide)
    return loss, {name: p.grad for name, p in parameters.items()}
