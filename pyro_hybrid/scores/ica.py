"""Disentangle latents by independent component analysis over tasks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pyro_hybrid.errors import require, require_integer, require_package, require_seed
from pyro_hybrid.scores.arrays import (
    Array,
    Latents,
    convert_like,
    require_enough_tasks,
    to_matrix,
    to_varying_matrix,
)
from pyro_hybrid.scores.regression import ColumnScale, correlation, match_components

__all__ = ["CONTRASTS", "disentangle", "least_entropy_rows", "unmixing_rows"]

Contrast = str | Callable[[Array], tuple[Array, Array]]


def _skewness(u: Array) -> tuple[Array, Array]:
    return u**2, 2 * u.mean(-1)


# Contrasts for light tails, heavy tails and skew: the entropy of the result decides which one fits.
CONTRASTS: tuple[Contrast, ...] = ("cube", "logcosh", _skewness)
RESTARTS = 5
ITERATIONS = 200
PATIENCE = 1000  # iterations where no run has converged in ITERATIONS
SMALLEST = (
    1e-6  # singular values below are rounding: float32 can't undo a mixing so ill-conditioned
)


def disentangle(
    latents: Latents, *, components: int | None = None, seed: int = 0, fit: Latents | None = None
) -> Latents:
    r"""Find independent components of latents over tasks: undo a linear mixing up to order, sign and scale.

    .. math::
        \hat s = W (z - \bar z), \qquad W = \arg\min_{\operatorname{cov}(\hat s) = I} \sum_i H(\hat s_i)

    Conditional priors identify latents up to :math:`z = A s + c`. If the true :math:`s` are independent across tasks
    and at most one is Gaussian, :math:`A` is resolved too. Two Gaussian components stay rotated, and the output does
    not show it: ask :func:`~pyro_hybrid.scores.separability.measure_separability` whether ICA is justified before
    interpreting single components.
    FastICA proposes unmixings from several starts, with contrasts for light tails, heavy tails and skew. The proposal
    with the lowest total entropy is kept; of the whitened mixtures it has the least mutual information.
    Component i is the one that resembles column i of the input most, with its sign; variances over ``fit`` are 1.
    A model with more latents than its system has leaves directions in which tasks hardly differ. Where they do differ,
    it is as a function of the other latents, so that no map unmixes them all: pass the number of ``components``.

    References:
        | Fast and Robust Fixed-Point Algorithms for Independent Component Analysis (Hyvärinen, 1999)
        | https://doi.org/10.1109/72.761722
        | ICA Using Spacings Estimates of Entropy (Learned-Miller & Fisher, 2003)
        | https://www.jmlr.org/papers/v4/learned-miller03a.html

    Arguments:
        latents: mixed latents :math:`z`, of shape :math:`(T, D)`, one row per task; pass several hundred tasks.
        components: number of components :math:`K` to look for, in the directions in which the tasks differ most, in
            the latents' own units; by default :math:`D`.
        seed: of the starting points; the global random state is neither read nor changed.
        fit: other latents, of shape :math:`(T', D)`, to estimate :math:`W` on, such as those of the training tasks.

    Returns:
        The components :math:`\hat s`, of shape :math:`(T, K)`, in the order of the columns that they resemble, as a
        tensor or an array as the input is, without gradient.

    Example:
        >>> import torch
        >>> from pyro_hybrid import mcc
        >>> sources = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
        >>> mixed = sources @ torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
        >>> f"{mcc(mixed, sources).strong:.2f} -> {mcc(disentangle(mixed), sources).strong:.2f}"
        '0.71 -> 1.00'
    """
    require_seed(seed)
    z = to_matrix("latents", latents)
    name = "latents" if fit is None else "fit"
    reference = to_varying_matrix(name, latents if fit is None else fit)
    _require_components(z, reference, components)
    require_enough_tasks(name, *reference.shape)
    scale = ColumnScale.of(reference)
    standard = scale.standardize(reference)
    directions = _widest_directions(reference, scale, components)
    rows, converged = unmixing_rows(standard @ directions, np.random.default_rng(seed), standard)
    if not converged:
        _warn_not_converged()
    return convert_like(latents, scale.standardize(z) @ directions @ rows.T)


def _require_components(z: Array, reference: Array, components: int | None) -> None:
    columns = reference.shape[1]
    require(
        z.shape[1] == columns,
        "fit with as many components as latents",
        f"{columns} and {z.shape[1]}",
        "Pass the same latents of other tasks.",
    )
    if components is not None:
        remedy = "Ask for at most as many as there are latents, or leave it out for all."
        require_integer("components", components, 1, remedy, most=columns)


def _widest_directions(reference: Array, scale: ColumnScale, components: int | None) -> Array:
    """Return weights of the standardized latents that give the directions in which tasks differ most.

    Directions are those of the latents in their own units, and the widest gets a standard deviation of 1.
    """
    columns = reference.shape[1]
    if components in (None, columns):
        return np.eye(columns)
    largest = scale.exponents.max()
    common = np.ldexp(reference, -largest)
    _, singular, directions = np.linalg.svd(common - common.mean(0), full_matrices=False)
    widest_sd = singular[0] / np.sqrt(len(reference))
    own_sd = np.ldexp(scale.sd, scale.exponents - largest)
    weights: Array = own_sd[:, None] * directions[:components].T / widest_sd
    return weights


def _warn_not_converged() -> None:
    warnings.warn(
        f"expected ICA to converge; got {RESTARTS * len(CONTRASTS)} runs of {PATIENCE} iterations that did not. "
        "The best run is returned, but is not reliable: pass more tasks, and ask measure_separability(latents) "
        "whether they are too Gaussian.",
        RuntimeWarning,
        stacklevel=3,
    )


def unmixing_rows(
    x: Array, rng: np.random.Generator, like: Array | None = None
) -> tuple[Array, bool]:
    """Return rows that unmix ``x``, in the order and with the signs of the columns of ``like``, and if ICA converged.

    Arguments:
        x: standardized mixtures.
        rng: draws the starting points.
        like: columns that the components are compared with; by default ``x``.
    """
    like = x if like is None else like
    columns = x.shape[1]
    rank = int(np.linalg.matrix_rank(x, tol=SMALLEST * np.sqrt(len(x))))
    require(
        rank == columns,
        f"{columns} linearly independent components",
        f"rank {rank}",
        "Drop the redundant columns before disentangling.",
    )
    starts = [rng.normal(size=(rank, rank)) for _ in range(RESTARTS)]
    rows, converged = least_entropy_rows(x, starts, ITERATIONS)
    if not converged:
        rows, converged = least_entropy_rows(x, starts, PATIENCE)
    return _ordered_and_signed(x, rows, like), converged


def _ordered_and_signed(x: Array, rows: Array, like: Array) -> Array:
    _, assignment = match_components(x @ rows.T, like)
    is_matched = assignment >= 0
    rows = rows[assignment[is_matched]]
    is_flipped = np.diag(correlation(x @ rows.T, like[:, is_matched])) < 0
    return np.where(is_flipped, -1.0, 1.0)[:, None] * rows


def least_entropy_rows(
    x: Array,
    starts: Sequence[Array],
    iterations: int,
    contrasts: Sequence[Contrast] = CONTRASTS,
) -> tuple[Array, bool]:
    """Run FastICA with every contrast from every start; return the rows with the least total entropy.

    The second value says if any run converged.
    """
    _, singular, directions = np.linalg.svd(x / np.sqrt(len(x)), full_matrices=False)
    whitener = directions / np.maximum(singular, SMALLEST)[:, None]
    white = x @ whitener.T
    runs = [
        _fast_ica(white, contrast, start @ directions.T * singular, iterations)
        for contrast in contrasts
        for start in starts
    ]
    rotations = [rotation for rotation, _ in runs]
    best = min(rotations, key=lambda rotation: _total_entropy(white @ rotation.T))
    return best @ whitener, any(converged for _, converged in runs)


def _fast_ica(
    white: Array, contrast: Contrast, start: Array, iterations: int
) -> tuple[NDArray[np.float64], bool]:
    """Return the rotation that one run of FastICA ends in, and if it converged."""
    decomposition = require_package("sklearn.decomposition", extra="ica")
    exceptions = require_package("sklearn.exceptions", extra="ica")
    ica = decomposition.FastICA(
        fun=contrast, whiten=False, max_iter=iterations, w_init=start, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        ica.fit(white)
    return ica.components_, ica.n_iter_ < iterations


def _total_entropy(sources: Array) -> float:
    """Sum the m-spacing estimates of the columns' entropies, up to a constant; ties count as tiny gaps."""
    spacing = round(len(sources) ** 0.5)
    ordered = np.sort(sources, axis=0)
    gaps = ordered[spacing:] - ordered[:-spacing]
    return float(np.log(np.maximum(gaps, 1e-6)).mean(0).sum())
