"""Score recovered latents against the true ones, as they stand and after a linear map."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy  # its parts are imported when they are used
from numpy.typing import NDArray
from torch import Tensor

from pyro_hybrid.errors import require, require_seed
from pyro_hybrid.scores.arrays import Array, flatten_data, to_same_tasks
from pyro_hybrid.scores.regression import (
    cross_validated_r,
    held_out_cca,
    match_components,
    matched_correlation,
    percentile_interval,
    resampling_weights,
    standardize,
)

__all__ = ["MCC", "Scores", "mcc"]

NOISES = 5


class Scores(NamedTuple):
    """Column of the table that an :class:`MCC` prints.

    Attributes:
        pearson: strong score by Pearson's correlation.
        spearman: strong score by Spearman's, which also forgives a monotone map of each component.
        weak: mean held-out canonical correlation.
        linear_r: cross-validated :math:`R` of each true component on all estimates, of shape :math:`(D,)`.
    """

    pearson: float
    spearman: float
    weak: float
    linear_r: Array


class MCC(NamedTuple):
    r"""Result of :func:`mcc`; prints as a table.

    Attributes:
        strong: mean of ``matched``: are the estimates the truth up to order, sign and scale?
        matched: each true component's \|correlation\| with its partner, 0 where it has none, of shape :math:`(D,)`.
        assignment: the estimate's column that partners each true component, -1 for none, of shape :math:`(D,)`.
        weak: mean held-out canonical correlation: are they the truth up to an invertible linear map?
        linear_r: :math:`\sqrt{R^2}` of each true component on all estimates, cross-validated, of shape :math:`(D,)`.
        score: all scores of the estimate, with both kinds of correlation.
        low: lower ends of their 95% intervals over tasks.
        high: upper ends of the same intervals.
        random: mean scores of noise of the estimate's shape.
        pca: scores of principal components of the data, as many as there are estimates; None without data.
    """

    strong: float
    matched: Array
    assignment: NDArray[np.int64]
    weak: float
    linear_r: Array
    score: Scores
    low: Scores
    high: Scores
    random: Scores
    pca: Scores | None

    def __str__(self) -> str:
        names = ["strong (Pearson)", "strong (Spearman)", "weak"]
        names += [f"linear R {i}" for i in range(len(self.linear_r))]
        columns = [self.score, self.low, self.high, self.random]
        header = f"{'':<18}{'score':>6}{'95% interval':>16}{'random':>8}"
        if self.pca is not None:
            columns.append(self.pca)
            header += f"{'PCA':>7}"
        rows = zip(names, *(np.hstack(column) for column in columns), strict=True)
        return "\n".join([header, *(_format_row(*row) for row in rows)])


def mcc(
    estimate: Tensor | NDArray[Any],
    true_latents: Tensor | NDArray[Any],
    *,
    method: Literal["pearson", "spearman"] = "pearson",
    data: Tensor | NDArray[Any] | None = None,
    seed: int = 0,
) -> MCC:
    r"""Compute mean correlation coefficients between estimated and true latents, pooled over held-out tasks.

    .. math::
        \text{strong} = \frac1D \max_\pi \sum_{i=1}^{D} \bigl|\operatorname{corr}(\hat z_{\pi(i)}, z_i)\bigr|,
        \qquad R_i^2 = \max\Bigl(1 - \frac{\sum_t (z_{ti} - a_i^{(-t)} \cdot \hat z_t - c_i^{(-t)})^2}
                                          {\sum_t (z_{ti} - \bar z_i)^2},\ 0\Bigr)

    Strong aligns nothing; weak aligns both sides by CCA, fitted on one half of the tasks and scored on the other;
    linear R regresses the truth on the estimate with coefficients :math:`a, c` of the other folds' tasks, which is
    what a theorem with :math:`\hat z = A z + c` promises. The matching maximizes over permutations: within one task
    its chance level is 0.7 to 0.8, so pool the tasks. A true component without a partner (:math:`D' < D`) counts as 0.

    Intervals resample the tasks that are scored; matching, alignment and coefficients stay, so that no task is on both
    sides. Two controls go with each score: noise in place of the estimate, and principal components of the data, which
    say how much of the truth can be had without a model.

    References:
        | Variational Autoencoders and Nonlinear ICA: A Unifying Framework (Khemakhem et al., 2020)
        | https://arxiv.org/abs/1907.04809
        | Unsupervised Feature Extraction by Time-Contrastive Learning and Nonlinear ICA (Hyvärinen & Morioka, 2016)
        | https://arxiv.org/abs/1605.06336

    Arguments:
        estimate: estimated latents, of shape :math:`(T, D')`, one row per task; :math:`D'` may differ from :math:`D`.
        true_latents: true latents, of shape :math:`(T, D)`.
        method: correlation behind ``strong``; Spearman's also forgives a monotone map of each component.
        data: observations that the latents were recovered from, of shape :math:`(T, \dots)`, for the control: say,
            each task's mean support trajectory.
        seed: splits the tasks into halves and folds, and resamples; the global random state is neither read nor
            changed.

    Example:
        >>> import torch
        >>> true_latents = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
        >>> mixed = true_latents @ torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
        >>> print(mcc(mixed, true_latents))
                           score    95% interval  random
        strong (Pearson)   0.716  0.686 to 0.746   0.080
        strong (Spearman)  0.708  0.677 to 0.740   0.081
        weak               1.000  1.000 to 1.000   0.017
        linear R 0         1.000  1.000 to 1.000   0.000
        linear R 1         1.000  1.000 to 1.000   0.000
        linear R 2         1.000  1.000 to 1.000   0.000
    """
    require(
        method in ("pearson", "spearman"),
        "method 'pearson' or 'spearman'",
        repr(method),
        "Choose one of the two.",
    )
    require_seed(seed)
    z_hat, z = to_same_tasks("estimate", estimate, "true_latents", true_latents)
    observations = None if data is None else flatten_data(data, len(z))
    matched, assignment = _match(z_hat, z, method)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(z))
    z_hat = z_hat[order]
    z = z[order]
    score = _score(z_hat, z)
    low, high = _intervals(z_hat, z, resampling_weights(rng, len(z)))
    random = _score_noise(rng, z_hat.shape, z)
    pca = None
    if observations is not None:
        components = _principal_components(observations, z_hat.shape[1])
        pca = _score(components[order], z)
    return MCC(
        strong=float(matched.mean()),
        matched=matched,
        assignment=assignment,
        weak=score.weak,
        linear_r=score.linear_r,
        score=score,
        low=low,
        high=high,
        random=random,
        pca=pca,
    )


def _match(z_hat: Array, z: Array, method: str) -> tuple[Array, NDArray[np.int64]]:
    if method == "spearman":
        return match_components(
            scipy.stats.rankdata(z_hat, axis=0), scipy.stats.rankdata(z, axis=0)
        )
    return match_components(z_hat, z)


def _weighted_scores(
    estimate: Array, target: Array, weights: Array
) -> tuple[Array, Array, Array, Array]:
    """Return the fields of :class:`Scores` under each row of task weights, stacked along the first axis."""
    x = standardize(estimate)
    y = standardize(target)
    return (
        matched_correlation(x, y, weights).mean(1),
        matched_correlation(
            scipy.stats.rankdata(x, axis=0), scipy.stats.rankdata(y, axis=0), weights
        ).mean(1),
        held_out_cca(x, y, weights),
        cross_validated_r(x, y, weights),
    )


def _score(estimate: Array, target: Array) -> Scores:
    fields = _weighted_scores(estimate, target, np.ones((1, len(target))))
    return _to_scores(field[0] for field in fields)


def _intervals(estimate: Array, target: Array, weights: Array) -> tuple[Scores, Scores]:
    fields = _weighted_scores(estimate, target, weights)
    low, high = zip(*(percentile_interval(field) for field in fields), strict=True)
    return _to_scores(low), _to_scores(high)


def _score_noise(rng: np.random.Generator, shape: tuple[int, ...], target: Array) -> Scores:
    scores = [_score(rng.normal(size=shape), target) for _ in range(NOISES)]
    return _to_scores(np.mean(field, axis=0) for field in zip(*scores, strict=True))


def _to_scores(fields: Iterable[Any]) -> Scores:
    pearson, spearman, weak, linear_r = fields
    return Scores(float(pearson), float(spearman), float(weak), linear_r)


def _principal_components(data: Array, num_components: int) -> Array:
    """Return the first principal components; fewer where fewer vary."""
    data = np.ldexp(
        data, -np.frexp(np.abs(data).max())[1]
    )  # squares of huge entries would overflow
    left, singular, _ = np.linalg.svd(data - data.mean(0), full_matrices=False)
    varies = singular > 1e-10 * np.abs(data).max() * np.sqrt(data.size)
    require(
        bool(varies.any()),
        "data that vary over tasks",
        "the same for all",
        "Pass each task's own observations.",
    )
    components: Array = (left * singular)[:, varies]
    return components[:, :num_components]


def _format_row(name: str, score: float, low: float, high: float, *controls: float) -> str:
    row = f"{name:<18}{score:>6.3f}{f'{low:.3f} to {high:.3f}':>16}"
    for control, width in zip(controls, (8, 7), strict=False):
        row += f"{control:>{width}.3f}"
    return row
