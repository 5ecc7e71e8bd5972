"""Clustering of trajectories by system, in natural parameters: the evidence of a group is the sum of its members'."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from scipy.spatial import cKDTree
from torch import Tensor

from pyro_hybrid.errors import require

__all__ = ["Evidence", "concentration", "group", "log_evidence", "misfit"]

NEIGHBOURS = 16  # number of nearest clusters that are tried as partners
ROUNDS = 40
SWEEPS = 3


class Evidence(NamedTuple):
    r"""Increments of a Gaussian's natural parameters, by trajectory or by group: they add up.

    ``pull`` (n, d) is :math:`\Lambda m`, ``precision`` (n, d, d) is :math:`\Lambda`.
    """

    pull: Tensor
    precision: Tensor

    @classmethod
    def at(cls, location: Tensor, covariance: Tensor) -> Evidence:
        """Build the evidence of a measurement with this covariance."""
        precision = torch.linalg.inv(covariance)
        return cls((precision @ location.unsqueeze(-1)).squeeze(-1), precision)

    def of(self, rows: Tensor) -> Evidence:
        """Select rows."""
        return Evidence(self.pull[rows], self.precision[rows])

    def plus(self, other: Evidence) -> Evidence:
        """Add the evidence of another."""
        return Evidence(self.pull + other.pull, self.precision + other.precision)

    def by(self, labels: Tensor) -> Evidence:
        """Sum the evidence of each group's members."""
        zeros = (part.new_zeros(int(labels.max()) + 1, *part.shape[1:]) for part in self)
        return Evidence(
            *(zero.index_add_(0, labels, part) for zero, part in zip(zeros, self, strict=True))
        )

    @property
    def mean(self) -> Tensor:
        """Return the maximum of each."""
        return torch.linalg.solve(self.precision, self.pull.unsqueeze(-1)).squeeze(-1)


def log_evidence(evidence: Evidence) -> Tensor:
    r"""Compute how well each agrees with the population :math:`z \sim \mathrm{Normal}(0, I)`, up to a term that adds up.

    .. math:: \log \int \mathrm{Normal}(z; 0, I)\, e^{h \cdot z - \frac12 z^\top \Lambda z} \, dz
              = \tfrac12 h^\top (I + \Lambda)^{-1} h - \tfrac12 \log |I + \Lambda|
    """
    root = torch.linalg.cholesky(
        evidence.precision + torch.eye(evidence.pull.shape[-1], dtype=evidence.pull.dtype)
    )
    white = torch.linalg.solve_triangular(root, evidence.pull.unsqueeze(-1), upper=False).squeeze(
        -1
    )
    return 0.5 * white.square().sum(-1) - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def group(location: Tensor, covariance: Tensor, extra: Tensor, alpha: float) -> Tensor:
    r"""Label trajectories (n,) by system, without knowing the number of systems.

    The model is a mixture over systems with a Chinese restaurant prior: two groups become one if that makes the data
    more probable,

    .. math:: \log \frac{Z(a + b)}{Z(a)\, Z(b)} + \log \frac{\Gamma(n_a + n_b)}{\alpha\, \Gamma(n_a)\, \Gamma(n_b)} > 0

    and each is the other's best partner. At the end every trajectory may change to a neighbouring group, or leave.

    Arguments:
        location, covariance: latents given each trajectory alone, (n, d) and (n, d, d), in units of the population.
        extra: covariance (d, d) of their error beyond that; see :func:`misfit`.
        alpha: concentration of the prior; see :func:`concentration`.
    """
    evidence = Evidence.at(location, covariance + extra)
    scale = torch.linalg.cholesky(evidence.precision.mean(0))
    labels = torch.arange(len(location))
    for _ in range(ROUNDS):
        merged = _merged(evidence.by(labels), torch.bincount(labels), scale, alpha)
        if int(merged.max()) == int(labels.max()):
            break
        labels = merged[labels]
    for _ in range(SWEEPS):
        labels = _moved(evidence, labels, scale, alpha)
    return labels


