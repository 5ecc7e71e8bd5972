"""Judge a posterior by the ranks of the truth among its draws."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported when they are used
from numpy.typing import NDArray

from pyro_hybrid.scores.check import Interval, Status, proportion_interval

__all__ = ["COVERED", "Array", "LatentCalibration", "ecdf", "judge_ranks", "uniform_band"]

Array = NDArray[np.floating]
COVERED = (0.5, 0.8, 0.95)  # probabilities of the central intervals that are counted
SURE = 0.99  # probability of the band
CELLS = 100  # of the band's grid
TRIALS = 10_000  # simulated ECDFs that the band is made from
ASIDE = 0.25  # shift in standard deviations that is tolerated
WIDTH = 1.25  # ratio of widths that is tolerated
UNMOVED = 0.05  # contraction that counts as none


class LatentCalibration(NamedTuple):
    """Calibration of one latent.

    Attributes:
        name: of the latent, ``omega`` or ``unknown[1]``.
        status: ``fails`` where its ranks leave the band; ``holds`` where they stay inside and exclude any shift or
            width that matters; ``undecided`` otherwise.
        finding: the same in words.
        coverage: share of simulations in which central 50%, 80% and 95% intervals held the truth.
        intervals: 95% intervals of these shares.
        z_mean, z_sd: of (mean - truth) / standard deviation, over simulations: 0 and 1 are right.
        contraction: median over simulations of the share of the prior's variance that the query removes.
    """

    name: str
    status: Status
    finding: str
    coverage: tuple[float, ...]
    intervals: tuple[Interval, ...]
    z_mean: float
    z_sd: float
    contraction: float


def judge_ranks(
    name: str, ranks: Array, z: Array, contraction: Array, num_latents: int = 1
) -> LatentCalibration:
    """Judge one latent.

    Arguments:
        name: of the latent.
        ranks: one for each simulation, between 0 and 1.
        z, contraction: of each simulation.
        num_latents: number of latents that are judged together; none of them should leave the band by chance.
    """
    total = len(ranks)
    _, low, high = uniform_band(total, num_latents)
    is_inside = bool(((low <= ecdf(ranks)) & (ecdf(ranks) <= high)).all())
    shift, width = _normal_scores(ranks)
    is_exact = max(map(abs, shift)) < ASIDE and 1.0 / WIDTH < width[0] and width[1] < WIDTH
    typical_contraction = float(np.median(contraction))
    if not is_inside:
        status: Status = "fails"
        finding = _describe_error(shift, width)
    elif not is_exact:
        status = "undecided"
        finding = "too few simulations to tell"
    else:
        status = "holds"
        has_learned = typical_contraction > UNMOVED
        finding = "fine" if has_learned else "fine, but says no more than the prior"
    counts = [int((np.abs(ranks - 0.5) < 0.5 * probability).sum()) for probability in COVERED]
    return LatentCalibration(
        name=name,
        status=status,
        finding=finding,
        coverage=tuple(count / total for count in counts),
        intervals=tuple(proportion_interval(count, total) for count in counts),
        z_mean=float(z.mean()),
        z_sd=float(z.std(ddof=1)),
        contraction=typical_contraction,
    )


@cache
def uniform_band(num_simulations: int, num_latents: int = 1) -> tuple[Array, Array, Array]:
    """Return a grid and two limits that the ECDFs of uniform ranks stay between, everywhere, in 99 of 100 cases.

    The number of ranks below a place is binomial. Both limits have the same tail probability at every place, which is
    chosen so that all latents' simulated ECDFs together stay inside.

    References:
        | Graphical Test for Discrete Uniformity and its Applications in Goodness-of-Fit Evaluation and Multiple Sample
          Comparison (Säilynoja, Bürkner & Vehtari, 2022)
        | https://arxiv.org/abs/2103.10522
    """
    grid = np.arange(1, CELLS) / CELLS
    cells = np.full(CELLS, 1.0 / CELLS)
    random = np.random.default_rng(0)
    counts = random.multinomial(num_simulations, cells, TRIALS).cumsum(1)[:, :-1]
    law = scipy.stats.binom(num_simulations, grid)
    possible = np.arange(num_simulations + 1)[:, None]
    tails = np.minimum(law.cdf(possible), law.sf(possible - 1))
    smallest_tails = np.take_along_axis(tails, counts, 0).min(1)
    tail = np.quantile(smallest_tails, (1.0 - SURE) / num_latents, method="lower")
    return grid, law.ppf(tail) / num_simulations, law.ppf(1.0 - tail) / num_simulations


def ecdf(ranks: Array) -> Array:
    """Return the share of ranks below each place of the band's grid."""
    grid = np.arange(1, CELLS) / CELLS
    return np.searchsorted(np.sort(ranks), grid, side="right") / len(ranks)


def _normal_scores(ranks: Array) -> tuple[Interval, Interval]:
    """Return 99% intervals of shift, in standard deviations, and of width, by normal scores.

    Scores of uniform ranks are standard normal, whatever the posterior's shape, and no outlier counts for more than its
    rank. A width above 1 means that the posterior is too narrow.
    """
    scores = scipy.stats.norm.ppf(ranks)
    total = len(ranks)
    center = float(scores.mean())
    sd = float(scores.std(ddof=1))
    reach = float(scipy.stats.norm.ppf(0.5 + 0.5 * SURE)) * sd / math.sqrt(total)
    tails = np.array([0.995, 0.005])
    low, high = sd * np.sqrt((total - 1) / scipy.stats.chi2.ppf(tails, total - 1))
    return (center - reach, center + reach), (float(low), float(high))


def _describe_error(shift: Interval, width: Interval) -> str:
    """Name the error; a truth that ranks high is one that the posterior lies below."""
    errors = {
        "biased low": shift[0] > 0.0,
        "biased high": shift[1] < 0.0,
        "too narrow": width[0] > 1.0,
        "too wide": width[1] < 1.0,
    }
    return ", ".join(error for error, applies in errors.items() if applies) or "wrong in shape"
