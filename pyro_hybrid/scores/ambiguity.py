"""Compare two recoveries of the same latents: identical, permuted, linear in each other, or unrelated."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_hybrid.errors import require_seed
from pyro_hybrid.scores.arrays import Array, to_same_tasks
from pyro_hybrid.scores.check import Check, Interval, Threshold
from pyro_hybrid.scores.regression import (
    cross_validated_r,
    explained_r,
    matched_correlation,
    percentile_interval,
    resampling_weights,
    standardize,
)

__all__ = ["Ambiguity", "Kind", "judge_ambiguity", "measure_ambiguity"]

Kind = Literal["identity", "permutation", "linear", "none"]
AGREE = Threshold(holds=0.95, fails=0.8)


class Ambiguity(NamedTuple):
    r"""Relation between ``one``, of shape :math:`(T, D)`, and ``other``, of shape :math:`(T, D')`.

    Attributes:
        kind: simplest relation that the data leave no doubt of; ``permutation`` includes scalings and offsets.
        linear: smallest linear R, of the worst component of the side (of both if :math:`D = D'`) with fewer components.
        linear_interval: 95% interval of it over tasks.
        one_from_other: linear R of each component of ``one``, of shape :math:`(D,)`.
        other_from_one: linear R of each component of ``other``, of shape :math:`(D',)`.
        strong: mean \|correlation\| of partners, over the side with fewer components.
        matched: \|correlation\| of each pair of partners, of shape :math:`(\min(D, D'),)`.
        worst: smallest of them.
        worst_interval: 95% interval of it over tasks.
        identity: :math:`R` of each component as it is with its namesake, the worst one's; 0 if :math:`D \ne D'`.
        identity_interval: 95% interval of it over tasks.
        matrix: :math:`A` of ``one`` :math:`\approx A` ``other``, both standardized, of shape :math:`(D, D')`.
        condition: its largest singular value over its smallest.
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


class _Agreement(NamedTuple):
    """Agreement of the worst component under one relation, with its interval over tasks."""

    value: float
    interval: Interval

    @classmethod
    def of_worst(cls, r: Array) -> _Agreement:
        """Take the worst component's value with all tasks, the first row, and its interval over the other rows."""
        worst = r.min(1)
        low, high = percentile_interval(worst[1:])
        return cls(float(worst[0]), (float(low), float(high)))

    @property
    def is_established(self) -> bool:
        """True where the data leave no doubt of the relation."""
        return AGREE.judge(self.interval) == "holds"


def measure_ambiguity(
    one: Tensor | NDArray[Any], other: Tensor | NDArray[Any], *, seed: int = 0
) -> Ambiguity:
    r"""Measure how two recoveries of the same tasks' latents relate: of two trainings, or of one and the truth.

    .. math::
        \text{one}_t \approx A \, \text{other}_t + c, \qquad A = I,\ c = 0?\quad A = \text{scaled permutation?}\quad
        \text{any invertible } A?

    The theory leaves a linear map, and no more: two trainings that are not linear in each other refute, for this
    data, that latents are identified. Each relation is measured at the worst component, on tasks that its coefficients
    were not fitted to, and established where the lower end of its interval is above 0.95; ``kind`` is the simplest
    that is. If numbers of components differ, the larger side can contain the smaller one: only the linear R of the
    smaller from the larger counts then.

    References:
        | On Linear Identifiability of Learned Representations (Roeder, Metz & Kingma, 2021)
        | https://arxiv.org/abs/2007.00810

    Arguments:
        one: latents, of shape :math:`(T, D)`, one row per task.
        other: latents of the same tasks, of shape :math:`(T, D')`.
        seed: splits tasks into folds, and resamples them; the global random state is neither read nor changed.

    Example:
        >>> import torch
        >>> z = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
        >>> numbers = measure_ambiguity(z @ torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), z)
        >>> numbers.kind, round(numbers.strong, 2), round(numbers.linear, 2)
        ('linear', 0.71, 1.0)
        >>> print(judge_ambiguity(numbers).why)  # doctest: +NORMALIZE_WHITESPACE
        The two agree up to a linear map (R at least 1.00, condition number 1.1), but not up to a permutation
        (strong 0.71).
    """
    require_seed(seed)
    x, y = to_same_tasks("one", one, "other", other)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    x = x[order]
    y = y[order]
    weights = np.vstack([np.ones(len(x)), resampling_weights(rng, len(x))])  # all tasks, resamples
    u = standardize(x)
    v = standardize(y)
    one_from_other = cross_validated_r(v, u, weights)
    other_from_one = cross_validated_r(u, v, weights)
    small, large = sorted((u, v), key=lambda side: side.shape[1])
    matched = matched_correlation(large, small, weights)
    num_components = small.shape[1]
    counted = [r for r in (one_from_other, other_from_one) if r.shape[1] == num_components]
    linear = _Agreement.of_worst(np.hstack(counted))
    permutation = _Agreement.of_worst(matched)
    identity = _Agreement.of_worst(_unaligned_r(x, y, weights))
    matrix = np.asarray(np.linalg.lstsq(v, u, rcond=None)[0].T, dtype=np.float64)
    return Ambiguity(
        kind=_simplest(identity, permutation, linear),
        linear=linear.value,
        linear_interval=linear.interval,
        one_from_other=one_from_other[0],
        other_from_one=other_from_one[0],
        strong=float(matched[0].mean()),
        matched=matched[0],
        worst=permutation.value,
        worst_interval=permutation.interval,
        identity=identity.value,
        identity_interval=identity.interval,
        matrix=matrix,
        condition=float(np.linalg.cond(matrix)),
    )


def _simplest(identity: _Agreement, permutation: _Agreement, linear: _Agreement) -> Kind:
    if identity.is_established:
        return "identity"
    if permutation.is_established:
        return "permutation"
    return "linear" if linear.is_established else "none"


def _unaligned_r(x: Array, y: Array, weights: Array) -> Array:
    """Return R of each component with its namesake, without a fit, relative to the side that varies less."""
    if x.shape[1] != y.shape[1]:
        return np.zeros((len(weights), 1))
    largest = np.maximum(np.abs(x), np.abs(y)).max(0)
    exponents = np.frexp(largest)[1]  # a common unit, in which squares don't overflow
    x = np.ldexp(x, -exponents)
    y = np.ldexp(y, -exponents)
    residual = x - y
    relative_to_x = explained_r(residual, x - x.mean(0), weights)
    relative_to_y = explained_r(residual, y - y.mean(0), weights)
    return np.minimum(relative_to_x, relative_to_y)


def judge_ambiguity(numbers: Ambiguity) -> Check:
    """Judge if two recoveries agree up to a linear map at least, and say up to what exactly.

    Arguments:
        numbers: result of :func:`measure_ambiguity`.
    """
    agreement = _Agreement(numbers.linear, numbers.linear_interval)
    if (
        not agreement.is_established
    ):  # with few tasks, a simpler relation is known better than a fitted map
        if numbers.kind == "identity":
            agreement = _Agreement(numbers.identity, numbers.identity_interval)
        elif numbers.kind == "permutation":
            agreement = _Agreement(numbers.worst, numbers.worst_interval)
    return Check.from_interval(
        "residual ambiguity",
        agreement.value,
        agreement.interval,
        AGREE,
        _explain(numbers) + _explain_sizes(numbers),
        "Train both longer, and on more tasks. If that does not help, the latents are not identified: vary "
        "the supports more, add shots, or remove latents.",
    )


def _explain(numbers: Ambiguity) -> str:
    linear = f"(R at least {numbers.linear:.2f}, condition number {numbers.condition:.2g})"
    if numbers.kind == "identity":
        return f"The two are the same without any alignment (R at least {numbers.identity:.2f})."
    if numbers.kind == "permutation":
        return f"The two agree up to order, sign, scale and offset (correlation at least {numbers.worst:.2f})."
    if numbers.kind == "linear":
        is_refuted = numbers.worst_interval[1] < AGREE.holds
        verb = "but not" if is_refuted else "and perhaps also"
        return f"The two agree up to a linear map {linear}, {verb} up to a permutation (strong {numbers.strong:.2f})."
    if numbers.linear_interval[1] < AGREE.fails:
        return f"The two do not agree up to a linear map, which explains the worst component to R {numbers.linear:.2f} only."
    return f"The data leave open whether the two agree up to a linear map {linear}."


def _explain_sizes(numbers: Ambiguity) -> str:
    fewer, more = sorted(numbers.matrix.shape)
    if fewer == more:
        return ""
    return f" Only the {fewer} latents of one side are judged, as functions of the {more} of the other."
