"""Are recovered latents the true ones? Correlations as they stand and after a linear map, intervals and controls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from torch import Tensor

from pyro_hybrid.errors import fail, require

__all__ = ["MCC", "Scores", "mcc"]

Array = NDArray[np.float64]
Latents = TypeVar("Latents", Tensor, NDArray[Any])

FOLDS = 5
RIDGE = 1e-6
RESAMPLES = 200
NOISES = 5


class Scores(NamedTuple):
    """One column of the table that an :class:`MCC` prints.

    Attributes:
        pearson: Strong score by Pearson's correlation.
        spearman: Strong score by Spearman's, which also forgives a monotone map of each component.
        weak: Mean held-out canonical correlation.
        linear_r: Cross-validated :math:`R` of each true component on all estimates, of shape :math:`(D,)`.
    """

    pearson: float
    spearman: float
    weak: float
    linear_r: Array


class MCC(NamedTuple):
    r"""What :func:`mcc` found; prints as a table.

    Attributes:
        strong: Mean of ``matched``: are the estimates the truth up to order, sign and scale?
        matched: Each true component's \|correlation\| with its partner, 0 where it has none, of shape :math:`(D,)`.
        assignment: The estimate's column that partners each true component, -1 for none, of shape :math:`(D,)`.
        weak: Mean held-out canonical correlation: are they the truth up to an invertible linear map?
        linear_r: :math:`\sqrt{R^2}` of each true component on all estimates, cross-validated, of shape :math:`(D,)`.
        score: All scores of the estimate, with both kinds of correlation.
        low: Where their 95% intervals over tasks begin.
        high: Where they end.
        random: What noise of the estimate's shape scores, the mean of some draws.
        pca: What principal components of the data score, as many as there are estimates; None without data.
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
        names = [
            "strong (Pearson)",
            "strong (Spearman)",
            "weak",
            *(f"linear R {i}" for i in range(len(self.linear_r))),
        ]
        controls = [self.random] if self.pca is None else [self.random, self.pca]
        columns = [np.hstack(scores) for scores in (self.score, self.low, self.high, *controls)]
        lines = [
            f"{'':<18}{'score':>6}{'95% interval':>16}{'random':>8}"
            + ("" if self.pca is None else f"{'PCA':>7}")
        ]
        for name, score, low, high, *others in zip(names, *columns, strict=True):
            control = "".join(
                f"{other:>{width}.3f}" for other, width in zip(others, (8, 7), strict=False)
            )
            lines.append(f"{name:<18}{score:>6.3f}{f'{low:.3f} to {high:.3f}':>16}{control}")
        return "\n".join(lines)


