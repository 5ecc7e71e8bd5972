"""What the ranks of the truth among a posterior's draws say about that posterior."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported when they are used
from numpy.typing import NDArray

from pyro_hybrid.identifiability.check import Interval, Status

__all__ = ["ASIDE", "COVERED", "WIDTH", "Array", "Latent", "band", "ecdf", "judge", "share"]

Array = NDArray[np.floating]
COVERED = (0.5, 0.8, 0.95)  # probabilities of the central intervals that are counted
SURE, CELLS, TRIALS = (
    0.99,
    100,
    10_000,
)  # of the band: its probability, its grid, samples that it is made from
ASIDE, WIDTH = (
    0.25,
    1.25,
)  # standard deviations to the side, and ratio of widths: less than that will do
UNMOVED = 0.05  # so small a contraction is none


class Latent(NamedTuple):
    """What came out for one latent.

    Attributes:
        name: of the latent, ``omega`` or ``unknown[1]``.
        status: ``fails`` where its ranks leave the band; ``holds`` where they stay inside and leave room neither for a
            shift nor for a width that matters; ``undecided`` otherwise.
        says: the same in words.
        coverage: how often central 50%, 80% and 95% intervals held the truth.
        intervals: 95% of what that could as well have been.
        z_mean, z_sd: of (mean - truth) / standard deviation, over simulations: 0 and 1 are right.
        contraction: by how much of its variance the query narrows the prior; the median.
    """

    name: str
    status: Status
    says: str
    coverage: tuple[float, ...]
    intervals: tuple[Interval, ...]
    z_mean: float
    z_sd: float
    contraction: float


def judge(name: str, ranks: Array, z: Array, contraction: Array, latents: int = 1) -> Latent:
    """One latent's row.

    Arguments:
        ranks: one for each simulation, between 0 and 1.
        z, contraction: of each simulation.
        latents: how many are judged together; none of them should leave the band by chance.
    """
    _, low, high = band(len(ranks), latents)
    inside = bool(((low <= ecdf(ranks)) & (ecdf(ranks) <= high)).all())
    shift, width = _scores(ranks)
    known = max(map(abs, shift)) < ASIDE and 1.0 / WIDTH < width[0] and width[1] < WIDTH
    moved = float(np.median(contraction))
    status: Status = "fails" if not inside else "holds" if known else "undecided"
    says = {
        "fails": _wrong(shift, width),
        "undecided": "too few simulations to tell",
        "holds": "fine" if moved > UNMOVED else "fine, but says no more than the prior",
    }[status]
    held = [int((np.abs(ranks - 0.5) < 0.5 * p).sum()) for p in COVERED]
    return Latent(
        name,
        status,
        says,
        tuple(count / len(ranks) for count in held),
        tuple(share(count, len(ranks)) for count in held),
        float(z.mean()),
        float(z.std(ddof=1)),
        moved,
    )


@cache
def band(simulations: int, latents: int = 1) -> tuple[Array, Array, Array]:
    """A grid, and between what the ECDF of uniform ranks stays there: everywhere, of all latents, in 99 of 100 cases.

    How many ranks lie below a place is binomial. Both limits have the same tail probability at every place, and it is
    what so few of many simulated ECDFs ever fall short of.

    References:
        | Graphical Test for Discrete Uniformity and its Applications in Goodness-of-Fit Evaluation and Multiple Sample
          Comparison (Säilynoja, Bürkner & Vehtari, 2022)
        | https://arxiv.org/abs/2103.10522
    """
    grid, random = np.arange(1, CELLS) / CELLS, np.random.default_rng(0)
    counts = random.multinomial(simulations, np.full(CELLS, 1.0 / CELLS), TRIALS).cumsum(1)[:, :-1]
    law, every = scipy.stats.binom(simulations, grid), np.arange(simulations + 1)[:, None]
    tails = np.minimum(law.cdf(every), law.sf(every - 1))
    least = np.take_along_axis(tails, counts, 0).min(1)
    tail = np.quantile(least, (1.0 - SURE) / latents, method="lower")
    return grid, law.ppf(tail) / simulations, law.ppf(1.0 - tail) / simulations


def ecdf(ranks: Array) -> Array:
    """The share of ranks below each place of the band's grid."""
    return np.searchsorted(np.sort(ranks), np.arange(1, CELLS) / CELLS, side="right") / len(ranks)


def _scores(ranks: Array) -> tuple[Interval, Interval]:
    """How far to the side, in standard deviations, and how much too narrow: 99% intervals, by normal scores.

    Those of uniform ranks are standard normal, whatever the posterior's shape, and no outlier counts for more than its
    rank.
    """
    scores, n = scipy.stats.norm.ppf(ranks), len(ranks)
    spread, tails = float(scores.std(ddof=1)), np.array([0.995, 0.005])
    reach = float(scipy.stats.norm.ppf(SURE + 0.5 * (1.0 - SURE))) * spread / math.sqrt(n)
    low, high = spread * np.sqrt((n - 1) / scipy.stats.chi2.ppf(tails, n - 1))
    return (float(scores.mean()) - reach, float(scores.mean()) + reach), (float(low), float(high))


def _wrong(shift: Interval, width: Interval) -> str:
    """In what way; a truth that ranks high is one that the posterior lies below."""
    words = [
        word
        for word, so in (
            ("biased low", shift[0] > 0.0),
            ("biased high", shift[1] < 0.0),
            ("too narrow", width[0] > 1.0),
            ("too wide", width[1] < 1.0),
        )
        if so
    ]
    return ", ".join(words) or "wrong in shape"


def share(count: int, of: int) -> Interval:
    """Clopper and Pearson's 95% interval."""
    low = float(scipy.stats.beta.ppf(0.025, count, of - count + 1)) if count else 0.0
    return low, float(scipy.stats.beta.ppf(0.975, count + 1, of - count)) if count < of else 1.0
