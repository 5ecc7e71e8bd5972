"""How two recoveries of the same latents relate: the same, permuted, linear in each other, or not at all."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_hybrid.identifiability.check import Check, Interval, Threshold, judged
from pyro_hybrid.scores.mcc import (
    Array,
    _cross_validated_r,
    _explained_r,
    _interval,
    _same_tasks,
    _standardise,
    _strong,
    _weights,
)

__all__ = ["Ambiguity", "Kind", "ambiguity", "judge_ambiguity"]

Kind = Literal["identity", "permutation", "linear", "none"]
AGREE = Threshold(holds=0.95, fails=0.8)


class Ambiguity(NamedTuple):
    r"""What :func:`ambiguity` found of ``one``, of shape :math:`(T, D)`, and ``other``, of shape :math:`(T, D')`.

    Attributes:
        kind: The simplest relation of which the data leave no doubt; ``permutation`` includes scalings and offsets.
        linear: Smallest linear R, of the worst component of the side (of both if :math:`D = D'`) with fewer components.
        linear_interval: 95% interval of it over tasks.
        one_from_other: Linear R of each component of ``one``, of shape :math:`(D,)`.
        other_from_one: Linear R of each component of ``other``, of shape :math:`(D',)`.
        strong: Mean \|correlation\| of partners, over the side with fewer components.
        matched: Each partner pair's \|correlation\|, of shape :math:`(\min(D, D'),)`.
        worst: The smallest of them.
        worst_interval: 95% interval of it over tasks.
        identity: :math:`R` of each component as it is with its namesake, the worst one's; 0 if :math:`D \ne D'`.
        identity_interval: 95% interval of it over tasks.
        matrix: :math:`A` of ``one`` :math:`\approx A` ``other``, both standardised, of shape :math:`(D, D')`.
        condition: Its largest singular value over its smallest.
    """

    kind: Kind
    linear: float
    linear_interval: Interval
    one_from_other: Array
    other_from_one: Array
    strong: float
    matched: Array
    worst: float
    worst_interval: Interval
    identity: float
    identity_interval: Interval
    matrix: Array
    condition: float


def ambiguity(
    one: Tensor | NDArray[Any], other: Tensor | NDArray[Any], *, seed: int = 0
) -> Ambiguity:
    r"""How two recoveries of the same tasks' latents relate, of independent trainings, or of one and the truth.

    .. math::
        \text{one}_t \approx A \, \text{other}_t + c, \qquad A = I,\ c = 0?\quad A = \text{scaled permutation?}\quad
        \text{any invertible } A?

    The theory leaves a linear map, and no more: two trainings that are not linear in each other refute, for this
    data, that latents are identified. Each relation is asked of the worst component, on tasks that its coefficients
    were not fitted to, and established where the lower end of its interval is above 0.95; ``kind`` is the simplest
    that is. If numbers of components differ, the larger side can contain the smaller one: only the linear R of the
    smaller from the larger counts then.

    References:
        | On Linear Identifiability of Learned Representations (Roeder, Metz & Kingma, 2021)
        | https://arxiv.org/abs/2007.00810

    Arguments:
        one: Latents, of shape :math:`(T, D)`, one row a task.
        other: Latents of the same tasks, of shape :math:`(T, D')`.
        seed: Splits tasks into folds, and resamples them; the global random state is neither read nor changed.

    Example:
        >>> import torch
        >>> z = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
        >>> found = ambiguity(z @ torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), z)
        >>> found.kind, round(found.strong, 2), round(found.linear, 2)
        ('linear', 0.71, 1.0)
        >>> print(judge_ambiguity(found).why)
        the two agree up to a linear map (R 1.00 or more, condition number 1.1); not up to a permutation (strong 0.71)
    """
    x, y = _same_tasks("one", one, "other", other)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    x, y = x[order], y[order]
    weights = np.vstack([np.ones(len(x)), _weights(rng, len(x))])  # every task once, then resamples
    u, v = _standardise(x), _standardise(y)
    from_other, from_one = _cross_validated_r(v, u, weights), _cross_validated_r(u, v, weights)
    small, large = sorted((u, v), key=lambda side: side.shape[1])
    matched = _strong(large, small, weights)
    counting = [r for r in (from_other, from_one) if r.shape[1] == small.shape[1]]
    identity, permutation, linear = (
        _worst(r) for r in (_unaligned_r(x, y, weights), matched, np.hstack(counting))
    )
    established: dict[Kind, bool] = {
        "identity": _holds(identity),
        "permutation": _holds(permutation),
        "linear": _holds(linear),
        "none": True,
    }
    matrix = np.asarray(np.linalg.lstsq(v, u, rcond=None)[0].T, dtype=np.float64)
    return Ambiguity(
        next(kind for kind, holds in established.items() if holds),
        *linear,
        from_other[0],
        from_one[0],
        float(matched[0].mean()),
        matched[0],
        *permutation,
        *identity,
        matrix,
        float(np.linalg.cond(matrix)),
    )


def judge_ambiguity(numbers: Ambiguity) -> Check:
    """Whether two recoveries agree up to a linear map at least, and up to what exactly.

    Arguments:
        numbers: what :func:`ambiguity` returned.
    """
    linear = numbers.linear, numbers.linear_interval
    relations = {
        "identity": (numbers.identity, numbers.identity_interval),
        "permutation": (numbers.worst, numbers.worst_interval),
    }
    named = relations.get(
        numbers.kind, linear
    )  # is linear as well, and with few tasks better known than a fitted map
    value, interval = linear if _holds(linear) else named
    return judged(
        "residual ambiguity",
        value,
        interval,
        AGREE,
        _why(numbers) + _counted(numbers),
        "Train both longer, and on more tasks. If that doesn't help, the latents are not identified: vary "
        "the supports more, add shots, or take latents away.",
    )


def _why(numbers: Ambiguity) -> str:
    linear = f"(R {numbers.linear:.2f} or more, condition number {numbers.condition:.2g})"
    if numbers.kind == "identity":
        return f"the two are the same as they stand (R {numbers.identity:.2f} or more)"
    if numbers.kind == "permutation":
        return f"the two agree up to order, sign, scale and offset (correlation {numbers.worst:.2f} or more)"
    if numbers.kind == "linear":
        verb = "not" if numbers.worst_interval[1] < AGREE.holds else "perhaps also, perhaps not"
        return f"the two agree up to a linear map {linear}; {verb} up to a permutation (strong {numbers.strong:.2f})"
    if numbers.linear_interval[1] < AGREE.fails:
        return f"the two don't agree up to a linear map: it explains the worst component to R {numbers.linear:.2f} only"
    return f"whether the two agree up to a linear map is open {linear}"


def _counted(numbers: Ambiguity) -> str:
    fewer, more = sorted(numbers.matrix.shape)
    return (
        ""
        if fewer == more
        else f"; what counts is the {fewer} latents of one side, from the other's {more}"
    )


def _unaligned_r(x: Array, y: Array, weights: Array) -> Array:
    """R of each component with its namesake, nothing being fitted, relative to the side that varies less."""
    if x.shape[1] != y.shape[1]:
        return np.zeros((len(weights), 1))
    one, other = (_explained_r(x - y, side - side.mean(0), weights) for side in (x, y))
    return np.minimum(one, other)


def _holds(relation: tuple[float, Interval]) -> bool:
    return AGREE.judge(relation[1]) == "holds"


def _worst(r: Array) -> tuple[float, Interval]:
    """The worst component's value with all tasks, the first row, and its interval over resamples, the others."""
    worst = r.min(1)
    low, high = _interval(worst[1:])
    return float(worst[0]), (float(low), float(high))
