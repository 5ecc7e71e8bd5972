"""Are recovered latents the true ones? Correlations without and with a linear alignment, and ICA."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from pyro_hybrid._checks import fail, require

__all__ = ["MCC", "disentangle", "mcc"]

Array = NDArray[np.float64]
Latents = TypeVar("Latents", Tensor, NDArray[Any])

FOLDS = 5
RIDGE = 1e-6
RESTARTS = 5
CONTRASTS = ("cube", "logcosh")  # light tails (uniform), heavy tails; which one fits is measured, not assumed
ITERATIONS = 1000


class MCC(NamedTuple):
    r"""What :func:`mcc` found.

    Attributes:
        strong: Mean of ``matched``: are the estimates the truth up to order, sign and scale?
        matched: Each true component's \|correlation\| with its partner, 0 where it has none, of shape :math:`(D,)`.
        assignment: The estimate's column that partners each true component, -1 for none, of shape :math:`(D,)`.
        weak: Mean held-out canonical correlation: are they the truth up to an invertible linear map?
        linear_r: :math:`\sqrt{R^2}` of each true component on all estimates, cross-validated, of shape :math:`(D,)`.
    """

    strong: float
    matched: Array
    assignment: NDArray[np.int64]
    weak: float
    linear_r: Array


def mcc(
    estimate: Tensor | NDArray[Any],
    truth: Tensor | NDArray[Any],
    *,
    method: Literal["pearson", "spearman"] = "pearson",
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

    References:
        | Variational Autoencoders and Nonlinear ICA: A Unifying Framework (Khemakhem et al., 2020)
        | https://arxiv.org/abs/1907.04809
        | Unsupervised Feature Extraction by Time-Contrastive Learning and Nonlinear ICA (Hyvärinen & Morioka, 2016)
        | https://arxiv.org/abs/1605.06336

    Arguments:
        estimate: Estimated latents, of shape :math:`(T, D')`, one row a task; :math:`D'` may differ from :math:`D`.
        truth: True latents, of shape :math:`(T, D)`.
        method: Correlation behind ``strong``; Spearman's also forgives a monotone map of each component.
        seed: Splits the tasks into halves and folds; the global random state is neither read nor changed.

    Example:
        >>> truth = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
        >>> mixed = truth @ torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
        >>> score = mcc(mixed, truth)
        >>> f"{score.strong:.2f} {score.weak:.2f} {score.linear_r.mean():.2f}"
        '0.72 1.00 1.00'
    """
    require(method in ("pearson", "spearman"), "method 'pearson' or 'spearman'", repr(method), "Choose one of the two.")
    z_hat, z = _pooled("estimate", estimate), _pooled("truth", truth)
    require(len(z_hat) == len(z), "one row a task in both estimate and truth",
            f"{len(z_hat)} and {len(z)} rows", "Pass both for the same tasks, in the same order.")
    _require_tasks("estimate and truth", len(z), max(z_hat.shape[1], z.shape[1]))
    matched, assignment = _match(*(rankdata(v, axis=0) if method == "spearman" else v for v in (z_hat, z)))
    order = np.random.default_rng(seed).permutation(len(z))
    z_hat, z = _standardise(z_hat)[order], _standardise(z)[order]
    return MCC(float(matched.mean()), matched, assignment, _held_out_cca(z_hat, z), _cross_validated_r(z_hat, z))


