"""Neural terms: Residual inside the vector field, Mixing from state to sensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from pyro_hybrid.errors import require
from pyro_hybrid.shapes import Latent

__all__ = ["Mixing", "Residual", "explained", "overlap"]


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
        """The term of one task: latents ``(..., task, 1, latents)`` to a function of inputs ``(..., task, shot)``.

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
            out = self.output((weights * out).sum(0), z, inputs)
            return out[0] if self.outputs == 1 else out.unbind(0)

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


def overlap(correction: Tensor, tangents: Sequence[Tensor]) -> Tensor:
    r"""How much of a neural term the known physics could have explained: zero for the least correction.

    .. math:: \sum_j \frac{\langle f_N, \partial_j f_P \rangle^2}{\lVert \partial_j f_P \rVert^2}

    That it vanishes is what APHYNITY's minimum of :math:`\lVert f_N \rVert^2` comes to, given the sum of both terms;
    as a penalty it leaves alone what no physics latent could have explained. The squares are estimated without bias:
    the square of a mean over samples would also punish their spread.

    References:
        Augmenting Physical Models with Deep Networks for Complex Dynamics Forecasting (Yin et al., 2021),
        https://arxiv.org/abs/2010.04456

    Arguments:
        correction: what the neural term adds to the slopes, ``(..., task, sample, component)``, at sampled states.
        tangents: what a change of each physics latent would add, of the same shape each.

    Returns:
        One number for each task, to be weighed in a ``pyro.factor``.
    """
    shape = tuple(correction.shape)
    require(
        len(shape) > 1 and shape[-2] > 1,
        "a correction (..., task, sample, component) of two samples or more",
        shape,
        "Evaluate both terms at many states of each task.",
    )
    total, n = torch.zeros_like(correction[..., 0, 0]), shape[-2]
    for tangent in tangents:
        products = (correction * tangent).sum(-1)
        square = (products.sum(-1).square() - products.square().sum(-1)) / (n * (n - 1))
        total = total + square / tangent.square().sum(-1).mean(-1).clamp(min=1e-12)
    return total


def explained(pieces: Iterable[tuple[Tensor, Sequence[Tensor]]], centred: bool = False) -> Tensor:
    r"""The change of each physics latent that does most of a neural term's work: least squares over sampled states.

    .. math:: \arg\min_c \bigl\lVert f_N - \sum_j c_j\, \partial_j f_P \bigr\rVert^2

    Arguments:
        pieces: corrections and tangents as in :func:`overlap`, of some of the states at a time.
        centred: not counting what a constant could explain, component by component: over states whose components are
            independent, a function of some then shares nothing with tangents that depend on the others.

    Returns:
        The changes ``(..., task, latent)``, in units of those that gave the tangents; zero where nothing determines
        them.
    """
    gram, pull, sums, total, places = *[torch.zeros(())] * 4, 0
    for correction, tangents in pieces:
        mine, *others = torch.broadcast_tensors(correction, *tangents)
        basis = torch.stack(others, -3)  # (..., latent, place, component)
        flat = basis.flatten(-2)
        gram, pull = (
            gram + (flat @ flat.mT).double(),
            pull + (flat @ mine.flatten(-2).unsqueeze(-1)).double(),
        )
        sums, total, places = (
            sums + basis.sum(-2).double(),
            total + mine.sum(-2).double(),
            places + mine.shape[-2],
        )
    require(
        pull.dim() > 0,
        "one piece or more",
        "none",
        "Evaluate both terms at some states of each task.",
    )
    if centred:
        gram, pull = gram - sums @ sums.mT / places, pull - sums @ total.unsqueeze(-1) / places
    return (
        torch.linalg.solve_ex(gram, pull)
        .result.squeeze(-1)
        .nan_to_num(0.0, 0.0, 0.0)
        .to(mine.dtype)
    )


class Mixing(nn.Module):
    r"""From state to sensors where the instrument is unknown: :math:`g(y) = y W + b + \tanh(y U + c) V`.

    Arguments:
        components: number of state components.
        sensors: number of observed quantities.
        width: size of the nonlinear part; 0 for a linear instrument.
    """

    def __init__(self, components: int, sensors: int, width: int = 0) -> None:
        super().__init__()
        require(
            min(components, sensors) >= 1 and width >= 0,
            "1 or more components and sensors, a width of 0 or more",
            (components, sensors, width),
            "Pass the numbers of state components and of observed quantities.",
        )
        self.components = components
        self.straight = nn.Linear(components, sensors)
        bent = (
            (nn.Linear(components, width), nn.Tanh(), nn.Linear(width, sensors, bias=False))
            if width
            else ()
        )
        self.bent = nn.Sequential(*bent) if bent else None

    def forward(self, states: Tensor) -> Tensor:
        """States ``(..., component)`` to sensors ``(..., sensor)``."""
        require(
            states.shape[-1] == self.components,
            f"{self.components} components in the last axis",
            tuple(states.shape),
            "Build the Mixing with as many components as the state has.",
        )
        straight = self.straight(states)
        return straight if self.bent is None else straight + self.bent(states)
