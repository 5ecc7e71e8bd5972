"""Derivatives of a program's errors, in units of the noise, by the weights of its network."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_hybrid.evidence.least_squares import Iterate, LeastSquares
from pyro_hybrid.nets.residual import Residual

__all__ = [
    "Place",
    "evaluate_force",
    "slopes_by_force",
    "slopes_by_weight",
    "spread_knots",
    "weight_slopes",
]

CHUNK = 32  # number of changes that are evaluated at once
FEWEST_INTERVALS = 10  # between observations, for interpolation between them to be worth it


def weight_slopes(problem: LeastSquares, iterate: Iterate, network: nn.Module) -> Tensor:
    """Differentiate residuals by every weight that is trained, (task, shot, weight, number).

    A :class:`~pyro_hybrid.Residual` that is evaluated less often than it has weights is differentiated by way of what
    it returns; all other networks weight by weight.
    """
    place = Place(problem, iterate, problem.roots(iterate))
    if isinstance(network, Residual):
        errors, calls = evaluate_force(place, network, None)
        num_weights = sum(weight.numel() for weight in trained_weights(network).values())
        knots = spread_knots(len(calls), problem.shots.times)
        num_knots = len(calls) if knots is None else knots.shape[1]
        is_shorter = num_knots * network.outputs < num_weights
        if is_shorter and _is_by_trajectory(place, network, errors, calls):
            return slopes_by_force(place, network, torch.stack(calls)[:, 0], knots)
    return slopes_by_weight(place, network)


def spread_knots(num_calls: int, times: Tensor) -> Tensor | None:
    """Interpolate what a force does at every call from what it does at the observation times, ``(call, knot)``.

    Along a trajectory, derivatives of a force by its weights are as smooth as the trajectory, which observations
    resolve: cubic interpolation between neighbouring ones if their times are regular, and linear interpolation between
    them and the middles of their intervals if not.

    Returns:
        None if there are few observations, or if the calls are not those of RK4 with steps that divide the intervals.
    """
    num_intervals = times.shape[-1] - 1
    if num_intervals < FEWEST_INTERVALS or num_calls % (4 * num_intervals):
        return None
    num_steps = num_calls // 4
    stages = torch.tensor([0.0, 0.5, 0.5, 1.0], dtype=torch.float64)
    place = (torch.arange(num_steps).unsqueeze(1) + stages).flatten() * num_intervals / num_steps
    lengths = times.double().diff(dim=-1)
    is_regular = bool(((lengths / lengths[..., :1]) - 1.0).abs().max() < 1e-3)
    if is_regular:
        return _cubic(place, num_intervals + 1)
    return _linear(2.0 * place, 2 * num_intervals + 1)


def _cubic(place: Tensor, num_knots: int) -> Tensor:
    """Weights of the four knots around each place, by Lagrange's polynomials."""
    first = (place.floor() - 1.0).clamp(0.0, num_knots - 4.0)
    offset = (place - first).unsqueeze(-1)
    nodes = torch.arange(4.0, dtype=torch.float64)
    factors = (offset - nodes).unsqueeze(-2).expand(-1, 4, 4)
    gaps = nodes.unsqueeze(-1) - nodes
    is_own = torch.eye(4, dtype=torch.bool)
    ratios = (factors / gaps.where(~is_own, 1.0)).where(~is_own, 1.0)
    columns = (first.unsqueeze(-1) + nodes).long()
    return place.new_zeros(len(place), num_knots).scatter_(1, columns, ratios.prod(-1))


def _linear(place: Tensor, num_knots: int) -> Tensor:
    """Weights of the two knots around each place."""
    first = place.floor().clamp(max=num_knots - 2.0)
    share = place - first
    columns = torch.stack([first, first + 1.0], -1).long()
    weights = torch.stack([1.0 - share, share], -1)
    return place.new_zeros(len(place), num_knots).scatter_(1, columns, weights)


class Place(NamedTuple):
    """A point of a problem's iteration, and the roots of the information there."""

    problem: LeastSquares
    iterate: Iterate
    roots: Tensor

    def errors(self) -> Tensor:
        """Errors of the program as it is now, (task, shot, number)."""
        task, shot = self.iterate.task[None], self.iterate.shot[None]
        return self.problem.errors(task, shot, self.roots)[0]


def _is_by_trajectory(place: Place, network: Residual, errors: Tensor, calls: list[Tensor]) -> bool:
    """Tell if every evaluation of the force acts on the residuals of its own trajectory alone.

    A force may also be evaluated at states of no trajectory, and an adaptive solver chooses one step for all: then a
    push of one trajectory changes the others.
    """
    if {call.shape[1:-1] for call in calls} != {errors.shape[:2]}:
        return False
    push = errors.new_zeros(len(calls), network.outputs, *errors.shape[:2])
    push[..., 0] = _step(errors, len(calls))
    pushed, pushed_calls = evaluate_force(place, network, push)
    if len(pushed_calls) != len(calls):
        return False
    return torch.allclose(pushed[:, 1:], errors[:, 1:], rtol=0.0, atol=0.0, equal_nan=True)


