"""HybridField: the field of an ODE in two parts, known equations and a neural force."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_hybrid.dynamics.slopes import Field
from pyro_hybrid.errors import require
from pyro_hybrid.nets.correction import nonlinearity_penalty, projection_penalty
from pyro_hybrid.shapes import State

__all__ = ["CollocationPoints", "Force", "HybridField", "Physics"]

Force = Callable[..., Any]  # to a tensor, or to a tuple of tensors if it has several outputs
Physics = Mapping[str, Tensor]  # each latent (..., task, 1), to broadcast with (..., task, shot)

RELATIVE_STEP = 1e-3  # of a physics latent, in the difference that gives its tangent
NUM_SHUFFLES = 3  # of each state, every time with other partners


class CollocationPoints(NamedTuple):
    """Times ``(point,)`` or ``(task, point)``, and states ``(..., point, component)`` at which a field is evaluated."""

    times: Tensor
    states: Tensor

    @classmethod
    def along(cls, times: Tensor, states: Tensor) -> CollocationPoints:
        """Take all points of trajectories ``(task, shot, time, component)``.

        Arguments:
            times: ``(time,)``, ``(shot, time)`` or ``(task, shot, time)``.
            states: of the trajectories, or of fields at some times.
        """
        clocks = times if times.dim() == 3 else times.expand(states.shape[-3], -1)
        return cls(clocks.flatten(-2), states.flatten(-3, -2))


class Slopes(NamedTuple):
    """The neural force's contribution to the slopes, and that of a small change of each physics latent.

    All of them have shape ``(..., task, point, component)``.
    """

    correction: Tensor
    tangents: list[Tensor]


@dataclass(frozen=True)
class HybridField:
    r"""The field of an ODE in two parts: known equations, and the neural force that enters them.

    .. math:: \dot y = f(t, y; z_P, z_N)

    Call it with latents for the field that :func:`~pyro_hybrid.solve` integrates.

    Arguments:
        known: ``known(physics, force)`` is the field of the known equations with a force in them, where ``physics``
            holds the physics latents by name, each ``(..., task, 1)``.
        force: ``force(unknown)`` is the neural force of neural latents ``(..., task, component)``.
        grid: whether the state is one tensor, a field on a grid, rather than a tuple of components.

    >>> import pyro_hybrid as ph
    >>> def known(physics, force):
    ...     return lambda t, y: (y[1], force(*y) - physics["omega"] ** 2 * y[0].sin())
    >>> residual = ph.Residual(inputs=2, latents=3, outputs=1)
    >>> equations = HybridField(known, lambda unknown: residual.given(unknown[..., None, :]))
    >>> field = equations({"omega": torch.ones(5, 1)}, torch.zeros(5, 3))
    >>> ph.solve(field, (torch.zeros(5, 4), torch.ones(5, 4)), torch.arange(6.0)).shape
    torch.Size([5, 4, 6, 2])
    """

    known: Callable[[Physics, Force], Field]
    force: Callable[[Tensor], Force]
    grid: bool = False

    def __post_init__(self) -> None:
        require(
            callable(self.known) and callable(self.force),
            "known and force that are functions",
            f"{type(self.known).__name__} and {type(self.force).__name__}",
            "Write known(physics, force), which returns a field, and force(unknown), which returns a force.",
            TypeError,
        )

    def __call__(self, physics: Physics, unknown: Tensor) -> Field:
        """Return the field of these latents."""
        return self.known(physics, self.force(unknown))

    def collocation_points(self, times: Tensor, states: Tensor) -> CollocationPoints:
        """Choose points at which to judge the neural force, from trajectories ``(task, shot, time, component)``.

        Time and each component of the state come from unrelated trajectories: they are shuffled over the batch, one by
        one. Along its own trajectory a true correction is correlated with the known terms (friction shrinks the angles
        that gravity acts on), and the least correction would be biased. Fields on a grid can't be taken apart and stay
        as they are: pass them as they were before anything acted on them.

        Arguments:
            times: ``(time,)``, ``(shot, time)`` or ``(task, shot, time)``.
            states: of the trajectories, or of fields at some times.
        """
        num_copies = 1 if self.grid else NUM_SHUFFLES
        points = CollocationPoints.along(times, states)
        clock = torch.cat([points.times] * num_copies, -1)
        flat = torch.cat([points.states] * num_copies, -2)
        if self.grid:
            return CollocationPoints(clock, flat)
        shuffled = [_shuffled(component) for component in flat.unbind(-1)]
        return CollocationPoints(clock, torch.stack(shuffled, -1))

    def projection_penalty(
        self, physics: Physics, unknown: Tensor, points: CollocationPoints
    ) -> Tensor:
        """Measure how much of the neural force the physics could have explained, for each task.

        Its gradient reaches the force's weights alone. See :func:`~pyro_hybrid.projection_penalty`.
        """
        return projection_penalty(*self.slopes(_detached(physics), unknown.detach(), points))

    def nonlinearity_penalty(
        self, physics: Physics, unknown: Tensor, points: CollocationPoints
    ) -> Tensor:
        """Measure how far the neural force is from linear between each task's latents and the next one's.

        Its gradient reaches the force's weights alone. See
        :func:`~pyro_hybrid.nets.correction.nonlinearity_penalty`.
        """
        physics = _detached(physics)
        first = unknown.detach()
        second = first.roll(1, -2)
        halfway = 0.5 * (first + second)
        return nonlinearity_penalty(
            self.correction(physics, first, points),
            self.correction(physics, second, points),
            self.correction(physics, halfway, points),
        )

    def correction(self, physics: Physics, unknown: Tensor, points: CollocationPoints) -> Tensor:
        """Evaluate what the neural force adds to the slopes at some points, ``(..., task, point, component)``."""
        force = _Recorded(self.force(unknown))
        with_force = self._evaluate(physics, force, points)
        return with_force - self._evaluate(physics, force.zero, points)

    def slopes(self, physics: Physics, unknown: Tensor, points: CollocationPoints) -> Slopes:
        """Evaluate the correction, and what changes of the physics latents would add at the same points.

        The changes are those for a thousandth more of each physics latent, which therefore must not be zero. No
        gradient flows through them.
        """
        force = _Recorded(self.force(unknown))
        with_force = self._evaluate(physics, force, points)
        without = self._evaluate(physics, force.zero, points)
        tangents = []
        with torch.no_grad():
            for name, value in physics.items():
                moved = {**physics, name: (1.0 + RELATIVE_STEP) * value}
                tangents.append(self._evaluate(moved, force.zero, points) - without)
        return Slopes(with_force - without, tangents)

    def _evaluate(self, physics: Physics, force: Force, points: CollocationPoints) -> Tensor:
        state: State = points.states if self.grid else points.states.unbind(-1)
        times = points.times.unsqueeze(-1) if self.grid else points.times
        slopes = self.known(physics, force)(times, state)
        if isinstance(slopes, tuple):
            return torch.stack(torch.broadcast_tensors(*slopes), -1)
        return slopes


class _Recorded:
    """A force that remembers how many outputs it has, so that no force at all can have the same form."""

    def __init__(self, force: Force) -> None:
        self.force = force
        self.num_outputs: int | None = None

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs: Tensor | tuple[Tensor, ...] = self.force(*inputs)
        self.num_outputs = len(outputs) if isinstance(outputs, tuple) else None
        return outputs

    def zero(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return no force."""
        zero = torch.zeros_like(inputs[-1])
        return zero if self.num_outputs is None else (zero,) * self.num_outputs


def _detached(physics: Physics) -> Physics:
    return {name: value.detach() for name, value in physics.items()}


def _shuffled(values: Tensor) -> Tensor:
    order = torch.randperm(values.numel(), device=values.device)
    return values.flatten()[order].view_as(values)
