"""Check condition (iii): a latent's sufficient statistics are linearly independent on its whole range."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hybrid.beliefs.families import Family
from pyro_hybrid.identifiability.task_beliefs import TaskBeliefs, latent_names
from pyro_hybrid.scores.check import Check, Interval, Threshold

__all__ = ["Statistics", "judge_statistics", "measure_statistics"]

NAME = "statistics (iii)"
PIECES = 4
DRAWS = 2000
ROUNDING = 10.0 * torch.finfo(torch.float64).eps  # of a number that took a few steps to compute
INDEPENDENT = Threshold(holds=0.0, fails=1e-16)  # 1e-8 of a standard deviation


class Statistics(NamedTuple):
    """Distance of each latent's statistics from linear dependence.

    Attributes:
        names: of the latents.
        margin: smallest eigenvalue of the statistics' correlation matrix, by latent and quarter of its range.
        rounding: error bound of the root of ``margin``, because numbers far from zero have few digits to vary in.
        factorized: True where the site's family is a product over components, by latent.
    """

    names: list[str]
    margin: Tensor
    rounding: Tensor
    factorized: list[bool]


@torch.no_grad()
def measure_statistics(beliefs: TaskBeliefs, *, seed: int = 0) -> Statistics:
    r"""Measure the rank of the Gram matrix of :math:`T(z_i)`, centered and scaled, on each quarter of z's range.

    .. math:: \min_{q} \; \lambda_{\min} \operatorname{corr} \bigl( T_1(z_i), \dots, T_k(z_i) \mid z_i \in q \bigr)

    Quarters are used because statistics such as z and \|z\| are independent on the line and dependent on its positive
    half.

    Arguments:
        beliefs: natural parameters of many tasks, from which z is drawn.
        seed: of these draws; the global random state is left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = beliefs.mean.flatten(0, 1)
    sd = beliefs.sd.flatten(0, 1)
    rows = torch.randint(len(mean), (DRAWS,), generator=generator)
    names: list[str] = []
    margins: list[Tensor] = []
    factorized: list[bool] = []
    start = 0
    for site, family in beliefs.families.items():
        columns = slice(start, start + family.n)
        noise = torch.randn(DRAWS, family.n, generator=generator, dtype=torch.float64)
        z = family.constrained(mean[rows, columns] + sd[rows, columns] * noise)
        margins += [_margins_by_quarter(family, z, i) for i in range(family.n)]
        names += latent_names({site: family.n})
        factorized += [family.factorized] * family.n
        start += family.n
    margin, rounding = torch.stack(margins).unbind(-1)
    return Statistics(names, margin, rounding, factorized)


def _margins_by_quarter(family: Family, z: Tensor, component: int) -> Tensor:
    """Return margin and rounding for each quarter of one component's range, (quarter, 2)."""
    quarters = z[:, component].argsort().chunk(PIECES)
    pairs = [
        _margin(z[rows, component], family.statistics(z[rows])[:, component]) for rows in quarters
    ]
    return torch.tensor(pairs, dtype=torch.float64)


def _margin(z: Tensor, values: Tensor) -> tuple[float, float]:
    """Return the smallest eigenvalue of the columns' correlation matrix, and the error bound of its root.

    The eigenvalue is zero where a column is constant.
    """
    largest = values.abs().amax(0)
    deviation = values.std(0)
    varies = deviation > ROUNDING * largest
    standard = ((values - values.mean(0)) / deviation).where(varies, 0.0)
    columns = standard / (len(values) - 1) ** 0.5
    smallest = torch.linalg.svdvals(columns)[-1].square()
    rounding = z.abs().amax() / z.std() + (largest / deviation).where(varies, 0.0)
    return float(smallest), ROUNDING * float(rounding.norm())


def judge_statistics(statistics: Statistics) -> Check:
    """Judge the worst latent, on its worst quarter: can rounding explain that its statistics look independent?

    Arguments:
        statistics: result of :func:`measure_statistics`.
    """
    pairs = zip(statistics.names, statistics.factorized, strict=True)
    joint = [f"`{name}`" for name, is_factorized in pairs if not is_factorized]
    if joint:
        return Check(
            NAME,
            "fails",
            why=f"The prior of {', '.join(joint)} is not a product over components.",
            remedy="Use a factorized family, such as ph.families.Normal, in the prior.",
        )
    root = statistics.margin.sqrt()
    low = (root - statistics.rounding).clamp(min=0.0).square()
    high = (root + statistics.rounding).square()
    intervals = list(zip(low.flatten().tolist(), high.flatten().tolist(), strict=True))
    worst = intervals.index(min(intervals))
    latent = statistics.names[worst // statistics.margin.shape[1]]
    value = float(statistics.margin.flatten()[worst])
    why, remedy = _explain(latent, intervals[worst])
    return Check.from_interval(NAME, value, intervals[worst], INDEPENDENT, why, remedy)


def _explain(latent: str, interval: Interval) -> tuple[str, str]:
    status = INDEPENDENT.judge(interval)
    if status == "holds":
        return f"The sufficient statistics of `{latent}` are the least independent ones.", ""
    if status == "fails":
        why = f"One sufficient statistic of `{latent}` follows from its others."
        return (
            why,
            "Give the family statistics none of which follows from the others, on any part of its range.",
        )
    why = f"Rounding hides whether the statistics of `{latent}` are independent: they vary too little, far from zero."
    return why, "Choose an origin and a unit near the values of the latent."
