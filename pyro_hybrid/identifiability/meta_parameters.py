r"""Do the tasks determine the network's weights, or a meta-learned initialisation? Locally, at one point, no further.

The mean loss of the tasks is a scalar, so it can't be injective. What can be asked is whether this optimum is the only
one nearby: its gradient vanishes, and it curves up in every direction. Neither the scores' covariance nor the number of
tasks decides that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hybrid.errors import require, require_finite, require_floating
from pyro_hybrid.identifiability.check import Check, Interval, Threshold, judged

__all__ = [
    "Agreement",
    "Losses",
    "MetaParameters",
    "Shapes",
    "agreement",
    "judge_meta_parameters",
    "meta_parameters",
    "require_few",
]

Losses = Callable[[Tensor], Tensor]
Shapes = Mapping[str, Sequence[int]]

THRESHOLD = Threshold(holds=1e-7, fails=1e-9)  # of the smallest curvature, relative to the largest
GAIN = 0.01  # nats a task: what a Newton step may still gain at what is called an optimum
LARGEST = 1500
DRAWS, CHUNK, WEAKEST = 2000, 64, 4


class MetaParameters(NamedTuple):
    r"""What :func:`meta_parameters` measured of P parameters. All but ``gradient`` and ``gain`` is measured at ``at``.

    Attributes:
        tasks: number of tasks.
        given: what was held fixed.
        gradient: norm of the mean loss's gradient at the given point.
        gain: Newton decrement there: what the quadratic model says could still be gained, in nats a task.
        at: the optimum that Newton steps led to if little was to be gained, else the given point.
        slope: norm of the gradient's part in directions without curvature, where nothing stops it.
        eigenvalues, eigenvectors: of the mean loss's Hessian, ascending, (P,) and in columns (P, P).
        rank: number of eigenvalues that aren't zero to rounding.
        scale: the largest curvature, or what counts as large where the tasks' curvatures cancel.
        smallest: the smallest eigenvalue, relative to ``scale``.
        walked: the same from the loss some way off, the other parameters following; ``smallest`` where that has margin.
        interval: what it could as well have been for other weights of the tasks, and as walked.
        score_eigenvalues, score_rank: of the tasks' :math:`E[\nabla L \nabla L^\top]`; they decide nothing.
        singular_values, jacobian_rank: of the tasks' Jacobians stacked: of residuals if given, else of gradients.
        directions: all without positive curvature, or else the weakest, by the parameters that take part most.
    """

    tasks: int
    given: str
    gradient: float
    gain: float
    at: Tensor
    slope: float
    eigenvalues: Tensor
    eigenvectors: Tensor
    rank: int
    scale: float
    smallest: float
    walked: float
    interval: Interval
    score_eigenvalues: Tensor
    score_rank: int
    singular_values: Tensor
    jacobian_rank: int
    directions: tuple[str, ...]

    @property
    def hessian(self) -> Tensor:
        """Of the mean loss, (P, P)."""
        return (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T


def meta_parameters(
    losses: Losses,
    at: Tensor,
    *,
    residuals: Losses | None = None,
    names: Shapes | None = None,
    given: str = "",
) -> MetaParameters:
    r"""Measure whether a mean loss has a locally unique optimum, in float64.

    .. math:: \bar L(\varphi) = \frac1T \sum_t L_t(\varphi), \qquad \nabla \bar L(\varphi^*) = 0, \quad
              \nabla^2 \bar L(\varphi^*) \succ 0

    These suffice. For a yes, the curvature must stay positive for other weights of the tasks (a Bayesian bootstrap,
    which leaves none out), at the optimum that these would have. For a no, it must stay zero or negative, and the loss
    mustn't rise when the way out is walked, as it does from a quartic optimum.

    References:
        | Numerical Optimization, theorem 2.4 (Nocedal & Wright, 2006), https://doi.org/10.1007/978-0-387-40065-5
        | The Bayesian Bootstrap (Rubin, 1981), https://doi.org/10.1214/aos/1176345338

    Arguments:
        losses: a deterministic function of parameters (P,) that returns each task's loss in nats, (T,).
        at: the point, (P,).
        residuals: a function of parameters that returns each task's residuals, (T, m).
        names: the parameters' names and shapes in their order, as in ``{"weight": (3, 2), "bias": (3,)}``.
        given: what is held fixed, in words.

    >>> target = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    >>> def losses(p):
    ...     return (p[0] * p[1] - target) ** 2
    >>> numbers = meta_parameters(losses, torch.tensor([1.0, 2.0]), names={"gain": (), "size": ()})
    >>> numbers.rank, numbers.directions
    (1, ('size (+0.89), gain (-0.45)',))
    >>> judge_meta_parameters(numbers).status
    'fails'
    """
    at, labels = _checked(losses, at, names)
    start = point = _measured(losses, at)
    gain, step = start.newton(start.gradient, start.curved)
    if gain <= GAIN and step.any():
        point = _measured(losses, _settled(losses, start, at, start.curved))
    slope, way = _way_out(point)
    scores, stack = point.gradients, point.hessians.flatten(0, 1)
    if residuals is not None:
        stack = _residual_jacobian(residuals, point.at)
    scores, singular = (
        torch.linalg.svdvals(x) / math.sqrt(len(point.losses)) for x in (scores, stack)
    )
    return MetaParameters(
        len(point.losses),
        given,
        float(start.gradient.norm()),
        gain,
        point.at,
        slope,
        point.eigenvalues,
        point.eigenvectors,
        int(point.curved.sum()),
        point.scale,
        *_smallest(losses, point, way),
        scores.square(),
        _rank(scores, point.scale * (1.0 + float(point.at.norm()))),
        singular,
        _rank(singular, point.scale if residuals is None else 0.0),
        tuple(_described(direction, labels) for direction in (way, *_flat(point, way))),
    )


def judge_meta_parameters(numbers: MetaParameters) -> Check:
    """Whether the optimum is the only one nearby: a yes has a margin, a no has walked away from it without a rise."""
    place = f"Locally, at this point, for {numbers.tasks} task{'s' * (numbers.tasks > 1)}" + (
        f", with {numbers.given} held fixed" if numbers.given else ""
    )
    if not numbers.gain <= GAIN:
        return Check(
            "meta-parameters",
            "undecided",
            numbers.smallest,
            numbers.interval,
            THRESHOLD,
            f"{place}, there is no optimum yet: a Newton step would gain {numbers.gain:.2g} nats a task.",
            "Train on, or average more particles; the gradient must vanish before the curvature can tell.",
        )
    first, *others = numbers.directions
    more = f" ({len(others)} more such directions: {'; '.join(others[:3])})" if others else ""
    course = "falls" if numbers.walked < -THRESHOLD.fails else "stays level"
    why = {
        "holds": f"the optimum is the only one: the loss curves up in all {len(numbers.at)} directions, "
        f"least along {first}.",
        "fails": f"the optimum is not unique: the loss {course} along {first}{more}.",
        "undecided": f"the optimum may or may not be unique: the curvature along {first} has no margin{more}.",
    }
    return judged(
        "meta-parameters",
        numbers.smallest,
        numbers.interval,
        THRESHOLD,
        f"{place}, {why[THRESHOLD.judge(numbers.interval)]}",
        "Fix or tie one of the parameters named, bound their size, or add tasks that tell them apart.",
    )


class Agreement(NamedTuple):
    """How far restarts ended from each other, at most.

    Attributes:
        gap: nats a task between two of them, by the curvature at one.
        difference: length of their difference, relative to the longer of the two.
    """

    gap: float
    difference: float


def agreement(points: Sequence[Tensor], hessian: Tensor) -> Agreement:
    r"""Compare what restarts ended at: a small gap with a large difference is a direction that nothing determines.

    .. math:: \max_{i, j}\ \tfrac12 \lvert \Delta_{ij}^\top H \Delta_{ij} \rvert, \qquad
              \max_{i, j}\ \lVert \Delta_{ij} \rVert / \max(\lVert \varphi_i \rVert, \lVert \varphi_j \rVert)

    Networks also have discrete symmetries, such as the order and signs of tanh units: these are other optima, far away.

    Arguments:
        points: two ends or more, (P,) each.
        hessian: of the mean loss at one of them, (P, P).

    >>> agreement([torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])], torch.tensor([[2.0, 0.0], [0.0, 0.0]])).gap
    0.0
    """
    size = len(hessian)
    require(
        len(points) > 1 and all(p.shape == (size,) for p in points),
        f"two points or more of shape ({size},)",
        [tuple(p.shape) for p in points],
        "Pass what each restart ended at, flattened in the same order.",
    )
    ends = torch.stack([p.detach().double() for p in points])
    moves, lengths = ends.unsqueeze(1) - ends, ends.norm(dim=-1)
    longer = torch.maximum(lengths.unsqueeze(1), lengths).clamp(min=torch.finfo(torch.float64).tiny)
    gaps = 0.5 * torch.einsum("abi,ij,abj->ab", moves, hessian.double(), moves)
    return Agreement(float(gaps.abs().max()), float((moves.norm(dim=-1) / longer).max()))


def require_few(size: int, shapes: Shapes) -> None:
    """A Hessian of each task must fit."""
    require(
        size <= LARGEST,
        f"at most {LARGEST} parameters, for each task's Hessian",
        f"{size}, of {dict(shapes)}",
        "Judge fewer at a time: name some of them.",
    )


def _checked(losses: Losses, at: Tensor, names: Shapes | None) -> tuple[Tensor, list[str]]:
    """The point in float64, and a label for each of its entries."""
    require_floating("at", at)
    require(
        at.dim() == 1 and len(at) > 0, "at of shape (parameters,)", tuple(at.shape), "Flatten it."
    )
    require_finite("at", at)
    shapes = {"parameter": (len(at),)} if names is None else names
    labels = [
        f"{name}{list(i) or ''}"
        for name, n in shapes.items()
        for i in itertools.product(*map(range, n))
    ]
    require(
        len(labels) == len(at),
        f"names of {len(at)} parameters",
        f"{len(labels)} by {dict(shapes)}",
        "Give each name its shape, in the order in which the point was flattened.",
    )
    require_few(len(at), shapes)
    at = at.detach().double()
    with torch.no_grad():
        first, second = losses(at), losses(at)
    require(
        first.dim() == 1 and len(first) > 0,
        "losses of shape (tasks,)",
        tuple(first.shape),
        "Return each task's loss, not their mean.",
    )
    require(
        first.dtype == at.dtype,
        "losses in float64, as their argument is",
        first.dtype,
        "Convert what they are computed with: target.double().",
        TypeError,
    )
    require_finite("losses", first)
    require(
        torch.equal(first, second),
        "the same losses at the same point",
        f"changes of {(first - second).tolist()}",
        "Fix the random numbers inside the function, as weights_of does.",
    )
    return at, labels


class _Point(NamedTuple):
    """Each task's derivatives at a point, the mean's spectrum, and how large a curvature is large."""

    at: Tensor
    losses: Tensor
    gradients: Tensor
    hessians: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    scale: float

    @property
    def gradient(self) -> Tensor:
        return self.gradients.mean(0)

    @property
    def curved(self) -> Tensor:
        """Which directions aren't flat to rounding."""
        return self.eigenvalues.abs() > THRESHOLD.fails * self.scale

    def newton(self, gradient: Tensor, curved: Tensor) -> tuple[float, Tensor]:
        """The gain and the step of Newton's method in the curved directions; towards saddles too."""
        slopes = (self.eigenvectors.T @ gradient)[curved]
        moves = slopes / self.eigenvalues[curved]
        return 0.5 * float((slopes * moves).abs().sum()), -self.eigenvectors[:, curved] @ moves


