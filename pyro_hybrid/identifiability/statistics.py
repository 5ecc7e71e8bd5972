"""Condition (iii): a latent's sufficient statistics are linearly independent wherever it may lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hybrid.identifiability.check import Check, Threshold, judged
from pyro_hybrid.identifiability.reading import Reading, names_of

__all__ = ["Statistics", "judge_statistics", "statistics"]

PIECES, DRAWS = 4, 2000
INDEPENDENT = Threshold(holds=1e-8, fails=1e-12)  # rounding leaves 1e-16 of a repeated statistic's variance


class Statistics(NamedTuple):
    """How far from linearly dependent the statistics of each latent are.

    Attributes:
        names: the latents.
        margin: smallest eigenvalue of the statistics' correlation matrix, by latent and quarter of its range.
        factorised: by latent, whether its site's family is a product over components.
    """

    names: list[str]
    margin: Tensor
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
    names, margins, factorised = [], [], []
    mean, scale = (x.flatten(0, 1) for x in reading.coordinates())
    generator, at = torch.Generator().manual_seed(seed), 0
    rows = torch.randint(len(mean), (DRAWS,), generator=generator)
    for site, family in reading.families.items():
        part = slice(at, at + family.n)
        noise = torch.randn(DRAWS, family.n, generator=generator, dtype=torch.float64)
        z = family.constrained(mean[rows, part] + scale[rows, part] * noise)
        for i, name in enumerate(names_of({site: family.n})):
            order = z[:, i].argsort().chunk(PIECES)
            margins.append(torch.stack([_margin(family.statistics(z[piece])[:, i]) for piece in order]))
            names.append(name)
            factorised.append(family.factorised)
        at += family.n
    return Statistics(names, torch.stack(margins), factorised)


def _margin(values: Tensor) -> Tensor:
    """Smallest eigenvalue of the correlation matrix of columns; zero where one of them is constant."""
    values = values - values.mean(0)
    values = values / values.norm(dim=0).clamp(min=torch.finfo(values.dtype).tiny)
    return torch.linalg.svdvals(values)[-1].square()


def judge_statistics(found: Statistics) -> Check:
    """The worst latent, on its worst quarter."""
    name = "statistics (iii)"
    joint = [latent for latent, single in zip(found.names, found.factorised, strict=True) if not single]
    if joint:
        return Check(name, "fails", why=f"the prior of {', '.join(joint)} isn't a product over components",
                     remedy="Use a factorised family, such as ph.families.Normal, in the prior.")
    worst = found.margin.amin(1)
    value, i = float(worst.min()), int(worst.argmin())
    why = (f"the least independent are those of {found.names[i]}" if value > INDEPENDENT.fails else
           f"one statistic of {found.names[i]} follows from the others")
    return judged(name, value, (value, value), INDEPENDENT, why,
                  "Give the family statistics none of which follows from the others, on any part of its range.")
