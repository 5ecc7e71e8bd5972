"""ICA over tasks: the components that it finds, and whether it is licensed to call them the true ones."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hybrid.errors import require
from pyro_hybrid.identifiability.check import Check, Interval, Status, Threshold, judged
from pyro_hybrid.scores.mcc import (
    Array,
    Latents,
    _correlation,
    _interval,
    _like,
    _match,
    _matrix,
    _pooled,
    _require_tasks,
    _standardise,
)

__all__ = ["Separability", "disentangle", "judge_separability", "separable"]


def _skewness(u: Array) -> tuple[Array, Array]:
    return u**2, 2 * u.mean(-1)


RESTARTS = 5
CONTRASTS = (
    "cube",
    "logcosh",
    _skewness,
)  # light tails, heavy tails, skew; which one fits is measured, not assumed
ITERATIONS, PATIENCE = 200, 1000  # the latter where nothing has converged in the former
SMALLEST = 1e-6  # singular values below are rounding: so ill-conditioned a mixing can't be undone in float32

RESAMPLES, RESAMPLED_ITERATIONS = 50, 40
NOISES, NOISE_ITERATIONS = 20, 20  # in noise there is nothing to converge to
BOOTSTRAP = 200
DEGREE = 3
UNIFORM = 0.0645  # what _negentropy gives for a uniform: clearly not Gaussian, and not by much
STABLE = Threshold(
    holds=0.95, fails=0.9
)  # where a tenth, and a fifth, of a component's variance belongs to others
INDEPENDENT = Threshold(holds=0.1, fails=0.1, larger=False)
VISIBLE = 0.3  # as large a dependence must have had a chance to show


class Separability(NamedTuple):
    r"""What :func:`separable` measured on the disentangled components, numbered as :func:`disentangle` returns them.

    Attributes:
        non_gaussianity: Each component's entropy below that of a Gaussian (negentropy, in nats), of shape :math:`(D,)`.
        non_gaussianity_interval: 95% intervals over resampled tasks, of shape :math:`(D, 2)`.
        noise_level: What ICA makes of 95% of Gaussian noise of the same shape.
        dependence: Largest \|correlation\| between polynomials, up to cubes, of the ranks of two components.
        dependent: These two components; (0, 0) where there is one component only.
        dependence_level: What independent components exceed once in a hundred times, all pairs considered.
        agreement: Each component's typical \|correlation\| with what other tasks would have given, of shape
            :math:`(D,)`: the median over ICAs of resampled tasks.
        stability: The same of the worst component of each resample.
        stability_interval: 95% of the resamples' worst components.
    """

    non_gaussianity: Array
    non_gaussianity_interval: Array
    noise_level: float
    dependence: float
    dependent: tuple[int, int]
    dependence_level: float
    agreement: Array
    stability: float
    stability_interval: Interval


def disentangle(
    latents: Latents, *, components: int | None = None, seed: int = 0, fit: Latents | None = None
) -> Latents:
    r"""Independent components of latents over tasks (ICA): undoes a linear mixing up to order, sign and scale.

    .. math::
        \hat s = W (z - \bar z), \qquad W = \arg\min_{\operatorname{cov}(\hat s) = I} \sum_i H(\hat s_i)

    Conditional priors identify latents up to :math:`z = A s + c`. If the true :math:`s` are independent across tasks
    and at most one is Gaussian, :math:`A` is resolved too; two Gaussians stay rotated, and the output doesn't show it:
    ask :func:`separable` whether ICA is licensed before reading a meaning into single components.
    FastICA proposes, from several starts with contrasts for light tails, heavy tails and skew; kept is the
    proposal with the lowest total entropy, which of the whitened mixtures has the least mutual information.
    Component i is the one that resembles column i of the input most, with its sign; variances over ``fit`` are 1.
    A model with more latents than its system has leaves directions in which tasks hardly differ, and where they do, as
    a function of the others, so that nothing unmixes them all: say how many ``components`` there are.

    References:
        | Fast and Robust Fixed-Point Algorithms for Independent Component Analysis (Hyvärinen, 1999)
        | https://doi.org/10.1109/72.761722
        | ICA Using Spacings Estimates of Entropy (Learned-Miller & Fisher, 2003)
        | https://www.jmlr.org/papers/v4/learned-miller03a.html

    Arguments:
        latents: Mixed latents :math:`z`, of shape :math:`(T, D)`, one row a task; several hundred tasks are wanted.
        components: How many to look for, :math:`K`, in the directions in which the tasks differ most, in the latents'
            own units; by default :math:`D`.
        seed: Starting points; the global random state is neither read nor changed.
        fit: Other latents, of shape :math:`(T', D)`, to estimate :math:`W` on, say of the training tasks.

    Returns:
        The components :math:`\hat s`, of shape :math:`(T, K)`, in the order of the columns that they resemble; tensor
        in, tensor out, without gradient.

    Example:
        >>> import torch
        >>> from pyro_hybrid import mcc
        >>> sources = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
        >>> mixed = sources @ torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
        >>> f"{mcc(mixed, sources).strong:.2f} -> {mcc(disentangle(mixed), sources).strong:.2f}"
        '0.71 -> 1.00'
    """
    z = _matrix("latents", latents)
    name, reference = (
        ("latents", _pooled("latents", latents)) if fit is None else ("fit", _pooled("fit", fit))
    )
    require(
        z.shape[1] == reference.shape[1],
        "fit with as many components as latents",
        f"{reference.shape[1]} and {z.shape[1]}",
        "Pass the same latents of other tasks.",
    )
    _require_tasks(name, *reference.shape)
    columns = reference.shape[1]
    require(
        components is None or 1 <= components <= columns,
        f"1 to {columns} components",
        components,
        "Ask for at most as many as there are latents, or leave it out for all.",
    )
    mean, scale = reference.mean(0), reference.std(0)
    standard = (reference - mean) / scale
    widest = np.eye(columns)
    if components not in (None, columns):
        widest = (
            scale[:, None] * np.linalg.svd(reference - mean, full_matrices=False)[2][:components].T
        )
    rows, converged = _unmixing(standard @ widest, np.random.default_rng(seed), standard)
    if not converged:
        warnings.warn(
            f"expected ICA to converge; got {RESTARTS * len(CONTRASTS)} runs of {PATIENCE} iterations that "
            "didn't. The best is returned, don't rely on it: pass more tasks, and ask separable(latents) "
            "whether they are too Gaussian.",
            RuntimeWarning,
            stacklevel=2,
        )
    return _like(latents, (z - mean) / scale @ widest @ rows.T)


def separable(latents: Tensor | NDArray[Any], *, seed: int = 0) -> Separability:
    r"""Are latents independent and non-Gaussian enough over tasks for ICA to resolve what is left, a linear map?

    .. math::
        z = A s + c \quad\text{gives } s \text{ up to order, sign and scale iff the } s_i
        \text{ are independent and at most one is Gaussian.}

    Three measurements on the components that :func:`disentangle` finds. Their *non-Gaussianity* is an approximation of
    negentropy, to be compared with that of components found in Gaussian noise: ICA looks for the least Gaussian
    direction, and finds some. *Dependence* that no rotation removes shows in correlations of polynomials of ranks.
    *Stability* repeats the ICA on resampled tasks: if several rotations fit as well, resamples disagree.

    References:
        | Independent Component Analysis, a New Concept? (Comon, 1994)
        | https://doi.org/10.1016/0165-1684(94)90029-9
        | New Approximations of Differential Entropy for Independent Component Analysis and Projection Pursuit
        | (Hyvärinen, 1998) https://papers.nips.cc/paper/1408
        | Validating the Independent Components of Neuroimaging Time Series via Clustering and Visualization
        | (Himberg, Hyvärinen & Esposito, 2004) https://doi.org/10.1016/j.neuroimage.2004.03.027

    Arguments:
        latents: Recovered latents :math:`z`, of shape :math:`(T, D)`, one row a task.
        seed: Starting points, resamples and noise; the global random state is neither read nor changed.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> mixing = torch.tensor([[1.0, 1.0], [-1.0, 2.0]])
        >>> judge_separability(separable(torch.rand(500, 2, generator=generator) @ mixing)).status
        'holds'
        >>> judge_separability(separable(torch.randn(500, 2, generator=generator) @ mixing)).status
        'fails'
    """
    z = _pooled("latents", latents)
    _require_tasks("latents", *z.shape)
    rng = np.random.default_rng(seed)
    x = _standardise(z)
    rows, _ = _unmixing(x, rng)
    sources = x @ rows.T
    resampled = [_negentropy(sources[_resample(rng, len(x))]) for _ in range(BOOTSTRAP)]
    dependence, dependent = _dependence(sources)
    agreement = _agreement(x, rows, rng)
    worst = agreement.min(1)
    low, high = _interval(worst)
    return Separability(
        _negentropy(sources),
        _interval(np.stack(resampled)).T,
        _noise_level(x.shape, rng),
        dependence,
        dependent,
        _dependence_level(*x.shape),
        np.median(agreement, 0),
        float(np.median(worst)),
        (float(low), float(high)),
    )


def judge_separability(numbers: Separability) -> Check:
    """Whether ICA is licensed: stable components of which at most one may be Gaussian, and no dependence in sight.

    It fails where two components depend clearly, or where two or more are closer to a Gaussian than a uniform is and
    resamples disagree on them. Few tasks decide nothing.

    Arguments:
        numbers: what :func:`separable` returned.
    """
    checks = _judge_dependence(numbers), _judge_gaussians(numbers)
    status = min((check.status for check in checks), key=("fails", "undecided", "holds").index)
    found = [check for check in checks if check.status == status]
    return found[-1]._replace(why="; ".join(check.why for check in found))


def _judge_dependence(numbers: Separability) -> Check:
    """The largest correlation, with a band that holds for all pairs at once."""
    value, level, (one, other) = numbers.dependence, numbers.dependence_level, numbers.dependent
    said = f"components {one} and {other} depend on each other over tasks: polynomials of their ranks correlate by "
    check = judged(
        "separability",
        value,
        (max(value - level, 0.0), min(value + level, 1.0)),
        INDEPENDENT,
        f"{said}{value:.2f}, those of independent ones by less than {level:.2f}",
        "Report the latents up to a linear map; or name the physics behind the dependence, as a known term.",
    )
    if check.status == "fails" or (check.status == "undecided" and value > level):
        return check
    if level > VISIBLE:
        return check._replace(
            why=f"a dependence of components below {level:.2f} can't be seen with so few tasks",
            remedy="Pool more tasks.",
        )
    return check._replace(
        status="holds",
        remedy="",
        why=f"components hardly depend on each other ({value:.2f}, by chance up to {level:.2f})",
    )


def _judge_gaussians(numbers: Separability) -> Check:
    """Resamples that agree, with one Gaussian at most; or two Gaussians, on whose rotation they don't."""
    low, high = numbers.non_gaussianity_interval.T
    candidates = np.flatnonzero(low <= numbers.noise_level)
    gaussian = candidates[high[candidates] < UNIFORM]
    stable = numbers.stability_interval[0]
    status: Status
    if len(gaussian) > 1 and stable < STABLE.fails:
        status, why = (
            "fails",
            f"{_named(gaussian)} look Gaussian over tasks: any rotation of them fits as well",
        )
        remedy = (
            "Report them up to a rotation, or resolve it by what is known of them: a physics latent's place in "
            "the equations, a neural term linear in its latents."
        )
    elif len(candidates) > 1:
        status, why = (
            "undecided",
            f"{_named(candidates)} can't be told from Gaussians, of which ICA bears one",
        )
        remedy = "Pool more tasks; until then report the latents up to a linear map."
    elif stable <= STABLE.holds:
        status, why = (
            "undecided",
            (
                f"component {numbers.agreement.argmin()} is another one for other tasks: resamples "
                f"agree on the worst component by {stable:.2f} only"
            ),
        )
        remedy = "Pool more tasks; until then report the latents up to a linear map."
    else:
        status, why, remedy = (
            "holds",
            "at most one is Gaussian; resampled tasks agree on all of them",
            "",
        )
    return Check(
        "separability", status, numbers.stability, numbers.stability_interval, STABLE, why, remedy
    )


