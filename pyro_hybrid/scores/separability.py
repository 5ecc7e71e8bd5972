"""Check if independent component analysis is justified: independent, non-Gaussian, stable components."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy  # its parts are imported when they are used
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hybrid.errors import require_seed
from pyro_hybrid.scores.arrays import Array, require_enough_tasks, to_varying_matrix
from pyro_hybrid.scores.check import Check, Interval, Status, Threshold
from pyro_hybrid.scores.ica import CONTRASTS, least_entropy_rows, unmixing_rows
from pyro_hybrid.scores.regression import match_components, percentile_interval, standardize

__all__ = [
    "UNIFORM",
    "Separability",
    "dependence_level",
    "judge_separability",
    "largest_dependence",
    "measure_separability",
    "negentropy",
    "noise_level",
]

NAME = "separability"
RESAMPLES = 50
RESAMPLED_ITERATIONS = 40
NOISES = 20
NOISE_ITERATIONS = 20  # in noise there is nothing to converge to
BOOTSTRAP = 200
DEGREE = 3
UNIFORM = 0.0645  # negentropy() of a uniform variable: clearly not Gaussian, and not by much
STABLE = Threshold(holds=0.95, fails=0.9)  # a tenth, and a fifth, of the variance is others'
INDEPENDENT = Threshold(holds=0.1, fails=0.1, larger=False)
VISIBLE = 0.3  # dependence that must have had a chance to show before a yes
POOL = "Pool more tasks; until then report the latents up to a linear map."


class Separability(NamedTuple):
    r"""Measurements on the disentangled components, numbered as :func:`~pyro_hybrid.disentangle` returns them.

    Attributes:
        non_gaussianity: each component's entropy below that of a Gaussian (negentropy, in nats), of shape :math:`(D,)`.
        non_gaussianity_interval: 95% intervals over resampled tasks, of shape :math:`(D, 2)`.
        noise_level: negentropy that 95% of the components stay below that ICA finds in Gaussian noise.
        dependence: largest \|correlation\| between polynomials, up to cubes, of the ranks of two components.
        dependent: these two components; (0, 0) where there is one component only.
        dependence_level: dependence that independent components exceed once in a hundred times, all pairs considered.
        agreement: each component's typical \|correlation\| with that of other tasks, of shape :math:`(D,)`: the median
            over ICAs of resampled tasks.
        stability: median over resamples of the worst component's agreement.
        stability_interval: central 95% of the resamples' worst components.
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


def measure_separability(
    latents: Tensor | NDArray[Any], *, seed: int = 0, progress: bool = True
) -> Separability:
    r"""Measure if latents are independent and non-Gaussian enough over tasks for ICA to resolve a linear map.

    .. math::
        z = A s + c \quad\text{gives } s \text{ up to order, sign and scale iff the } s_i
        \text{ are independent and at most one is Gaussian.}

    Three measurements are made on the components that :func:`~pyro_hybrid.disentangle` finds. *Non-Gaussianity* is an
    approximation of negentropy, to be compared with that of components found in Gaussian noise: ICA looks for the least
    Gaussian direction, and finds one in noise too. *Dependence* that no rotation removes shows in correlations of
    polynomials of ranks. *Stability* repeats the ICA on resampled tasks: if several rotations fit equally well,
    resamples disagree.

    References:
        | Independent Component Analysis, a New Concept? (Comon, 1994)
        | https://doi.org/10.1016/0165-1684(94)90029-9
        | New Approximations of Differential Entropy for Independent Component Analysis and Projection Pursuit
        | (Hyvärinen, 1998) https://papers.nips.cc/paper/1408
        | Validating the Independent Components of Neuroimaging Time Series via Clustering and Visualization
        | (Himberg, Hyvärinen & Esposito, 2004) https://doi.org/10.1016/j.neuroimage.2004.03.027

    Arguments:
        latents: recovered latents :math:`z`, of shape :math:`(T, D)`, one row per task.
        seed: of starting points, resamples and noise; the global random state is neither read nor changed.
        progress: show a progress bar if it takes longer than two seconds.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> mixing = torch.tensor([[1.0, 1.0], [-1.0, 2.0]])
        >>> uniform = torch.rand(500, 2, generator=generator) @ mixing
        >>> judge_separability(measure_separability(uniform)).status
        'holds'
        >>> gaussian = torch.randn(500, 2, generator=generator) @ mixing
        >>> judge_separability(measure_separability(gaussian)).status
        'fails'
    """
    require_seed(seed)
    z = to_varying_matrix("latents", latents)
    require_enough_tasks("latents", *z.shape)
    rng = np.random.default_rng(seed)
    x = standardize(z)
    rows, _ = unmixing_rows(x, rng)
    sources = x @ rows.T
    resampled = [negentropy(sources[_resample(rng, len(x))]) for _ in range(BOOTSTRAP)]
    dependence, dependent = largest_dependence(sources)
    agreement = _agreement(x, rows, rng, progress)
    worst = agreement.min(1)
    low, high = percentile_interval(worst)
    return Separability(
        non_gaussianity=negentropy(sources),
        non_gaussianity_interval=percentile_interval(np.stack(resampled)).T,
        noise_level=noise_level(x.shape, rng),
        dependence=dependence,
        dependent=dependent,
        dependence_level=dependence_level(*x.shape),
        agreement=np.median(agreement, 0),
        stability=float(np.median(worst)),
        stability_interval=(float(low), float(high)),
    )


