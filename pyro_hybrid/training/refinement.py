"""sharpen: a network's weights by Gauss-Newton, all systems' evidence added up: the last digits of a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import fail, require
from pyro_hybrid.evidence.gauss_newton import Linearised, Point, Problem, observed
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.nets.residual import Residual
from pyro_hybrid.programs.module import HybridModel, local_parameters

__all__ = ["sharpen"]

AT_ONCE = 32  # weights, or calls, that are moved side by side
LARGEST = 10_000  # weights; their precision has the square of it, in float64


@torch.no_grad()
def sharpen(
    model: HybridModel,
    guide: AmortizedGuide,
    tasks: Tasks,
    *,
    network: nn.Module | None = None,
    noise: str | None = "noise",
    steps: int = 8,
    batch_size: int = 8,
    reading: Linearised | None = None,
    memory: float = 0.9,
    width: float = 0.1,
    misread: float = 10.0,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    r"""Bring a trained network to where the data want it, by a method of second order.

    Stochastic gradients leave weights scattered in directions that cost the likelihood little and physics latents
    much. Here weights :math:`w` are latents that all systems share, with a Gaussian belief of precision :math:`H`: each
    batch of systems is read and linearised in its systems', its shots' and the network's unknowns at once, the
    former two are eliminated, and what is left is added up (a Kalman filter whose state is the network),

    .. math:: H \leftarrow \gamma H + (1 - \gamma) s^{-2} I + \sum_i J_i^\top J_i, \qquad
              w \leftarrow w - H^{-1} \sum_i J_i^\top r_i,

    with memory :math:`\gamma`, for earlier batches were linearised elsewhere, and width :math:`s`. A step is shortened
    until its batch is explained better. Whole trajectories are used, whose late parts know best. Say it after
    :func:`~pyro_hybrid.training.meta_train.meta_train` has come near, and before ``model.settle`` and
    :func:`~pyro_hybrid.inference.posterior.calibrate`.

    It costs as many solves of a batch as there are weights, or as a :class:`~pyro_hybrid.nets.residual.Residual` is called in
    one, whichever are fewer: for networks of up to a thousand weights or so.

    References:
        An Iterated Kalman filter view of incremental least squares: Incremental Least Squares Methods and the Extended
        Kalman Filter (Bertsekas, 1996)

    Arguments:
        model: a program whose ``prior`` holds the systems' latents; changed in place.
        guide: says where reading begins, with its encoder or by computed evidence.
        tasks: the training data.
        network: whose weights; by default ``model.residual``. All else stays as it was.
        noise: the attribute that is the observations' standard deviation, by sensor: it is set to what is left
            unexplained. None to leave it.
        steps, batch_size: number of batches, and systems in each.
        reading: how a batch is read, from where the guide points; by default ``Linearised(2)``.
        memory, width: see above.
        misread: a task teaches nothing that costs so many times what the batch's median one does: it wasn't read and
            can't be linearised, or its trajectories are not of one system.
        seed: of the batches.
        progress: show a progress bar.

    Returns:
        For each batch, how badly it was explained when it came: squared errors in noise variances, per observation.
    """
    require(
        steps >= 1 and batch_size >= 1,
        "steps and batch_size of 1 or more",
        (steps, batch_size),
        "Check the arguments.",
    )
    require(
        0.0 < memory <= 1.0 and width > 0.0,
        "a memory in (0, 1] and a positive width",
        (memory, width),
        "1 forgets nothing; a width is how far off the weights may be.",
    )
    require(misread > 1.0, "misread above 1", misread, "At 1, half of all tasks would be left out.")
    network = network if network is not None else getattr(model, "residual", None)
    if network is None:
        fail(
            "a network",
            f"{type(model).__name__} without a residual",
            "Pass network=, such as model.force.",
        )
    weights = list(network.parameters())
    require(
        bool(weights),
        "a network with weights",
        type(network).__name__,
        "Pass the part that was trained.",
    )
    size = sum(weight.numel() for weight in weights)
    require(
        size <= LARGEST,
        f"a network of up to {LARGEST} weights",
        size,
        "Sharpen a part of it, or train longer.",
    )
    first = torch.eye(size, dtype=torch.float64, device=weights[0].device) / width**2
    known, unexplained, costs, was_training = first, _Unexplained(), list[float](), model.training
    bar = tqdm(
        range(steps),
        desc="sharpening",
        unit="batch",
        disable=not progress,
        delay=2.0,
        dynamic_ncols=True,
    )
    try:
        model.eval()
        for _, (rows, _) in zip(bar, tasks.numbered_batches(batch_size, seed), strict=False):
            with local_parameters():
                problem, point = _read(model, guide, tasks[rows], reading or Linearised(2))
                believed = memory * known + (1.0 - memory) * first
                evidence = _evidence(problem, point, network, misread)
                costs.append(evidence.cost)
                known = believed + evidence.precision
                point = _moved(problem, point, network, evidence, believed)
            if noise is not None:
                _set_noise(model, noise, unexplained.after(problem, point, evidence.kept))
            bar.set_postfix_str(f"squared error {evidence.cost:.4g} noise variances")
    finally:
        model.train(was_training)
    return costs


class _Evidence(NamedTuple):
    """What a batch says of the weights, all else eliminated, of those of its tasks that are ``kept``."""

    precision: Tensor
    slope: Tensor
    kept: Tensor
    cost: float


def _read(
    model: HybridModel, guide: AmortizedGuide, tasks: Tasks, reading: Linearised
) -> tuple[Problem, Point]:
    """All shots of some tasks, given nothing but the population, and where their latents are."""
    prior = model.prior
    start = prior.unconstrained(guide.natural(tasks.episode()))[0]
    mean, precision = prior.gaussian(None)
    problem = Problem(
        model,
        Episode(None, tasks.shots()),
        prior.sites,
        mean.expand(len(tasks), -1),
        precision.expand(len(tasks), -1, -1),
    )
    belief = reading(problem, start.expand(len(tasks), -1))
    return problem, reading.descend(problem, belief.mean, reading.iterations, belief.shot_mean)


def _evidence(problem: Problem, point: Point, network: nn.Module, misread: float) -> _Evidence:
    """Gram matrices of all unknowns, task by task, reduced to those of the weights (a Schur complement, twice)."""
    errors, slopes = problem.jacobian(point.task, point.shot)
    by_weight = _by_weight(problem, point, network, errors)
    usual = (
        point.cost[point.cost.isfinite()].median()
        if bool(point.cost.isfinite().any())
        else torch.inf
    )
    kept = (
        (point.cost < misread * usual)
        & slopes.isfinite().flatten(1).all(1)
        & by_weight.isfinite().flatten(1).all(1)
    )
    n, d = by_weight.shape[2], problem.d
    precision, slope = torch.zeros(n, n).to(slopes).double(), torch.zeros(n).to(slopes).double()
    for task in kept.nonzero().squeeze(1).tolist():
        every = torch.cat([by_weight[task], slopes[task]], 1).double()  # (shot, unknown, number)
        gram, pull = every @ every.mT, (every @ errors[task].double().unsqueeze(-1)).squeeze(-1)
        if problem.m:
            weight, away = (
                problem.shot_weight[task].double(),
                (point.shot - problem.shot_mean)[task].double(),
            )
            pull[:, n + d :] += weight * away
            gram[:, n + d :, n + d :] += torch.diag_embed(weight)
        gram, pull = _without(gram, pull, n + d)
        gram, pull = gram.sum(0), pull.sum(0)
        pull[n:] += problem.precision[task].double() @ (point.task - problem.mean)[task].double()
        gram[n:, n:] += problem.precision[task].double()
        gram, pull = _without(gram, pull, n)
        precision, slope = precision + gram, slope + pull
    counted = int(errors[kept].count_nonzero())
    return _Evidence(
        precision, slope, kept, float(errors[kept].double().square().sum()) / max(counted, 1)
    )


class _Errors(nn.Module):
    """A problem's errors as a function that knows its network."""

    def __init__(self, network: nn.Module, problem: Problem) -> None:
        super().__init__()
        self.network, self.problem = network, problem

    def forward(self, point: Point) -> Tensor:
        return self.problem.errors(point.task[None], point.shot[None])[0]