def disentangle(latents: Latents, *, seed: int = 0, fit: Latents | None = None) -> Latents:
    r"""Independent components of latents over tasks (ICA): undoes a linear mixing up to order, sign and scale.

    .. math::
        \hat s = W (z - \bar z), \qquad W = \arg\min_{\operatorname{cov}(\hat s) = I} \sum_i H(\hat s_i)

    Conditional priors identify latents up to :math:`z = A s + c`. If the true :math:`s` are independent across tasks
    and at most one is Gaussian, :math:`A` is resolved too; two Gaussians stay rotated, and the output doesn't show it.
    FastICA proposes, from several starts with a contrast for light tails and one for heavy tails; kept is the
    proposal with the lowest total entropy, which of the whitened mixtures has the least mutual information.
    Component i is the one that resembles column i of the input most, with its sign; variances over ``fit`` are 1.

    References:
        | Fast and Robust Fixed-Point Algorithms for Independent Component Analysis (Hyvärinen, 1999)
        | https://doi.org/10.1109/72.761722
        | ICA Using Spacings Estimates of Entropy (Learned-Miller & Fisher, 2003)
        | https://www.jmlr.org/papers/v4/learned-miller03a.html

    Arguments:
        latents: Mixed latents :math:`z`, of shape :math:`(T, D)`, one row a task; several hundred tasks are wanted.
        seed: Starting points; the global random state is neither read nor changed.
        fit: Other latents, of shape :math:`(T', D)`, to estimate :math:`W` on, say of the training tasks.

    Returns:
        The components :math:`\hat s`, of shape :math:`(T, D)`; tensor in, tensor out, without gradient.

    Example:
        >>> sources = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
        >>> mixed = sources @ torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
        >>> f"{mcc(mixed, sources).strong:.2f} -> {mcc(disentangle(mixed), sources).strong:.2f}"
        '0.71 -> 1.00'
    """
    z = _matrix("latents", latents)
    name, reference = ("latents", _pooled("latents", latents)) if fit is None else ("fit", _pooled("fit", fit))
    require(z.shape[1] == reference.shape[1], "fit with as many components as latents",
            f"{reference.shape[1]} and {z.shape[1]}", "Pass the same latents of other tasks.")
    _require_tasks(name, *reference.shape)
    mean, scale = reference.mean(0), reference.std(0)
    unmixing = _unmixing((reference - mean) / scale, seed)
    return _like(latents, (z - mean) / scale @ unmixing.T)


def _matrix(name: str, value: object) -> Array:
    """``value`` as a finite float64 matrix (task, component)."""
    require(isinstance(value, (Tensor, np.ndarray)), f"{name} to be a torch tensor or a numpy array",
            type(value).__name__, f"Convert it: torch.as_tensor({name}).", TypeError)
    array = np.asarray(value.detach().cpu().double() if isinstance(value, Tensor) else value, dtype=np.float64)
    require(array.ndim == 2 and array.size > 0, f"{name} of shape (tasks, components)", f"shape {array.shape}",
            "One row a task, pooled over tasks; a single latent is [:, None].")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        row, column = bad[0].tolist()
        fail(f"finite {name}", f"{array[row, column]} in task {row}, component {column} ({len(bad)} such entries)",
             "Drop these tasks from both sides, or find out why inference failed on them.")
    return array


def _pooled(name: str, value: Tensor | NDArray[Any]) -> Array:
    """``value`` as a matrix whose every column varies by more than the rounding of its own precision."""
    array = _matrix(name, value)
    rounding = 8 * (1e-7 if value.dtype in (torch.float32, np.float32) else 1e-16) * np.abs(array).max(0)
    constant = np.flatnonzero(np.ptp(array, axis=0) <= rounding)
    require(not len(constant), f"every component of {name} to vary over tasks",
            f"component {constant.tolist()} constant over {len(array)} tasks",
            "Its correlation is undefined: drop the column, or take latents that respond to the support.")
    return array


def _require_tasks(name: str, tasks: int, components: int) -> None:
    """Each half of the tasks must overdetermine a linear map with intercept."""
    least = 2 * (components + 1) + 1
    require(tasks >= least, f"at least {least} tasks in {name} for {components} components", f"{tasks} tasks",
            "Pool more held-out tasks; never score one task at a time.")


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


def _whitener(x: Array) -> Array:
    """Weights that make the columns of a centred ``x`` uncorrelated with unit variance, up to a small ridge."""
    _, singular, directions = np.linalg.svd(x / np.sqrt(len(x)), full_matrices=False)
    return directions.T / np.sqrt(singular**2 + RIDGE)


