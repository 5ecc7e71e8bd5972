"""Gauge: credit the physics latents with all that the known equations can explain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pyro_hybrid.errors import require
from pyro_hybrid.nets.correction import explained_share
from pyro_hybrid.nets.hybrid_field import RELATIVE_STEP, CollocationPoints, HybridField, Physics

__all__ = ["Gauge"]

MOST_POINTS, MOST_FIELDS = 1024, 512
POINTS_AT_ONCE = 256  # what a processor's cache holds


class Gauge(nn.Module):
    r"""Choose, of the equivalent decompositions of one law, that in which the physics explains all it can.

    A neural force may do some of the known equations' work: it then has the effect of a shift of the physics latents.
    This module finds the shift by least squares over fixed points and subtracts it,

    .. math::
        z_P \mapsto z_P - c, \qquad
        c = \arg\min_c \Bigl\lVert f_N(\cdot\,; z_N) - \sum_j c_j\, \partial_j f_P(\cdot\,; z_P) \Bigr\rVert^2 ,

    before the equations see the latents. Unless the state is a field on a grid, means over the points are subtracted
    from both terms first. To second order in c, the program has the same trajectories as before, for other physics
    latents. Call it in the program between the latents and the equations. It changes nothing until
    :func:`~pyro_hybrid.fix_gauge` has placed its points, which are saved with the model.

    Physics latents must keep away from zero, as those of positive families do: their shifts are relative.

    References:
        Augmenting Physical Models with Deep Networks for Complex Dynamics Forecasting (Yin et al., 2021),
        https://arxiv.org/abs/2010.04456

    Arguments:
        components: number of components of the state; of a field on a grid, of its points.
        grid: whether the state is a field on a grid.

    >>> import pyro_hybrid as ph
    >>> equations = ph.HybridField(
    ...     lambda physics, force: lambda t, y: (-physics["rate"] * y[0] + force(*y),),
    ...     lambda unknown: lambda y: -0.25 * y,
    ... )
    >>> gauge, rate, unknown = Gauge(components=1), torch.ones(1, 1), torch.zeros(1, 3)
    >>> gauge(equations, {"rate": rate}, unknown)
    {'rate': tensor([[1.]])}
    >>> gauge.place(torch.rand(64), torch.rand(64, 1))
    >>> gauge(equations, {"rate": rate}, unknown)  # the force does the work of a rate of 0.25
    {'rate': tensor([[0.7500]])}
    """

    num_points: Tensor
    times: Tensor
    states: Tensor

    def __init__(self, components: int, *, grid: bool = False) -> None:
        super().__init__()
        require(
            components >= 1,
            "components of 1 or more",
            components,
            "Pass the number of components of the state.",
        )
        self.grid = grid
        capacity = MOST_FIELDS if grid else MOST_POINTS
        self.register_buffer("num_points", torch.zeros((), dtype=torch.long))
        self.register_buffer("times", torch.zeros(capacity))
        self.register_buffer("states", torch.zeros(capacity, components))

    @property
    def capacity(self) -> int:
        """Return the largest number of points."""
        return len(self.times)

    @property
    def components(self) -> int:
        """Return the number of components of the state."""
        return self.states.shape[-1]

    @torch.no_grad()
    def place(self, times: Tensor, states: Tensor) -> None:
        """Take these points from now on: times ``(point,)`` and states ``(point, component)``."""
        require(
            1 <= len(times) <= self.capacity and states.shape == (len(times), self.components),
            f"1 to {self.capacity} points of {self.components} components",
            f"{tuple(times.shape)} times and states of shape {tuple(states.shape)}",
            "Let ph.fix_gauge(posterior, tasks) place them.",
        )
        self.times[: len(times)] = times
        self.states[: len(times)] = states
        self.num_points.fill_(len(times))

    @torch.no_grad()
    def clear(self) -> None:
        """Forget the points: the module changes nothing again."""
        self.num_points.zero_()

    def forward(
        self, equations: HybridField, physics: Physics, unknown: Tensor
    ) -> dict[str, Tensor]:
        """Correct the physics latents by what the neural force does in their place.

        Arguments:
            equations: the field in its two parts.
            physics: physics latents by name, each ``(..., task, 1)``.
            unknown: neural latents ``(..., task, component)``.
        """
        if int(self.num_points) == 0:
            return dict(physics)
        batches = [unknown.shape[:-1], *(value.shape[:-1] for value in physics.values())]
        batch = torch.broadcast_shapes(*batches)
        unknown = unknown.expand(*batch, -1)
        values = [value.expand(*batch, 1) for value in physics.values()]
        first, copies = _distinct_rows([*values, unknown])
        distinct = {name: value[first] for name, value in zip(physics, values, strict=True)}
        distinct_unknown = unknown[first]
        slopes = (equations.slopes(distinct, distinct_unknown, points) for points in self._pieces())
        share = RELATIVE_STEP * explained_share(slopes, centered=not self.grid)[copies]
        corrected = {}
        for i, (name, value) in enumerate(physics.items()):
            corrected[name] = value * (1.0 - share[..., i, None])
        return corrected

    def _pieces(self) -> Iterator[CollocationPoints]:
        num_points = int(self.num_points)
        size = max(1, POINTS_AT_ONCE // self.components) if self.grid else POINTS_AT_ONCE
        times = self.times[:num_points].split(size)
        states = self.states[:num_points].split(size)
        return map(CollocationPoints, times, states)


def _distinct_rows(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Find rows that differ from the one before, and for each row of the batch which of them it equals.

    A Jacobian by differences moves the shots' latents in most of its copies, and leaves those of the task the same.
    """
    rows = torch.cat(list(values), -1).detach()
    _, inverse, counts = torch.unique_consecutive(
        rows, dim=0, return_inverse=True, return_counts=True
    )
    return counts.cumsum(0) - counts, inverse