def _by_weight(problem: Problem, point: Point, network: nn.Module, errors: Tensor) -> Tensor:
    """Derivatives of the errors by every weight, (task, shot, weight, number)."""
    if isinstance(network, Residual):
        calls = _pushed(problem, point, network, None)[1]
        by_trajectory = {call.shape[1:-1] for call in calls} == {errors.shape[:2]}
        if by_trajectory and len(calls) * network.outputs < sum(
            weight.numel() for weight in network.parameters()
        ):
            return _by_call(problem, point, network, errors, torch.stack(calls)[:, 0])
    return _one_by_one(problem, point, network, errors)


def _one_by_one(problem: Problem, point: Point, network: nn.Module, errors: Tensor) -> Tensor:
    """As many solves as there are weights, many at a time."""
    program, h = _Errors(network, problem), 10.0 * math.sqrt(torch.finfo(errors.dtype).eps)
    weights = {f"network.{name}": weight for name, weight in network.named_parameters()}
    sizes = [weight.numel() for weight in weights.values()]

    def moved(move: Tensor) -> Tensor:
        pieces = zip(weights.items(), move.split(sizes), strict=True)
        return torch.func.functional_call(
            program,
            {name: weight + piece.view_as(weight) for (name, weight), piece in pieces},
            (point,),
        )

    moves = h * torch.eye(sum(sizes), dtype=errors.dtype, device=errors.device)
    return torch.cat(
        [(torch.vmap(moved)(some) - errors) / h for some in moves.split(AT_ONCE)]
    ).permute(1, 2, 0, 3)


