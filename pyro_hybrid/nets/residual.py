"""Residual: a neural term inside the vector field."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_hybrid.errors import require
from pyro_hybrid.shapes import Latent

__all__ = ["Residual"]


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
        periodic: sine units instead of tanh, for a term that oscillates; divide time by a fraction of its period.

    >>> _ = torch.manual_seed(0)
    >>> push = Residual(inputs=2, latents=3, outputs=1).given(torch.zeros(5, 1, 3))
    >>> push(torch.tensor(0.0), torch.ones(5, 4)).shape
    torch.Size([5, 4])
    """

    def __init__(
        self,
        inputs: int,
        latents: int,
        outputs: int,
        linear: bool = False,
        *,
        width: int = 32,
        depth: int = 2,
        scale: tuple[float, ...] | None = None,
        periodic: bool = False,
    ) -> None:
        super().__init__()
        sizes = inputs, latents, outputs, width, depth
        require(
            min(sizes) >= 1,
            "inputs, latents, outputs, width and depth of 1 or more",
            sizes,
            "Where nothing is unknown, leave the Residual out.",
        )
        require(
            scale is None or len(scale) == inputs and min(scale) > 0.0,
            f"{inputs} positive scales",
            scale,
            "Give the rough size of each input.",
        )
        self.inputs, self.latents, self.outputs = inputs, latents, outputs
        self.linear, self.periodic = linear, periodic
        self.register_buffer("scale", torch.tensor(scale or (1.0,) * inputs))
        features = inputs if linear else inputs + latents + inputs * latents
        self.first = nn.Linear(features, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.last = nn.Linear(width, outputs * (latents + 1))
        self.output = ForceOutput()
        self.straight = nn.Parameter(0.1 * torch.randn(self.last.out_features, features))
        with torch.no_grad():
            self.last.weight.mul_(0.1)
            self.last.bias.zero_()
            for weight in (
                self.first.weight,
                self.straight,
            ):  # begin almost linear in the latents: unknotted
                weight[:, inputs:] *= 0.1

    def given(self, latents: Latent) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """Return the term at latents ``(..., task, 1, latents)``, as a function of inputs ``(..., task, shot)``.

        The function returns a tensor for one output and a tuple for several.
        """
        require(
            latents.shape[-1] == self.latents,
            f"{self.latents} latents in the last axis",
            tuple(latents.shape),
            "Build the Residual with as many latents as its site has components.",
        )
        z, (first, straight, last, hidden) = latents.movedim(-1, 0), self._matrices()
        one, unit = latents.new_ones(()), torch.sin if self.periodic else torch.sigmoid
        one_and_z = torch.cat([torch.ones_like(z[:1]), z])

        def term(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            require(
                len(inputs) == self.inputs,
                f"{self.inputs} inputs",
                len(inputs),
                "Call the term as it was built.",
            )
            u = torch.stack(torch.broadcast_tensors(one, *inputs, z[0])[:-1])
            shape, weights = u.shape[1:], _like(u, one_and_z).unsqueeze(1)
            u = (u if self.linear else weights * u).reshape(first.shape[1], -1)
            h = unit(first @ u)
            for weight, bias in hidden:
                h = unit(torch.addmm(bias, weight, h))
            out = torch.addmm(straight @ u, last, h).view(self.latents + 1, self.outputs, *shape)
            values: Tensor = self.output((weights * out).sum(0), z, inputs)
            return values[0] if self.outputs == 1 else values.unbind(0)

        return term

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """First, straight and last matrix, and the layers between.

        tanh(a) = 2 sigmoid(2a) - 1, whose twos and one go into the layers around it.
        """
        layers = [(layer.weight, layer.bias) for layer in (self.first, *self.hidden, self.last)]
        if not self.periodic:
            after = [(2.0 * w, b - w.sum(1)) for w, b in layers[1:]]
            layers = [(2.0 * w, 2.0 * b) for w, b in (layers[0], *after[:-1])] + after[-1:]
        hidden = [(weight, bias.unsqueeze(1)) for weight, bias in layers[1:-1]]
        return (
            self._columns(*layers[0]),
            self._columns(self.straight, layers[-1][1]),
            layers[-1][0],
            hidden,
        )

    def _columns(self, weight: Tensor, bias: Tensor) -> Tensor:
        """A matrix for the features (1, x), or (1, z) ⊗ (1, x): one product makes them all, bias and scale included."""
        constant, scale = bias.unsqueeze(1), self.get_buffer("scale")
        if self.linear:
            return torch.cat([constant, weight / scale], 1)
        x, z, zx = weight.split([self.inputs, self.latents, self.latents * self.inputs], 1)
        rows = torch.cat([z.unsqueeze(2), zx.unflatten(1, (self.latents, self.inputs)) / scale], 2)
        return torch.cat([constant, x / scale, rows.flatten(1)], 1)


class ForceOutput(nn.Module):
    """Pass a force on unchanged: a forward hook here sees every evaluation and may change it."""

    def forward(self, force: Tensor, latents: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return ``force (output, ...)``, computed from ``latents (latent, ...)`` and inputs."""
        return force


def _like(target: Tensor, values: Tensor) -> Tensor:
    """Values (n, ...) with the batch axes that (m, ..., task, shot) has more."""
    return values.reshape(len(values), *[1] * (target.dim() - values.dim()), *values.shape[1:])