def _named(components: NDArray[np.int64]) -> str:
    *first, last = (str(c) for c in components)
    return f"components {', '.join(first)} and {last}"


def _unmixing(x: Array, rng: np.random.Generator, like: Array | None = None) -> tuple[Array, bool]:
    """Rows that unmix ``x``, with the order and signs of its columns, or of ``like``; did any run converge?"""
    like = x if like is None else like
    rank = int(np.linalg.matrix_rank(x, tol=SMALLEST * np.sqrt(len(x))))
    require(
        rank == x.shape[1],
        f"{x.shape[1]} linearly independent components",
        f"rank {rank}",
        "Drop the redundant columns before disentangling.",
    )
    starts = [rng.normal(size=(rank, rank)) for _ in range(RESTARTS)]
    rows, converged = _least_entropy(x, starts, ITERATIONS)
    if not converged:
        rows, converged = _least_entropy(x, starts, PATIENCE)
    _, order = _match(x @ rows.T, like)
    matched = order >= 0
    order = order[matched]
    flipped = np.diag(_correlation(x @ rows[order].T, like[:, matched])) < 0
    return np.where(flipped, -1.0, 1.0)[:, None] * rows[order], converged


def _least_entropy(
    x: Array, starts: list[Array], iterations: int, contrasts: tuple[Any, ...] = CONTRASTS
) -> tuple[Array, bool]:
    """Of FastICA with every contrast from every start, the rows with the least total entropy; did any run converge?"""
    _, singular, directions = np.linalg.svd(x / np.sqrt(len(x)), full_matrices=False)
    whitener = directions / np.maximum(singular, SMALLEST)[:, None]
    white = x @ whitener.T
    found = [
        _fast_ica(white, contrast, start @ directions.T * singular, iterations)
        for contrast in contrasts
        for start in starts
    ]
    best = min(
        (rotation for rotation, _ in found), key=lambda rotation: _total_entropy(white @ rotation.T)
    )
    return best @ whitener, any(done for _, done in found)


