r"""Check if the tasks determine the network's weights, or a meta-learned initialization: locally, at one point.

The mean loss of the tasks is a scalar, so it cannot be injective. The question that has an answer is if this optimum is
the only one nearby: its gradient vanishes, and it curves up in every direction. Neither the scores' covariance nor the
number of tasks decides that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hybrid.errors import require, require_finite, require_floating
from pyro_hybrid.identifiability.local_curvature import (
    CURVED,
    LocalCurvature,
    Losses,
    curvature_at,
    jacobian_rows,
    newton_optimum,
    smallest_curvature,
)
from pyro_hybrid.scores.check import Check, Interval

__all__ = [
    "MetaParameters",
    "Shapes",
    "judge_meta_parameters",
    "measure_meta_parameters",
    "require_few",
]

Shapes = Mapping[str, Sequence[int]]
NAME = "meta-parameters"
GAIN = 0.01  # nats per task that a Newton step may still gain at an optimum
LARGEST = 1500


class MetaParameters(NamedTuple):
    r"""Measurements of P parameters, all at ``at`` but for ``gradient`` and ``gain``.

    Attributes:
        num_tasks: number of tasks.
        given: description of what was held fixed.
        gradient: norm of the mean loss's gradient at the given point.
        gain: Newton decrement there: gain in nats per task that the quadratic model still predicts.
        at: the optimum that Newton steps led to if little was to be gained, else the given point.
        slope: norm of the gradient's part in directions without curvature, where nothing stops it.
        eigenvalues, eigenvectors: of the mean loss's Hessian, ascending, (P,) and in columns (P, P).
        rank: number of eigenvalues that are not zero up to rounding.
        scale: largest curvature, or one that counts as large where the tasks' curvatures cancel.
        smallest: smallest eigenvalue, relative to ``scale``.
        walked: the same from the loss some way off, the other parameters following; ``smallest`` where that has margin.
        interval: of ``smallest`` for other weights of the tasks, and as walked.
        score_eigenvalues, score_rank: of the tasks' :math:`E[\nabla L \nabla L^\top]`; they decide nothing.
        singular_values, jacobian_rank: of the tasks' Jacobians stacked: of residuals if given, else of gradients.
        directions: all without positive curvature, or else the weakest, by the parameters that take part most.
    """

    num_tasks: int
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
        """Hessian of the mean loss, (P, P)."""
        return (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T


def measure_meta_parameters(
    losses: Losses,
    at: Tensor,
    *,
    residuals: Losses | None = None,
    names: Shapes | None = None,
    given: str = "",
    progress: bool = True,
) -> MetaParameters:
    r"""Measure if a mean loss has a locally unique optimum, in float64.

    .. math:: \bar L(\varphi) = \frac1T \sum_t L_t(\varphi), \qquad \nabla \bar L(\varphi^*) = 0, \quad
              \nabla^2 \bar L(\varphi^*) \succ 0

    These two conditions suffice. For a yes, the curvature must stay positive for other weights of the tasks (a Bayesian
    bootstrap, which leaves none out), at the optimum that these would have. For a no, it must stay zero or negative,
    and the loss must not rise when the flat direction is walked, as it does from a quartic optimum.

    References:
        | Numerical Optimization, theorem 2.4 (Nocedal & Wright, 2006), https://doi.org/10.1007/978-0-387-40065-5
        | The Bayesian Bootstrap (Rubin, 1981), https://doi.org/10.1214/aos/1176345338

    Arguments:
        losses: a deterministic function of parameters (P,) that returns each task's loss in nats, (T,).
        at: the point, (P,).
        residuals: a function of parameters that returns each task's residuals, (T, m).
        names: the parameters' names and shapes in their order, as in ``{"weight": (3, 2), "bias": (3,)}``.
        given: description of what is held fixed.
        progress: show a progress bar if it takes longer than two seconds.

    >>> target = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    >>> def losses(p):
    ...     return (p[0] * p[1] - target) ** 2
    >>> numbers = measure_meta_parameters(losses, torch.tensor([1.0, 2.0]), names={"gain": (), "size": ()})
    >>> numbers.rank, numbers.directions
    (1, ('size (+0.89), gain (-0.45)',))
    >>> judge_meta_parameters(numbers).status
    'fails'
    """
    labels = _check_parameters(at, names)
    at = at.detach().double()
    _check_losses(losses, at)
    start = curvature_at(losses, at, progress=progress)
    gain, step = start.newton(start.gradient, start.is_curved)
    point = start
    if gain <= GAIN and step.any():
        optimum = newton_optimum(losses, start, at, start.is_curved)
        point = curvature_at(losses, optimum, progress=progress)
    slope, weakest = _weakest_direction(point)
    curvature = smallest_curvature(losses, point, weakest)
    score_singular = _stacked_singular(point.gradients, point)
    score_scale = point.scale * (1.0 + float(point.at.norm()))
    if residuals is None:
        singular = _stacked_singular(point.hessians.flatten(0, 1), point)
        jacobian_scale = point.scale
    else:
        singular = _stacked_singular(_residual_jacobian(residuals, point.at), point)
        jacobian_scale = 0.0
    directions = (weakest, *_flat_directions(point, weakest))
    return MetaParameters(
        num_tasks=len(point.losses),
        given=given,
        gradient=float(start.gradient.norm()),
        gain=gain,
        at=point.at,
        slope=slope,
        eigenvalues=point.eigenvalues,
        eigenvectors=point.eigenvectors,
        rank=int(point.is_curved.sum()),
        scale=point.scale,
        smallest=curvature.value,
        walked=curvature.walked,
        interval=curvature.interval,
        score_eigenvalues=score_singular.square(),
        score_rank=_rank(score_singular, score_scale),
        singular_values=singular,
        jacobian_rank=_rank(singular, jacobian_scale),
        directions=tuple(_describe(direction, labels) for direction in directions),
    )


def judge_meta_parameters(numbers: MetaParameters) -> Check:
    """Judge if the optimum is the only one nearby: a yes has a margin, a no has walked away without a rise.

    Arguments:
        numbers: result of :func:`measure_meta_parameters`.
    """
    place = f"Locally, at this point, for {numbers.num_tasks} task{'s' * (numbers.num_tasks > 1)}"
    if numbers.given:
        place += f", with {numbers.given} held fixed"
    if not numbers.gain <= GAIN:
        return Check(
            NAME,
            "undecided",
            numbers.smallest,
            numbers.interval,
            CURVED,
            f"{place}, there is no optimum yet: a Newton step would gain {numbers.gain:.2g} nats per task.",
            "Continue training, or average more particles; the gradient must vanish before the curvature can tell.",
        )
    return Check.from_interval(
        NAME,
        numbers.smallest,
        numbers.interval,
        CURVED,
        f"{place}, {_explain(numbers)}",
        "Fix or tie one of the parameters named, bound their size, or add tasks that tell them apart.",
    )


def _explain(numbers: MetaParameters) -> str:
    first, *others = numbers.directions
    more = f" ({len(others)} more such directions: {'; '.join(others[:3])})" if others else ""
    status = CURVED.judge(numbers.interval)
    if status == "holds":
        number = len(numbers.at)
        return f"the optimum is the only one: the loss curves up in all {number} directions, least along {first}."
    if status == "fails":
        course = "falls" if numbers.walked < -CURVED.fails else "stays level"
        return f"the optimum is not unique: the loss {course} along {first}{more}."
    return f"the optimum may or may not be unique: the curvature along {first} has no margin{more}."


def require_few(size: int, shapes: Shapes) -> None:
    """Require that a Hessian of each task fits into memory."""
    require(
        size <= LARGEST,
        f"at most {LARGEST} parameters, for each task's Hessian",
        f"{size}, of {dict(shapes)}",
        "Judge fewer at a time: name some of them.",
    )


def _check_parameters(at: Tensor, names: Shapes | None) -> list[str]:
    """Check the point, and return a label for each of its entries."""
    require_floating("at", at)
    require(
        at.dim() == 1 and len(at) > 0, "at of shape (parameters,)", tuple(at.shape), "Flatten it."
    )
    require_finite("at", at)
    shapes = {"parameter": (len(at),)} if names is None else names
    labels = [
        f"{name}{list(index) or ''}"
        for name, shape in shapes.items()
        for index in itertools.product(*map(range, shape))
    ]
    require(
        len(labels) == len(at),
        f"names of {len(at)} parameters",
        f"{len(labels)} by {dict(shapes)}",
        "Give each name its shape, in the order in which the point was flattened.",
    )
    require_few(len(at), shapes)
    return labels


def _check_losses(losses: Losses, at: Tensor) -> None:
    with torch.no_grad():
        first = losses(at)
        second = losses(at)
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
        "Fix the random numbers inside the function, as weight_losses does.",
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
    return jacobian_rows(values.flatten() + 0.0 * at.sum(), at)


def _stacked_singular(rows: Tensor, point: LocalCurvature) -> Tensor:
    singular: Tensor = torch.linalg.svdvals(rows)
    return singular / math.sqrt(len(point.losses))


def _weakest_direction(point: LocalCurvature) -> tuple[float, Tensor]:
    """Return the slope where there is no curvature, and the direction in which the optimum is least determined."""
    flat = point.eigenvectors[:, ~point.is_curved]
    push = -flat @ (flat.T @ point.gradient)
    slope = float(push.norm())
    if point.is_curved[0]:
        return slope, point.eigenvectors[:, 0]
    if slope > 1e-6 * point.gradient_size:
        return slope, push / slope
    return slope, next(_flat_directions(point))


def _flat_directions(point: LocalCurvature, *known: Tensor) -> Iterator[Tensor]:
    """Yield an orthonormal basis of the directions without positive curvature, beyond those that are known.

    Each is as nearly one parameter's as possible.
    """
    space = point.eigenvectors[:, point.eigenvalues <= CURVED.fails * point.scale]
    projection = space @ space.T - sum(torch.outer(d, d) for d in known)
    for _ in range(space.shape[1] - len(known)):
        largest = int(projection.diagonal().argmax())
        direction = projection[largest] / projection[largest, largest].sqrt()
        projection = projection - torch.outer(direction, direction)
        yield direction


def _rank(singular: Tensor, scale: float) -> int:
    return int((singular > CURVED.fails * max(float(singular.max()), scale)).sum())


def _describe(direction: Tensor, labels: Sequence[str]) -> str:
    """Name the parameters that make up a direction but for a thousandth, four at most."""
    order = direction.abs().argsort(descending=True, stable=True)
    number = 1 + int((direction[order].square().cumsum(0) < 0.999).sum())
    largest = order[: min(number, 4)].tolist()
    return ", ".join(f"{labels[i]} ({direction[i]:+.2f})" for i in largest)
