"""Neural terms: Residual inside the vector field, Mixing from state to sensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ._checks import require
from ._types import Latent

__all__ = ["Mixing", "Residual"]


class Residual(nn.Module):
    r"""What the known equations leave out, as a function of the state (or time) and the neural latents.

    .. math:: f_N(x; z) = \varphi_0(u) + \sum_i z_i\, \varphi_i(u), \qquad \varphi_i(u) = V_i u + U_i\, \mathrm{MLP}(u)

    with features :math:`u = x` if ``linear``, and :math:`u = (x, z, z \otimes x)` otherwise: products of latents and
    inputs come for free, and a latent that is a rate, a frequency or a size enters as what it is, linearly.

    With ``linear=True`` whatever stays ambiguous about the latents is linear too, as the theorem says it should be.
    Features come first in memory and tanh is folded into a sigmoid: on a CPU both are several times faster.

    Arguments:
        inputs: number of arguments that the term is called with.
        latents: number of neural latents.
        outputs: number of components returned.
        linear: whether the term is linear in the latents.
        width, depth: size and number of the hidden layers.
        scale: rough size of each input, by which it is divided.

    >>> _ = torch.manual_seed(0)
    >>> push = Residual(inputs=2, latents=3, outputs=1).given(torch.zeros(5, 1, 3))
    >>> push(torch.tensor(0.0), torch.ones(5, 4)).shape
    torch.Size([5, 4])
    """

    def __init__(self, inputs: int, latents: int, outputs: int, linear: bool = False, *, width: int = 32, depth: int = 2,
                 scale: tuple[float, ...] | None = None) -> None:
        super().__init__()
        require(depth >= 1, "a depth of 1 or more", depth, "Use at least one hidden layer.")
        require(scale is None or len(scale) == inputs, f"{inputs} scales", scale, "Give one scale for each input.")
        self.inputs, self.latents, self.outputs, self.linear = inputs, latents, outputs, linear
        self.register_buffer("scale", torch.tensor(scale or (1.0,) * inputs))
        features = inputs if linear else inputs + latents + inputs * latents
        self.first = nn.Linear(features, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.last = nn.Linear(width, outputs * (latents + 1))
        self.straight = nn.Parameter(0.1 * torch.randn(self.last.out_features, features))
        with torch.no_grad():
            self.last.weight.mul_(0.1)
            self.last.bias.zero_()

    def given(self, latents: Latent) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """The term of one task: latents ``(..., task, 1, latents)`` to a function of inputs ``(..., task, shot)``.

        The function returns a tensor for one output and a tuple for several.
        """
        require(latents.shape[-1] == self.latents, f"{self.latents} latents in the last axis", tuple(latents.shape),
                "Build the Residual with as many latents as its site has components.")
        z = latents.movedim(-1, 0)
        layers = [_folded(layer.weight, layer.bias) for layer in (*self.hidden, self.last)]
        scale = self.scale.view(-1, *[1] * (z.dim() - 1))

        def term(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            require(len(inputs) == self.inputs, f"{self.inputs} inputs", len(inputs), "Call the term as it was built.")
            u = torch.stack(torch.broadcast_tensors(*inputs)) / scale
            if not self.linear:
                u = _with_products(u, z)
            shape = u.shape[1:]
            u = u.flatten(1)
            h = torch.sigmoid(torch.addmm(2.0 * self.first.bias.unsqueeze(1), 2.0 * self.first.weight, u))
            for w, b in layers[:-1]:
                h = torch.sigmoid(torch.addmm(2.0 * b, 2.0 * w, h))
            out = torch.addmm(torch.addmm(layers[-1][1], layers[-1][0], h), self.straight, u)
            out = out.view(self.latents + 1, self.outputs, *shape)
            out = out[0] + (out[1:] * z.unsqueeze(1)).sum(0)
            return out[0] if self.outputs == 1 else out.unbind(0)

        return term


def _with_products(x: Tensor, z: Tensor) -> Tensor:
    """Inputs, latents and their products, features first."""
    products = z.unsqueeze(1) * x
    shape = products.shape[2:]
    return torch.cat([x.expand(-1, *shape), z.expand(-1, *shape), products.flatten(0, 1)])


def _folded(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(a) = 2 sigmoid(2a) - 1: the 2 and the -1 go into the next layer."""
    return 2.0 * weight, (bias - weight.sum(1)).unsqueeze(1)


class Mixing(nn.Module):
    r"""From state to sensors where the instrument is unknown: :math:`g(y) = y W + b + \tanh(y U + c) V`.

    Arguments:
        components: number of state components.
        sensors: number of observed quantities.
        width: size of the nonlinear part; 0 for a linear instrument.
    """

    def __init__(self, components: int, sensors: int, width: int = 0) -> None:
        super().__init__()
        self.straight = nn.Linear(components, sensors)
        self.bent = nn.Sequential(nn.Linear(components, width), nn.Tanh(), nn.Linear(width, sensors)) if width else None

    def forward(self, states: Tensor) -> Tensor:
        """States ``(..., component)`` to sensors ``(..., sensor)``."""
        straight = self.straight(states)
        return straight if self.bent is None else straight + self.bent(states)