def _fast_ica(white: Array, contrast: Any, start: Array, iterations: int) -> tuple[Array, bool]:
    """The rotation that one run of FastICA ends in, and whether it converged."""
    ica = FastICA(fun=contrast, whiten=False, max_iter=iterations, w_init=start, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica.fit(white)
    return ica.components_, ica.n_iter_ < iterations


def _total_entropy(sources: Array) -> float:
    """Sum over columns of the m-spacing estimate of entropy, up to a constant; ties count as tiny gaps."""
    spacing = round(len(sources) ** 0.5)
    ordered = np.sort(sources, axis=0)
    gaps = ordered[spacing:] - ordered[:-spacing]
    return float(np.log(np.maximum(gaps, 1e-6)).mean(0).sum())


def _resample(rng: np.random.Generator, tasks: int) -> NDArray[np.int64]:
    return rng.integers(tasks, size=tasks)


def _negentropy(sources: Array) -> Array:
    """Hyvärinen's approximation of each column's negentropy, from one odd and one even bounded moment."""
    s = _standardise(sources)
    bump = np.exp(-(s**2) / 2)
    odd, even = (s * bump).mean(0), bump.mean(0) - 0.5**0.5
    return 36 / (8 * 3**0.5 - 9) * odd**2 + 24 / (16 * 3**0.5 - 27) * even**2


def _noise_level(shape: tuple[int, ...], rng: np.random.Generator) -> float:
    """The negentropy that 95% of the components stay below that ICA finds in Gaussian noise."""
    found = []
    for _ in range(NOISES):
        x = _standardise(rng.normal(size=shape))
        rows, _ = _least_entropy(x, [rng.normal(size=(shape[1], shape[1]))], NOISE_ITERATIONS)
        found.append(_negentropy(x @ rows.T))
    return float(np.quantile(found, 0.95))


def _dependence(sources: Array) -> tuple[float, tuple[int, int]]:
    """The largest absolute correlation between Legendre polynomials of two columns' ranks, and these columns."""
    tasks, components = sources.shape
    ranks = (2 * rankdata(sources, axis=0) - 1) / tasks - 1
    features = np.stack(
        [_standardise(np.polynomial.Legendre.basis(k)(ranks)) for k in range(1, DEGREE + 1)]
    )
    correlation = np.abs(np.einsum("kti,ltj->ijkl", features, features)).max((2, 3)) / tasks
    np.fill_diagonal(correlation, 0.0)
    one, other = sorted(int(i) for i in np.unravel_index(correlation.argmax(), correlation.shape))
    return float(correlation[one, other]), (one, other)


def _dependence_level(tasks: int, components: int) -> float:
    """Ranks make it the same for all distributions: normal correlations, Bonferroni's correction for their number."""
    number = components * (components - 1) // 2 * DEGREE**2
    return float(norm.isf(0.005 / number) / np.sqrt(tasks)) if number else 0.0


def _agreement(x: Array, rows: Array, rng: np.random.Generator) -> Array:
    """Each component's absolute correlation with its partner in ICAs of resampled tasks, (resample, component).

    Of the contrasts, the one that agrees best: choosing it anew for each resample adds noise of the choice only.
    """
    found = np.empty((len(CONTRASTS), RESAMPLES, len(rows)))
    for k in tqdm(range(RESAMPLES), desc="ICA of resampled tasks", delay=2.0, leave=False):
        again = x[_resample(rng, len(x))]
        again = again - again.mean(0)
        starts = [rows, rng.normal(size=rows.shape)]  # from where it was found, and from elsewhere
        for c, contrast in enumerate(CONTRASTS):
            other, _ = _least_entropy(again, starts, RESAMPLED_ITERATIONS, (contrast,))
            found[c, k] = _match(x @ other.T, x @ rows.T)[0]
    return found[np.quantile(found.min(2), 0.025, axis=1).argmax()]