def _measured(losses: Losses, at: Tensor) -> _Point:
    at = at.detach().requires_grad_()
    values, gradients, hessians = (
        losses(at) + 0.0 * at.sum(),
        [],
        [],
    )  # a linear loss has a Hessian too: 0
    for value in tqdm(
        values.unbind(), desc="second derivatives", unit="task", delay=2.0, leave=False
    ):
        (gradient,) = torch.autograd.grad(value, at, create_graph=True, retain_graph=True)
        rows = _rows(gradient + 0.0 * at, at)
        gradients.append(gradient.detach())
        hessians.append(0.5 * (rows + rows.T))
    by_task, slopes = torch.stack(hessians), torch.stack(gradients)
    require_finite("second derivatives of the losses", by_task)
    eigenvalues, eigenvectors = torch.linalg.eigh(by_task.mean(0))
    alone = (
        float(by_task.flatten(1).norm(dim=1).max()),
        _size(slopes) / _length(at.detach(), eigenvectors[:, 0]),
    )
    scale = max(
        float(eigenvalues.abs().max()), 1e-3 * max(alone)
    )  # where curvatures cancel, rounding is left of them
    return _Point(at.detach(), values.detach(), slopes, by_task, eigenvalues, eigenvectors, scale)


def _rows(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Jacobian (outputs, inputs), some rows at a time."""
    basis = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
    return torch.cat(
        [
            torch.autograd.grad(outputs, inputs, some, retain_graph=True, is_grads_batched=True)[0]
            for some in basis.split(CHUNK)
        ]
    )


def _residual_jacobian(residuals: Losses, at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    values = residuals(at)
    require(
        values.dim() == 2,
        "residuals of shape (tasks, number)",
        tuple(values.shape),
        "Flatten each task's.",
    )
    return _rows(values.flatten() + 0.0 * at.sum(), at)


def _size(gradients: Tensor) -> float:
    return float(gradients.square().sum(1).mean().sqrt())


def _length(at: Tensor, direction: Tensor) -> float:
    """A tenth of the parameters that take part in a direction: how far to walk along it."""
    share, typical = float(direction.abs() @ at.abs()), float(at.square().mean().sqrt()) or 1.0
    return 0.1 * (share if share > 1e-3 * typical else typical)


def _settled(losses: Losses, point: _Point, start: Tensor, curved: Tensor) -> Tensor:
    """Newton steps in the curved directions with the point's curvature, for as long as each halves what is left."""
    best, left, trial = start, math.inf, start
    while True:
        trial = trial.detach().requires_grad_()
        gain, step = point.newton(torch.autograd.grad(losses(trial).mean(), trial)[0], curved)
        if not gain < 0.5 * left:
            return best.detach()
        best, left, trial = trial, gain, trial + step


def _way_out(point: _Point) -> tuple[float, Tensor]:
    """The slope where there is no curvature, and the direction in which the optimum is least determined."""
    flat = point.eigenvectors[:, ~point.curved]
    push = -flat @ (flat.T @ point.gradient)
    slope = float(push.norm())
    if point.curved[0]:
        return slope, point.eigenvectors[:, 0]
    return slope, push / slope if slope > 1e-6 * _size(point.gradients) else next(_flat(point))


def _flat(point: _Point, *known: Tensor) -> Iterator[Tensor]:
    """An orthonormal basis of what has no positive curvature, beyond what is known, each as nearly one parameter's."""
    space = point.eigenvectors[:, point.eigenvalues <= THRESHOLD.fails * point.scale]
    projection = space @ space.T - sum(torch.outer(d, d) for d in known)
    for _ in range(space.shape[1] - len(known)):
        largest = int(projection.diagonal().argmax())
        direction = projection[largest] / projection[largest, largest].sqrt()
        projection = projection - torch.outer(direction, direction)
        yield direction


def _smallest(losses: Losses, point: _Point, way: Tensor) -> tuple[float, float, Interval]:
    """The smallest curvature relative to the scale, by derivatives and on foot; what gradient is left may feign it."""
    scale, length = max(point.scale, torch.finfo(torch.float64).tiny), _length(point.at, way)
    smallest = walked = float(point.eigenvalues[0]) / scale
    if smallest < THRESHOLD.holds:
        walked = 2.0 * _rise(losses, point, length * way) / (scale * length**2)
    left = (point.eigenvectors.T @ point.gradient)[point.curved]
    feigned = float(left.norm()) / (scale * length) + len(way) * torch.finfo(torch.float64).eps
    low, high = (value / scale for value in _reweighted(losses, point))
    return smallest, walked, (min(low, smallest) - feigned, max(high, smallest, walked) + feigned)


def _rise(losses: Losses, point: _Point, move: Tensor) -> float:
    """What the mean loss rises by on the better side of a move, once the curved directions have followed it."""
    others = point.curved.clone()
    others[0] = False
    ends = [_settled(losses, point, point.at + sign * move, others) for sign in (1.0, -1.0)]
    with torch.no_grad():
        return float(
            torch.stack([losses(end).mean() for end in ends]).nan_to_num(math.inf).min()
            - point.losses.mean()
        )


def _reweighted(losses: Losses, point: _Point) -> tuple[float, float]:
    """95% of the smallest curvature over random weights of the tasks, to first order, at the optimum that each has.

    The low end is that of the weakest direction of each; the high end that of the one that is weakest now.
    """
    by_task = _weakest_curvatures(losses, point)
    key = (
        point.hessians.flatten(1)
        @ torch.arange(1.0, point.hessians[0].numel() + 1.0).to(by_task).sqrt()
    )
    random = torch.Generator().manual_seed(0)
    weights = (
        -torch.rand(DRAWS, len(by_task), generator=random, dtype=torch.float64)
        .log()
        .to(by_task.device)
    )
    means = torch.einsum(
        "wt,tij->wij", weights / weights.sum(1, keepdim=True), by_task[key.argsort()]
    )
    return float(torch.linalg.eigvalsh(means)[:, 0].quantile(0.025)), float(
        means[:, 0, 0].quantile(0.975)
    )


def _weakest_curvatures(losses: Losses, point: _Point) -> Tensor:
    """What each task adds to the Hessian in its weakest directions (task, few, few), also by moving the optimum."""
    weakest, at = point.eigenvectors[:, :WEAKEST], point.at.detach().requires_grad_()
    loss = losses(at).mean() + 0.0 * at.pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, at, create_graph=True)
    curvature = (
        torch.stack(
            [torch.autograd.grad(gradient @ v, at, create_graph=True)[0] for v in weakest.T]
        )
        @ weakest
    )
    bends = _rows(curvature.flatten(), at).view(*curvature.shape, -1)
    curved = point.eigenvectors[:, point.curved]
    moves = -(point.gradients @ curved / point.eigenvalues[point.curved]) @ curved.T
    return weakest.T @ point.hessians @ weakest + torch.einsum("tp,ijp->tij", moves, bends)


def _rank(singular: Tensor, scale: float) -> int:
    return int((singular > THRESHOLD.fails * max(float(singular.max()), scale)).sum())


def _described(direction: Tensor, labels: Sequence[str]) -> str:
    """The parameters that make up a direction but for a thousandth, four at most."""
    order = direction.abs().argsort(descending=True, stable=True)
    number = 1 + int((direction[order].square().cumsum(0) < 0.999).sum())
    return ", ".join(f"{labels[i]} ({direction[i]:+.2f})" for i in order[: min(number, 4)].tolist())