def judge_separability(numbers: Separability) -> Check:
    """Judge if ICA is justified: stable components, at most one of them Gaussian, no dependence in sight.

    The check fails where two components clearly depend on each other, or where two or more are closer to a Gaussian
    than a uniform variable is and resamples disagree on them. Few tasks decide nothing.

    Arguments:
        numbers: result of :func:`measure_separability`.
    """
    checks = [_judge_dependence(numbers), _judge_gaussians(numbers)]
    order: list[Status] = ["fails", "undecided", "holds"]
    status = min((check.status for check in checks), key=order.index)
    decisive = [check for check in checks if check.status == status]
    why = " ".join(check.why for check in decisive)
    return decisive[-1]._replace(why=why)


def _judge_dependence(numbers: Separability) -> Check:
    """Judge the largest correlation, with a band that holds for all pairs at once."""
    value = numbers.dependence
    level = numbers.dependence_level
    one, other = numbers.dependent
    check = Check.from_interval(
        NAME,
        value,
        (max(value - level, 0.0), min(value + level, 1.0)),
        INDEPENDENT,
        f"Components {one} and {other} depend on each other over tasks: polynomials of their ranks correlate by "
        f"{value:.2f}, those of independent components by less than {level:.2f}.",
        "Report the latents up to a linear map; or name the physics behind the dependence, as a known term.",
    )
    if check.status == "fails" or (check.status == "undecided" and value > level):
        return check
    if level > VISIBLE:
        return check._replace(
            why=f"A dependence of components below {level:.2f} cannot be seen with so few tasks.",
            remedy="Pool more tasks.",
        )
    return check._replace(
        status="holds",
        remedy="",
        why=f"Components hardly depend on each other: their largest correlation is {value:.2f}, and chance gives up "
        f"to {level:.2f}.",
    )


def _judge_gaussians(numbers: Separability) -> Check:
    """Require that resamples agree and at most one component is Gaussian; fail for a pair that rotates freely."""
    low, high = numbers.non_gaussianity_interval.T
    candidates = np.flatnonzero(low <= numbers.noise_level)
    gaussian = candidates[high[candidates] < UNIFORM]
    stable = numbers.stability_interval[0]
    status: Status = "undecided"
    remedy = POOL
    if len(gaussian) > 1 and stable < STABLE.fails:
        status = "fails"
        why = f"{_name_components(gaussian)} look Gaussian over tasks: any rotation of them fits as well."
        remedy = (
            "Report them up to a rotation, or resolve it by what is known of them: a physics latent's place in "
            "the equations, a neural term linear in its latents."
        )
    elif len(candidates) > 1:
        why = (
            f"{_name_components(candidates)} cannot be told from Gaussian components, of which ICA can separate "
            "one only."
        )
    elif stable <= STABLE.holds:
        why = (
            f"Component {numbers.agreement.argmin()} changes with the tasks that ICA is given: over resampled tasks "
            f"the worst component agrees by {stable:.2f} only."
        )
    else:
        status = "holds"
        why = "At most one component is Gaussian, and resampled tasks agree on all of them."
        remedy = ""
    return Check(NAME, status, numbers.stability, numbers.stability_interval, STABLE, why, remedy)