def _by_call(
    problem: Problem, point: Point, network: Residual, errors: Tensor, calls: Tensor
) -> Tensor:
    """As many solves as the term is called: how errors move with what a call returns, and that with the weights."""
    number, outputs = len(calls), network.outputs
    h = 10.0 * math.sqrt(number * torch.finfo(errors.dtype).eps)  # of one call among many
    pushes = h * torch.eye(number * outputs, dtype=errors.dtype, device=errors.device).view(
        -1, number, outputs
    )

    def pushed(push: Tensor) -> Tensor:
        return _pushed(problem, point, network, push)[0]

    by_output = torch.cat(
        [(torch.vmap(pushed)(some) - errors) / h for some in pushes.split(AT_ONCE)]
    )
    term = _Term(network)
    weights = dict(term.named_parameters())
    slopes = torch.vmap(torch.func.jacrev(partial(torch.func.functional_call, term)), (None, 0))
    found = []
    for task in range(len(errors)):
        samples = calls[:, task].transpose(0, 1).flatten(0, 1)  # (shot and call, latent and input)
        by_weight = torch.cat([part.flatten(2) for part in slopes(weights, samples).values()], -1)
        by_weight = by_weight.unflatten(0, (-1, number)).flatten(
            1, 2
        )  # (shot, call and output, weight)
        found.append(by_weight.mT @ by_output[:, task].transpose(0, 1))
    return torch.stack(found)


class _Term(nn.Module):
    """A residual as a function of one latent vector and its inputs, side by side in one tensor."""

    def __init__(self, network: Residual) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor) -> Tensor:
        z, x = sample.split([self.network.latents, self.network.inputs])
        out = self.network.given(z.view(1, 1, -1))(*x.view(-1, 1, 1))
        return torch.stack(out if isinstance(out, tuple) else (out,)).flatten()