def mcc(
    estimate: Tensor | NDArray[Any],
    truth: Tensor | NDArray[Any],
    *,
    method: Literal["pearson", "spearman"] = "pearson",
    data: Tensor | NDArray[Any] | None = None,
    seed: int = 0,
) -> MCC:
    r"""Mean correlation coefficients between estimated and true latents, pooled over held-out tasks.

    .. math::
        \text{strong} = \frac1D \max_\pi \sum_{i=1}^{D} \bigl|\operatorname{corr}(\hat z_{\pi(i)}, z_i)\bigr|,
        \qquad R_i^2 = \max\Bigl(1 - \frac{\sum_t (z_{ti} - a_i^{(-t)} \cdot \hat z_t - c_i^{(-t)})^2}
                                          {\sum_t (z_{ti} - \bar z_i)^2},\ 0\Bigr)

    Strong aligns nothing; weak aligns both sides by CCA, fitted on one half of the tasks and scored on the other;
    linear R regresses the truth on the estimate with coefficients :math:`a, c` of the other folds' tasks, which is
    what a theorem with :math:`\hat z = A z + c` promises. The matching maximises over permutations: within one task
    its chance level is 0.7 to 0.8, so pool the tasks. A true component without a partner (:math:`D' < D`) counts as 0.

    Intervals resample the tasks that are scored; matching, alignment and coefficients stay, so that no task is on both
    sides. Two controls go with each score: noise in place of the estimate, and principal components of the data, which
    say how much of the truth lies open.

    References:
        | Variational Autoencoders and Nonlinear ICA: A Unifying Framework (Khemakhem et al., 2020)
        | https://arxiv.org/abs/1907.04809
        | Unsupervised Feature Extraction by Time-Contrastive Learning and Nonlinear ICA (Hyvärinen & Morioka, 2016)
        | https://arxiv.org/abs/1605.06336

    Arguments:
        estimate: Estimated latents, of shape :math:`(T, D')`, one row a task; :math:`D'` may differ from :math:`D`.
        truth: True latents, of shape :math:`(T, D)`.
        method: Correlation behind ``strong``; Spearman's also forgives a monotone map of each component.
        data: What the latents were recovered from, for the control, of shape :math:`(T, \dots)`: say, each task's mean
            support trajectory.
        seed: Splits the tasks into halves and folds, and resamples; the global random state is neither read nor
            changed.

    Example:
        >>> truth = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
        >>> mixed = truth @ torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
        >>> print(mcc(mixed, truth))
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
    z_hat, z = _same_tasks("estimate", estimate, "truth", truth)
    observed = None if data is None else _flattened(data, len(z))
    matched, assignment = _match(
        *(rankdata(v, axis=0) if method == "spearman" else v for v in (z_hat, z))
    )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(z))
    z_hat, z = z_hat[order], z[order]
    score = _score(z_hat, z)
    low, high = (
        _scores(end)
        for end in zip(*map(_interval, _kinds(z_hat, z, _weights(rng, len(z)))), strict=True)
    )
    noises = zip(*(_score(rng.normal(size=z_hat.shape), z) for _ in range(NOISES)), strict=True)
    random = _scores(np.mean(draws, axis=0) for draws in noises)
    pca = None if observed is None else _score(_principal(observed, z_hat.shape[1])[order], z)
    return MCC(
        float(matched.mean()),
        matched,
        assignment,
        score.weak,
        score.linear_r,
        score,
        low,
        high,
        random,
        pca,
    )


def _kinds(estimate: Array, truth: Array, weights: Array) -> tuple[Array, Array, Array, Array]:
    """Every kind of :class:`Scores` under each row of weights of the tasks, stacked along the first axis."""
    x, y = _standardise(estimate), _standardise(truth)
    ranks = rankdata(x, axis=0), rankdata(y, axis=0)
    return (
        _strong(x, y, weights).mean(1),
        _strong(*ranks, weights).mean(1),
        _held_out_cca(x, y, weights),
        _cross_validated_r(x, y, weights),
    )


def _scores(kinds: Iterable[Any]) -> Scores:
    pearson, spearman, weak, linear_r = kinds
    return Scores(float(pearson), float(spearman), float(weak), linear_r)


def _score(estimate: Array, truth: Array) -> Scores:
    return _scores(kind[0] for kind in _kinds(estimate, truth, np.ones((1, len(truth)))))


def _weights(rng: np.random.Generator, tasks: int) -> Array:
    """How often each task is in each resample, of shape (resample, task)."""
    return rng.multinomial(tasks, np.full(tasks, 1 / tasks), size=RESAMPLES).astype(np.float64)


def _interval(resampled: Array) -> Array:
    """Both ends of the middle 95% along the first axis, in its place."""
    return np.quantile(resampled, [0.025, 0.975], axis=0)


def _same_tasks(name: str, value: Any, other_name: str, other: Any) -> tuple[Array, Array]:
    """Both as matrices of the same, sufficiently many tasks."""
    x, y = _pooled(name, value), _pooled(other_name, other)
    require(
        len(x) == len(y),
        f"one row a task in both {name} and {other_name}",
        f"{len(x)} and {len(y)} rows",
        "Pass both for the same tasks, in the same order.",
    )
    _require_tasks(f"{name} and {other_name}", len(y), max(x.shape[1], y.shape[1]))
    return x, y


def _flattened(data: Tensor | NDArray[Any], tasks: int) -> Array:
    """One row of observations a task."""
    require(
        data.ndim > 0 and len(data) == tasks,
        f"data of {tasks} tasks, those of the estimate",
        f"shape {tuple(data.shape)}",
        "Pass what each task's latents were recovered from, one entry a task.",
    )
    return _matrix("data", data.reshape(tasks, -1))


def _principal(data: Array, components: int) -> Array:
    """The first principal components, as many as vary."""
    left, singular, _ = np.linalg.svd(data - data.mean(0), full_matrices=False)
    varying = singular > 1e-10 * np.abs(data).max() * np.sqrt(data.size)
    require(
        bool(varying.any()),
        "data that vary over tasks",
        "the same for all",
        "Pass each task's own observations.",
    )
    return (left * singular)[:, varying][:, :components]


def _matrix(name: str, value: object) -> Array:
    """``value`` as a finite float64 matrix (task, component)."""
    require(
        isinstance(value, (Tensor, np.ndarray)),
        f"{name} to be a torch tensor or a numpy array",
        type(value).__name__,
        f"Convert it: torch.as_tensor({name}).",
        TypeError,
    )
    array = np.asarray(
        value.detach().cpu().double() if isinstance(value, Tensor) else value, dtype=np.float64
    )
    require(
        array.ndim == 2 and array.size > 0,
        f"{name} of shape (tasks, components)",
        f"shape {array.shape}",
        "One row a task, pooled over tasks; a single latent is [:, None].",
    )
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        row, column = bad[0].tolist()
        fail(
            f"finite {name}",
            f"{array[row, column]} in task {row}, component {column} ({len(bad)} such entries)",
            "Drop these tasks from both sides, or find out why inference failed on them.",
        )
    return array


def _pooled(name: str, value: Tensor | NDArray[Any]) -> Array:
    """``value`` as a matrix whose every column varies by more than the rounding of its own precision."""
    array = _matrix(name, value)
    rounding = (
        8 * (1e-7 if value.dtype in (torch.float32, np.float32) else 1e-16) * np.abs(array).max(0)
    )
    constant = np.flatnonzero(np.ptp(array, axis=0) <= rounding)
    require(
        not len(constant),
        f"every component of {name} to vary over tasks",
        f"component {constant.tolist()} constant over {len(array)} tasks",
        "Its correlation is undefined: drop the column, or take latents that respond to the support.",
    )
    return array


def _require_tasks(name: str, tasks: int, components: int) -> None:
    """Each half of the tasks must overdetermine a linear map with intercept."""
    least = 2 * (components + 1) + 1
    require(
        tasks >= least,
        f"at least {least} tasks in {name} for {components} components",
        f"{tasks} tasks",
        "Pool more held-out tasks; never score one task at a time.",
    )


def _standardise(x: Array) -> Array:
    return (x - x.mean(0)) / np.maximum(x.std(0), np.finfo(np.float64).tiny)


def _correlation(x: Array, y: Array) -> Array:
    """Pearson correlation of every column of ``x`` with every column of ``y``."""
    return np.clip(_standardise(x).T @ _standardise(y) / len(x), -1.0, 1.0)


def _match(estimate: Array, truth: Array) -> tuple[Array, NDArray[np.int64]]:
    """The one-to-one assignment with the largest sum of absolute correlations, and these correlations."""
    correlation = np.abs(_correlation(estimate, truth))
    columns, components = linear_sum_assignment(correlation, maximize=True)
    matched, assignment = np.zeros(truth.shape[1]), np.full(truth.shape[1], -1, dtype=np.int64)
    matched[components], assignment[components] = correlation[columns, components], columns
    return matched, assignment


def _weighted_correlation(x: Array, y: Array, weights: Array) -> Array:
    """Pearson correlation of each column of ``x`` with that of ``y`` under each row of weights, 0 for a constant."""
    share = weights / np.maximum(weights.sum(1, keepdims=True), 1.0)
    mean_x, mean_y = share @ x, share @ y
    variances = (share @ x**2 - mean_x**2) * (share @ y**2 - mean_y**2)
    covariance = share @ (x * y) - mean_x * mean_y
    return np.clip(
        covariance / np.sqrt(np.maximum(variances, np.finfo(np.float64).tiny)), -1.0, 1.0
    )


def _strong(estimate: Array, truth: Array, weights: Array) -> Array:
    """Each true component's correlation with its partner under each row of weights; partner and sign are those of all
    tasks, so that resamples of noise scatter about its score and not above it."""
    _, assignment = _match(estimate, truth)
    partners = estimate[:, assignment]
    sign = np.where(assignment < 0, 0.0, np.sign(np.diag(_correlation(partners, truth))))
    return sign * _weighted_correlation(partners, truth, weights)


def _whitener(x: Array) -> Array:
    """Weights that make the columns of a centred ``x`` uncorrelated with unit variance, up to a small ridge."""
    _, singular, directions = np.linalg.svd(x / np.sqrt(len(x)), full_matrices=False)
    return directions.T / np.sqrt(singular**2 + RIDGE)


def _held_out_cca(x: Array, y: Array, weights: Array) -> Array:
    """Mean correlation, on the second half, of the canonical variates of the first; a missing pair counts as 0."""
    half = len(x) // 2
    x, y = x - x[:half].mean(0), y - y[:half].mean(0)
    weights_x, weights_y = _whitener(x[:half]), _whitener(y[:half])
    left, _, right = np.linalg.svd(
        weights_x.T @ (x[:half].T @ y[:half]) @ weights_y, full_matrices=False
    )
    variates_x, variates_y = x[half:] @ weights_x @ left, y[half:] @ weights_y @ right.T
    correlation = _weighted_correlation(variates_x, variates_y, weights[:, half:])
    return np.maximum(correlation.sum(1) / y.shape[1], 0.0)


def _cross_validated_r(x: Array, y: Array, weights: Array) -> Array:
    """Root of the out-of-sample R² of each column of ``y`` regressed on all of ``x``, 0 where the mean does better."""
    design = np.column_stack([np.ones(len(x)), x])
    fold = np.arange(len(x)) % FOLDS
    residual = np.empty_like(y)
    for k in range(FOLDS):
        coefficients = np.linalg.lstsq(design[fold != k], y[fold != k], rcond=None)[0]
        residual[fold == k] = y[fold == k] - design[fold == k] @ coefficients
    return _explained_r(residual, y, weights)


def _explained_r(residual: Array, y: Array, weights: Array) -> Array:
    """Root of the R² that residuals leave, under each row of weights, 0 where the mean does better."""
    share = weights / weights.sum(1, keepdims=True)
    variance = np.maximum(share @ y**2 - (share @ y) ** 2, np.finfo(np.float64).tiny)
    return np.sqrt(np.maximum(1.0 - share @ residual**2 / variance, 0.0))


def _like(template: Latents, values: Array) -> Latents:
    """``values`` in the type, precision and place of ``template``; integers become double."""
    if isinstance(template, Tensor):
        dtype = template.dtype if template.is_floating_point() else torch.float64
        return torch.as_tensor(values, dtype=dtype, device=template.device)
    return values.astype(
        template.dtype if np.issubdtype(template.dtype, np.floating) else np.float64
    )