def _held_out_cca(x: Array, y: Array) -> float:
    """Mean correlation, on the second half, of the canonical variates of the first; a missing pair counts as 0."""
    half = len(x) // 2
    x, y = x - x[:half].mean(0), y - y[:half].mean(0)
    weights_x, weights_y = _whitener(x[:half]), _whitener(y[:half])
    left, _, right = np.linalg.svd(weights_x.T @ (x[:half].T @ y[:half]) @ weights_y, full_matrices=False)
    variates_x, variates_y = x[half:] @ weights_x @ left, y[half:] @ weights_y @ right.T
    return max(float(np.diag(_correlation(variates_x, variates_y)).sum()) / y.shape[1], 0.0)


def _cross_validated_r(x: Array, y: Array) -> Array:
    """Root of the out-of-sample R² of each column of ``y`` regressed on all of ``x``, 0 where the mean does better."""
    design = np.column_stack([np.ones(len(x)), x])
    fold = np.arange(len(x)) % FOLDS
    residual = np.empty_like(y)
    for k in range(FOLDS):
        coefficients = np.linalg.lstsq(design[fold != k], y[fold != k], rcond=None)[0]
        residual[fold == k] = y[fold == k] - design[fold == k] @ coefficients
    return np.sqrt(np.maximum(1.0 - (residual**2).mean(0), 0.0))


def _unmixing(x: Array, seed: int) -> Array:
    """The FastICA solution with the least total entropy, its rows ordered and signed as the columns of ``x``."""
    rank = int(np.linalg.matrix_rank(x, tol=1e-6 * np.sqrt(len(x))))
    require(rank == x.shape[1], f"{x.shape[1]} linearly independent components", f"rank {rank}",
            "Drop the redundant columns before disentangling.")
    starts = np.random.default_rng(seed).integers(2**31, size=RESTARTS).tolist()
    found = [_fast_ica(x, contrast, start) for contrast in CONTRASTS for start in starts]
    converged = [rows for rows, done in found if done]
    if not converged:
        warnings.warn(f"expected ICA to converge; got {len(found)} runs of {ITERATIONS} iterations that didn't. The "
                      "best is returned, don't rely on it: pass more tasks, check that the latents are not Gaussian.",
                      RuntimeWarning, stacklevel=3)
    rows = min(converged or [rows for rows, _ in found], key=lambda rows: _total_entropy(x @ rows.T))
    _, order = _match(x @ rows.T, x)
    flipped = np.diag(_correlation(x @ rows[order].T, x)) < 0
    return np.where(flipped, -1.0, 1.0)[:, None] * rows[order]


def _fast_ica(x: Array, contrast: str, start: int) -> tuple[Array, bool]:
    """One run of FastICA: its unmixing rows, and whether it converged."""
    ica = FastICA(fun=contrast, whiten="unit-variance", max_iter=ITERATIONS, random_state=start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica.fit(x)
    return ica.components_, ica.n_iter_ < ITERATIONS


def _total_entropy(sources: Array) -> float:
    """Sum over columns of the m-spacing estimate of entropy, up to a constant; ties count as tiny gaps."""
    spacing = round(len(sources) ** 0.5)
    ordered = np.sort(sources, axis=0)
    gaps = ordered[spacing:] - ordered[:-spacing]
    return float(np.log(np.maximum(gaps, 1e-6)).mean(0).sum())


def _like(template: Latents, values: Array) -> Latents:
    """``values`` in the type, precision and place of ``template``; integers become double."""
    if isinstance(template, Tensor):
        dtype = template.dtype if template.is_floating_point() else torch.float64
        return torch.as_tensor(values, dtype=dtype, device=template.device)
    return values.astype(template.dtype if np.issubdtype(template.dtype, np.floating) else np.float64)