def _pushed(
    problem: Problem, point: Point, network: Residual, push: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Errors when something (call, output) is added to what the term returns, and the latents and inputs of each call."""
    calls: list[Tensor] = []

    def given(latents: Tensor) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        term = type(network).given(network, latents)

        def pushed(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            out = term(*inputs)
            parts = out if isinstance(out, tuple) else (out,)
            calls.append(
                torch.stack(torch.broadcast_tensors(parts[0], *latents.unbind(-1), *inputs)[1:], -1)
            )
            if push is not None:
                parts = tuple(
                    part + more for part, more in zip(parts, push[len(calls) - 1], strict=True)
                )
            return parts if isinstance(out, tuple) else parts[0]

        return pushed

    network.given = given  # type: ignore[method-assign]  # of this instance, and until the errors are there
    try:
        return problem.errors(point.task[None], point.shot[None])[0], calls
    finally:
        del network.given


def _without(gram: Tensor, pull: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Normal equations of the first unknowns, whatever the others turn out to be."""
    if gram.shape[-1] == size:
        return gram, pull
    cross = gram[..., size:, :size]
    solved = torch.linalg.solve(
        gram[..., size:, size:], torch.cat([pull[..., size:, None], cross], -1)
    )
    return (
        gram[..., :size, :size] - cross.mT @ solved[..., 1:],
        pull[..., :size] - (cross.mT @ solved[..., :1]).squeeze(-1),
    )


def _moved(
    problem: Problem, point: Point, network: nn.Module, evidence: _Evidence, believed: Tensor
) -> Point:
    """Take the step, the longest of a few that explains the batch better than before, and read again."""
    weights = list(network.parameters())
    old, before = (
        nn.utils.parameters_to_vector(weights),
        float(point.cost[evidence.kept].double().sum()),
    )
    for damping in (0.0, 3e-3, 0.1, 3.0):
        damped = believed + evidence.precision + torch.diag(damping * evidence.precision.diagonal())
        move = -torch.linalg.solve(damped, evidence.slope)
        nn.utils.vector_to_parameters(old + move.to(old), weights)
        new = Linearised(2).descend(problem, point.task, 2, point.shot)
        if float(new.cost[evidence.kept].double().sum() + move @ believed @ move) < before:
            return new
    nn.utils.vector_to_parameters(old, weights)
    return point


class _Unexplained:
    """Variances of the observations by sensor, of the last few batches: squared errors over the numbers left free."""

    def __init__(self) -> None:
        self.squares, self.free = torch.zeros(()), torch.zeros(())

    def after(self, problem: Problem, point: Point, kept: Tensor) -> Tensor:
        """Standard deviations, with one more batch."""
        sites = observed(
            problem.program, problem.episode, problem.values(point.task[None], point.shot[None])
        )[0]
        require(len(sites) == 1, "a program with one observed site", len(sites), "Pass noise=None.")
        error = sites[0].value - sites[0].mean  # (1, task, shot, time, sensor)
        counts = sites[0].mask.expand_as(error)[0][kept].double()
        error = error[0][kept].double()
        gram = problem.jacobian(point.task, point.shot)[1][kept].double()[:, :, problem.d :]
        gram, weight = gram @ gram.mT, torch.diag_embed(problem.shot_weight[kept].double())
        by_shot = (
            torch.linalg.solve(gram + weight, gram).diagonal(dim1=-2, dim2=-1).sum()
            if problem.m
            else 0.0
        )
        free = 1.0 - (problem.d * int(kept.sum()) + by_shot) / counts.sum()
        self.squares = 0.5 * self.squares + (counts * error.square()).sum((0, 1, 2))
        self.free = 0.5 * self.free + counts.sum((0, 1, 2)) * free
        return (self.squares / self.free).sqrt()


def _set_noise(model: HybridModel, name: str, value: Tensor) -> None:
    old = getattr(model, name, None)
    if not isinstance(old, Tensor) or old.numel() not in (1, len(value)):
        fail(
            f"{name!r}, a standard deviation of {len(value)} sensors, or of all",
            getattr(old, "shape", type(old).__name__),
            "Pass the attribute's name, or noise=None.",
        )
    new = (
        (value if old.numel() == len(value) else value.square().mean().sqrt())
        .reshape(old.shape)
        .to(old)
    )
    setattr(model, name, torch.where(new > 0.0, new, old))  # false where it isn't a number