def _merged(groups: Evidence, sizes: Tensor, scale: Tensor, alpha: float) -> Tensor:
    """Merge groups that are each other's best partner, and return the groups' new labels."""
    near = _nearest(groups.mean @ scale, groups.mean @ scale, 1 + NEIGHBOURS)
    one, other = torch.arange(len(groups.pull)).repeat_interleave(near.shape[1]), near.flatten()
    one, other = one[one != other], other[one != other]
    alone, gain = log_evidence(groups), torch.lgamma(sizes.to(groups.pull.dtype))
    odds = (
        torch.lgamma((sizes[one] + sizes[other]).to(gain.dtype))
        - gain[one]
        - gain[other]
        - math.log(alpha)
    )
    odds = odds + log_evidence(groups.of(one).plus(groups.of(other))) - alone[one] - alone[other]
    best = gain.new_full((len(groups.pull),), 0.0).scatter_reduce(0, one, odds, "amax")
    chosen = (odds > 0.0) & (odds >= best[one] - 1e-9)
    partner = torch.full((len(groups.pull),), -1).scatter(0, one[chosen], other[chosen])
    itself = torch.arange(len(partner))
    mutual = (partner >= 0) & (partner[partner] == itself)
    return torch.minimum(itself, partner).where(mutual, itself).unique(return_inverse=True)[1]


def _moved(evidence: Evidence, labels: Tensor, scale: Tensor, alpha: float) -> Tensor:
    """Move every trajectory to its most probable group, with the others fixed."""
    groups, sizes = evidence.by(labels), torch.bincount(labels)
    near = _nearest(evidence.mean @ scale, groups.mean @ scale, NEIGHBOURS)
    near = torch.cat([labels.unsqueeze(1), near], 1)
    mine = near == labels.unsqueeze(1)
    member, place = torch.arange(len(labels)).repeat_interleave(near.shape[1]), near.flatten()
    without, count = groups.of(place), sizes[place] - mine.flatten().long()
    own = evidence.of(member)
    gone = mine.flatten().to(own.pull.dtype)
    without = Evidence(
        without.pull - gone[:, None] * own.pull,
        without.precision - gone[:, None, None] * own.precision,
    )
    odds = log_evidence(without.plus(own)) - log_evidence(without) - log_evidence(evidence)[member]
    odds = odds + count.to(odds.dtype).log() - math.log(alpha)  # against a group of its own
    odds = odds.view_as(near).where((count > 0).view_as(near), 0.0)
    best = odds.argmax(1, keepdim=True)
    new = (
        near.gather(1, best)
        .squeeze(1)
        .where(odds.gather(1, best).squeeze(1) > 0.0, len(groups.pull) + torch.arange(len(labels)))
    )
    return torch.unique(new, return_inverse=True)[1]


def _nearest(points: Tensor, places: Tensor, number: int) -> Tensor:
    found = cKDTree(places.numpy()).query(points.numpy(), k=min(number, len(places)))[1]
    return torch.from_numpy(found.reshape(len(points), -1)).long()


def misfit(
    location: Tensor, covariance: Tensor, labels: Tensor, start: Tensor, iterations: int = 30
) -> Tensor:
    r"""Estimate the covariance (d, d) of the error of a trajectory's latents beyond their own covariance.

    Latents given two trajectories of one system differ by :math:`\mathrm{Normal}(0, C_i + C_j + 2 M)`; EM estimates M.
    """
    order = labels.argsort(stable=True)
    pair = labels[order][1:] == labels[order][:-1]
    one, other = order[:-1][pair], order[1:][pair]
    require(len(one) > 0, "two trajectories in one group", "none", "Group more generously.")
    apart, known, extra = (
        location[one] - location[other],
        covariance[one] + covariance[other],
        2.0 * start,
    )
    for _ in range(iterations):
        gain = extra @ torch.linalg.inv(known + extra)
        guess = (gain @ apart.unsqueeze(-1)).squeeze(-1)
        extra = guess.T @ guess / len(guess) + extra - gain.mean(0) @ extra
        extra = 0.5 * (extra + extra.T)
    return 0.5 * extra


def concentration(labels: Tensor) -> float:
    r"""Compute the concentration α of a Chinese restaurant that expects as many groups: :math:`\alpha \log(1 + n / \alpha) = K`."""
    n, k = len(labels), int(labels.unique().numel())
    return float(brentq(lambda a: a * math.log1p(n / a) - min(k, 0.95 * n), 1e-3, 100.0 * n))