def _name_components(components: NDArray[np.int64]) -> str:
    *first, last = (str(component) for component in components)
    return f"Components {', '.join(first)} and {last}"


def _resample(rng: np.random.Generator, num_tasks: int) -> NDArray[np.int64]:
    return rng.integers(num_tasks, size=num_tasks)


def negentropy(sources: Array) -> Array:
    """Approximate each column's negentropy by one odd and one even bounded moment (Hyvärinen, 1998)."""
    s = standardize(sources)
    bump = np.exp(-(s**2) / 2)
    odd = (s * bump).mean(0)
    even = bump.mean(0) - 0.5**0.5
    skewed: Array = 36 / (8 * 3**0.5 - 9) * odd**2
    heavy: Array = 24 / (16 * 3**0.5 - 27) * even**2
    return skewed + heavy


def noise_level(shape: tuple[int, ...], rng: np.random.Generator) -> float:
    """Return the negentropy that 95% of the components stay below that ICA finds in Gaussian noise."""
    negentropies = []
    for _ in range(NOISES):
        x = standardize(rng.normal(size=shape))
        start = rng.normal(size=(shape[1], shape[1]))
        rows, _ = least_entropy_rows(x, [start], NOISE_ITERATIONS)
        negentropies.append(negentropy(x @ rows.T))
    return float(np.quantile(negentropies, 0.95))


def largest_dependence(sources: Array) -> tuple[float, tuple[int, int]]:
    """Return the largest correlation between Legendre polynomials of two columns' ranks, and these columns."""
    num_tasks = len(sources)
    ranks = (2 * scipy.stats.rankdata(sources, axis=0) - 1) / num_tasks - 1
    polynomials = [np.polynomial.Legendre.basis(degree) for degree in range(1, DEGREE + 1)]
    features = np.stack([standardize(polynomial(ranks)) for polynomial in polynomials])
    products = np.einsum("kti,ltj->ijkl", features, features)
    magnitudes = np.abs(products).max((2, 3)) / num_tasks
    np.fill_diagonal(magnitudes, 0.0)
    row, column = np.unravel_index(magnitudes.argmax(), magnitudes.shape)
    one, other = sorted((int(row), int(column)))
    return float(magnitudes[one, other]), (one, other)


def dependence_level(num_tasks: int, num_components: int) -> float:
    """Return the dependence that independent components exceed once in a hundred times.

    Ranks make it the same for all distributions: correlations are normal, with Bonferroni's correction for their
    number.
    """
    number = num_components * (num_components - 1) // 2 * DEGREE**2
    return float(scipy.stats.norm.isf(0.005 / number) / np.sqrt(num_tasks)) if number else 0.0


def _agreement(x: Array, rows: Array, rng: np.random.Generator, progress: bool) -> Array:
    """Correlate each component with its partner in ICAs of resampled tasks, (resample, component).

    The contrast that agrees best is the same for all resamples: choosing it anew for each would add the noise of the
    choice.
    """
    magnitudes: Array = np.empty((len(CONTRASTS), RESAMPLES, len(rows)))
    bar = tqdm(
        range(RESAMPLES),
        desc="ICA of resampled tasks",
        delay=2.0,
        leave=False,
        disable=not progress,
    )
    for k in bar:
        resampled = x[_resample(rng, len(x))]
        resampled = resampled - resampled.mean(0)
        starts = [rows, rng.normal(size=rows.shape)]
        for c, contrast in enumerate(CONTRASTS):
            other, _ = least_entropy_rows(resampled, starts, RESAMPLED_ITERATIONS, [contrast])
            magnitudes[c, k] = match_components(x @ other.T, x @ rows.T)[0]
    best = np.quantile(magnitudes.min(2), 0.025, axis=1).argmax()
    agreement: Array = magnitudes[best]
    return agreement
