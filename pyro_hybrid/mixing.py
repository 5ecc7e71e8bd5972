"""Neural terms: Residual inside the vector field, Mixing from state to sensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ._checks import require
from ._types import Latent

__all__ = ["Mixing", "Residual"]


class Residual(nn.Module):
    r"""What the known equations leave out, as a function of the state (or time) and the neural latents.

    .. math:: f_N(x; z) = W_2 \tanh(W_1 [W_x x + W_z z + b]) \quad\text{or, if linear,}\quad
              f_N(x; z) = \varphi_0(x) + \sum_i z_i\, \varphi_i(x)

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
        self.first = nn.Linear(inputs, width)
        self.mix = nn.Linear(latents, width, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.last = nn.Linear(width, outputs * (latents + 1) if linear else outputs)
        with torch.no_grad():
            self.mix.weight.copy_(torch.randn_like(self.mix.weight) / math.sqrt(latents))
            self.last.weight.mul_(0.1 if linear else 0.3)
            self.last.bias.zero_()
        if linear:
            del self.mix

    def given(self, latents: Latent) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """The term of one task: latents ``(..., task, 1, latents)`` to a function of inputs ``(..., task, shot)``.

        The function returns a tensor for one output and a tuple for several.
        """
        require(latents.shape[-1] == self.latents, f"{self.latents} latents in the last axis", tuple(latents.shape),
                "Build the Residual with as many latents as its site has components.")
        z = latents.movedim(-1, 0)
        weight, bias = 2.0 * self.first.weight / self.scale, 2.0 * self.first.bias
        offset = bias.view(-1, *[1] * (z.dim() - 1))
        if not self.linear:
            offset = offset + 2.0 * torch.tensordot(self.mix.weight, z, 1)
        layers = [_folded(layer.weight, layer.bias) for layer in (*self.hidden, self.last)]

        def term(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            require(len(inputs) == self.inputs, f"{self.inputs} inputs", len(inputs), "Call the term as it was built.")
            x = torch.stack(torch.broadcast_tensors(*inputs))
            h = torch.sigmoid((weight @ x.flatten(1)).view(-1, *x.shape[1:]) + offset)
            shape = h.shape[1:]
            h = h.flatten(1)
            for w, b in layers[:-1]:
                h = torch.sigmoid(torch.addmm(2.0 * b, w + w, h))
            out = torch.addmm(layers[-1][1], layers[-1][0], h)
            if self.linear:
                out = out.view(self.latents + 1, self.outputs, *shape)
                out = out[0] + (out[1:] * z.unsqueeze(1)).sum(0)
            else:
                out = out.view(self.outputs, *shape)
            return out[0] if self.outputs == 1 else out.unbind(0)

        return term


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
