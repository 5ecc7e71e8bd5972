"""Condition (iii): a latent's sufficient statistics are linearly independent wherever it may lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hybrid.identifiability.check import Check, Threshold, judged
from pyro_hybrid.identifiability.task_beliefs import Reading, names_of

__all__ = ["Statistics", "judge_statistics", "statistics"]

PIECES, DRAWS = 4, 2000
ROUNDING = 10.0 * torch.finfo(torch.float64).eps  # of a number that took a few steps to compute
INDEPENDENT = Threshold(holds=0.0, fails=1e-16)  # 1e-8 of a standard deviation


class Statistics(NamedTuple):
    """How far from linearly dependent the statistics of each latent are.

    Attributes:
        names: the latents.
        margin: smallest eigenvalue of the statistics' correlation matrix, by latent and quarter of its range.
        rounding: by how much its square root may be wrong, because numbers far from zero have few digits to vary in.
        factorised: by latent, whether its site's family is a product over components.
    """

    names: list[str]
    margin: Tensor
    rounding: Tensor
    factorised: list[bool]


@torch.no_grad()
def statistics(reading: Reading, *, seed: int = 0) -> Statistics:
    r"""Rank of the empirical Gram matrix of :math:`T(z_i)`, centred and scaled, on each quarter of where z lies.

    .. math:: \min_{q} \; \lambda_{\min} \operatorname{corr} \bigl( T_1(z_i), \dots, T_k(z_i) \mid z_i \in q \bigr)

    Quarters, because statistics such as z and \|z\| are independent on the line and dependent on its positive half.

    Arguments:
        reading: natural parameters of many tasks; z is drawn from what they believe.
        seed: of these draws; the global random state is left alone.
    """
    names, found, factorised = [], [], []
    mean, scale = (x.flatten(0, 1) for x in reading.coordinates())
    generator, at = torch.Generator().manual_seed(seed), 0
    rows = torch.randint(len(mean), (DRAWS,), generator=generator)
    for site, family in reading.families.items():
        part = slice(at, at + family.n)
        noise = torch.randn(DRAWS, family.n, generator=generator, dtype=torch.float64)
        z = family.constrained(mean[rows, part] + scale[rows, part] * noise)
        for i, name in enumerate(names_of({site: family.n})):
            order = z[:, i].argsort().chunk(PIECES)
            found.append(
                [_margin(z[piece, i], family.statistics(z[piece])[:, i]) for piece in order]
            )
            names.append(name)
            factorised.append(family.factorised)
        at += family.n
    margin, rounding = torch.tensor(found, dtype=torch.float64).unbind(-1)
    return Statistics(names, margin, rounding, factorised)


def _margin(z: Tensor, values: Tensor) -> tuple[float, float]:
    """Smallest eigenvalue of the correlation matrix of columns, zero where one is constant; and its root's rounding."""
    wide, deviation = values.abs().amax(0), values.std(0)
    varies = deviation > ROUNDING * wide
    columns = ((values - values.mean(0)) / deviation).where(varies, 0.0) / (len(values) - 1) ** 0.5
    rounding = z.abs().amax() / z.std() + (wide / deviation).where(varies, 0.0)
    return float(torch.linalg.svdvals(columns)[-1].square()), ROUNDING * float(rounding.norm())


def judge_statistics(found: Statistics) -> Check:
    """The worst latent, on its worst quarter: whether rounding can explain that its statistics aren't dependent."""
    name = "statistics (iii)"
    joint = [
        latent for latent, single in zip(found.names, found.factorised, strict=True) if not single
    ]
    if joint:
        return Check(
            name,
            "fails",
            why=f"the prior of {', '.join(joint)} isn't a product over components",
            remedy="Use a factorised family, such as ph.families.Normal, in the prior.",
        )
    root = found.margin.sqrt()
    low, high = (root - found.rounding).clamp(min=0.0).square(), (root + found.rounding).square()
    intervals = list(zip(low.flatten().tolist(), high.flatten().tolist(), strict=True))
    worst = intervals.index(min(intervals))
    latent = found.names[worst // found.margin.shape[1]]
    why, remedy = {
        "holds": (f"the least independent are those of {latent}", ""),
        "fails": (
            f"one statistic of {latent} follows from the others",
            "Give the family statistics none of which follows from the others, on any part of its range.",
        ),
        "undecided": (
            f"rounding hides whether those of {latent} are independent: they vary too little, far from zero",
            "Give the latent an origin and a unit near its values.",
        ),
    }[INDEPENDENT.judge(intervals[worst])]
    return judged(
        name, float(found.margin.flatten()[worst]), intervals[worst], INDEPENDENT, why, remedy
    )