def trained_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are not frozen, by name."""
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


def slopes_by_weight(place: Place, network: nn.Module) -> Tensor:
    """Run the program once for each weight, many at a time."""
    program = _Errors(network, place)
    errors = place.errors()
    step = _step(errors, 1)
    weights = {f"network.{name}": weight for name, weight in trained_weights(network).items()}
    sizes = [weight.numel() for weight in weights.values()]

    def moved(move: Tensor) -> Tensor:
        pieces = zip(weights.items(), move.split(sizes), strict=True)
        values = {name: weight + piece.view_as(weight) for (name, weight), piece in pieces}
        result: Tensor = torch.func.functional_call(program, values, ())
        return result

    moves = step * torch.eye(sum(sizes), dtype=errors.dtype, device=errors.device)
    changed = _evaluate_many(moved, moves)
    return ((changed - errors) / step).permute(1, 2, 0, 3)


def slopes_by_force(
    place: Place, network: Residual, calls: Tensor, knots: Tensor | None = None
) -> Tensor:
    """Run the program once for each evaluation of the force, and differentiate the force by its weights.

    Arguments:
        place: where the program is linearized.
        network: the force.
        calls: latents and inputs of each evaluation, ``(call, task, shot, latent + input)``.
        knots: result of :func:`spread_knots`, for one run for each knot instead.
    """
    outputs = network.outputs
    errors = place.errors()
    if knots is None:
        knots = torch.eye(len(calls))
    knots = knots.to(errors)
    calls = calls[knots.argmax(0)]  # the evaluations at the knots
    num_calls = len(calls)
    step = _step(errors, num_calls)
    by_component = torch.eye(outputs).to(errors)
    pushes = step * torch.einsum("ck,op->kocp", knots, by_component).flatten(0, 1)

    def pushed(push: Tensor) -> Tensor:
        return evaluate_force(place, network, push)[0]

    by_output = (_evaluate_many(pushed, pushes) - errors) / step
    term = _Term(network)
    weights = {f"network.{name}": weight for name, weight in trained_weights(network).items()}
    force = partial(torch.func.functional_call, term)
    slopes = torch.vmap(torch.func.jacrev(force), (None, 0))
    by_task = []
    for task in range(len(errors)):
        samples = calls[:, task].transpose(0, 1).flatten(0, 1)  # (shot and call, latent and input)
        parts = [part.flatten(2) for part in slopes(weights, samples).values()]
        by_weight = torch.cat(parts, -1).unflatten(0, (-1, num_calls)).flatten(1, 2)
        by_task.append(by_weight.mT @ by_output[:, task].transpose(0, 1))
    return torch.stack(by_task)


def evaluate_force(
    place: Place, network: Residual, push: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Errors if a push is added to the force, and each call's latents and inputs.

    Arguments:
        place: where the program is linearized.
        network: the force.
        push: ``(call, output)``, or ``(call, output, task, shot)`` to push trajectories differently, or None.
    """
    calls: list[Tensor] = []

    def record(module: nn.Module, arguments: tuple[object, ...], force: Tensor) -> Tensor:
        latents, inputs = arguments[1:]
        index = len(calls)
        parts = torch.broadcast_tensors(force[0], *latents, *inputs)  # type: ignore[misc]
        calls.append(torch.stack(parts[1:], -1))
        if push is None:
            return force
        if index >= len(push):  # an adaptive solver takes other steps than before
            return force
        batch = [1] * (force.dim() - push.dim() + 1)
        return force + push[index].view(-1, *batch, *push.shape[2:])

    with network.output.register_forward_hook(record):
        errors = place.errors()
    return errors, calls


def _step(errors: Tensor, num_calls: int) -> float:
    """A step of finite differences; one call of many has a small part of the effect of all."""
    return 10.0 * math.sqrt(num_calls * torch.finfo(errors.dtype).eps)


class _Errors(nn.Module):
    """A problem's errors as a function that owns the network."""

    def __init__(self, network: nn.Module, place: Place) -> None:
        super().__init__()
        self.network = network
        self.place = place

    def forward(self) -> Tensor:
        return self.place.errors()


class _Term(nn.Module):
    """A force as a function of one latent vector and its inputs, side by side in one tensor."""

    def __init__(self, network: Residual) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor) -> Tensor:
        z, x = sample.split([self.network.latents, self.network.inputs])
        force = self.network.given(z.view(1, 1, -1))(*x.view(-1, 1, 1))
        return torch.stack(force if isinstance(force, tuple) else (force,)).flatten()


def _evaluate_many(function: Callable[[Tensor], Tensor], changes: Tensor) -> Tensor:
    """Evaluate many changes at once; one by one if the program's solver can't be vectorized."""
    try:
        return torch.cat([torch.vmap(function)(chunk) for chunk in changes.split(CHUNK)])
    except RuntimeError:
        # An adaptive solver chooses its steps by the values, which torch.vmap refuses. A failure that has another
        # cause happens again here.
        return torch.stack([function(change) for change in changes])
