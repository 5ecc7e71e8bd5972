"""Find the trajectories of one system by clustering in λ, where the evidence about a group adds up."""

from __future__ import annotations

import math

import torch
from scipy.optimize import brentq
from scipy.spatial import cKDTree
from torch import Tensor

from pyro_hybrid.beliefs.quadratic import Quadratic
from pyro_hybrid.errors import require

__all__ = ["concentration", "group", "log_evidence", "measurement", "misfit", "sum_by_group"]

NEIGHBOURS = 16  # number of nearest clusters that each cluster is compared with
ROUNDS = 40
SWEEPS = 3


def measurement(location: Tensor, covariance: Tensor) -> Quadratic:
    """Return the evidence of measurements (n, d) with these covariances (n, d, d)."""
    return Quadratic.centered(location, torch.linalg.inv(covariance))


def sum_by_group(evidence: Quadratic, labels: Tensor) -> Quadratic:
    """Add up the evidence of each group's members."""
    num_groups = int(labels.max()) + 1

    def total(part: Tensor) -> Tensor:
        return part.new_zeros(num_groups, *part.shape[1:]).index_add_(0, labels, part)

    return Quadratic(total(evidence.information), total(evidence.precision))


def log_evidence(evidence: Quadratic) -> Tensor:
    r"""Compute how probable the population :math:`z \sim \mathrm{Normal}(0, I)` makes evidence, up to an additive term.

    .. math:: \log \int \mathrm{Normal}(z; 0, I)\, e^{h \cdot z - \frac12 z^\top \Lambda z} \, dz
              = \tfrac12 h^\top (I + \Lambda)^{-1} h - \tfrac12 \log |I + \Lambda|
    """
    information = evidence.information
    identity = torch.eye(evidence.size, dtype=information.dtype)
    population = Quadratic(information.new_zeros(evidence.size), identity)
    return (evidence + population).log_normalizer - population.log_normalizer


def group(location: Tensor, covariance: Tensor, extra: Tensor, alpha: float) -> Tensor:
    r"""Find the most probable grouping of trajectories by system, with an unknown number of systems; return labels (n,).

    The model is a mixture over systems with a Chinese restaurant prior. Two groups are joined if that makes the data
    more probable,

    .. math:: \log \frac{Z(a + b)}{Z(a)\, Z(b)} + \log \frac{\Gamma(n_a + n_b)}{\alpha\, \Gamma(n_a)\, \Gamma(n_b)} > 0

    and each is the other's best partner. At the end every trajectory may move to a neighbouring group or to a new one.

    Arguments:
        location, covariance: the latents inferred from each trajectory alone, (n, d) and (n, d, d), in units of the
            population.
        extra: covariance (d, d) of the error that ``covariance`` leaves out; see :func:`misfit`.
        alpha: the prior's concentration; see :func:`concentration`.
    """
    evidence = measurement(location, covariance + extra)
    scale = torch.linalg.cholesky(evidence.precision.mean(0))
    labels = torch.arange(len(location))
    for _ in range(ROUNDS):
        groups = sum_by_group(evidence, labels)
        joined = _join_groups(groups, torch.bincount(labels), scale, alpha)
        if int(joined.max()) == int(labels.max()):
            break
        labels = joined[labels]
    for _ in range(SWEEPS):
        labels = _move_members(evidence, labels, scale, alpha)
    return labels


def _join_groups(groups: Quadratic, sizes: Tensor, scale: Tensor, alpha: float) -> Tensor:
    """Join groups that are each other's best partner; return new labels of the groups."""
    num_groups = len(sizes)
    places = groups.mean @ scale
    neighbours = _nearest(places, places, 1 + NEIGHBOURS)
    one = torch.arange(num_groups).repeat_interleave(neighbours.shape[1])
    other = neighbours.flatten()
    is_pair = one != other
    one = one[is_pair]
    other = other[is_pair]
    odds = _log_odds_of_joining(groups, sizes, one, other, alpha)
    best = odds.new_zeros(num_groups).scatter_reduce(0, one, odds, "amax")
    is_best = (odds > 0.0) & (odds >= best[one] - 1e-9)
    none = torch.full((num_groups,), -1)
    partner = none.scatter(0, one[is_best], other[is_best])
    itself = torch.arange(num_groups)
    is_mutual = (partner >= 0) & (partner[partner] == itself)
    joined = torch.minimum(itself, partner).where(is_mutual, itself)
    return joined.unique(return_inverse=True)[1]


def _log_odds_of_joining(
    groups: Quadratic, sizes: Tensor, one: Tensor, other: Tensor, alpha: float
) -> Tensor:
    """Compare pairs of groups, given by index, as one group and as two."""
    apart = log_evidence(groups)
    together = log_evidence(groups[one] + groups[other])
    log_gamma = torch.lgamma(sizes.to(apart.dtype))
    both = torch.lgamma((sizes[one] + sizes[other]).to(apart.dtype))
    prior = both - log_gamma[one] - log_gamma[other] - math.log(alpha)
    return prior + together - apart[one] - apart[other]


def _move_members(evidence: Quadratic, labels: Tensor, scale: Tensor, alpha: float) -> Tensor:
    """Move every trajectory to the group that it most probably belongs to, with the others where they are."""
    groups = sum_by_group(evidence, labels)
    sizes = torch.bincount(labels)
    nearest = _nearest(evidence.mean @ scale, groups.mean @ scale, NEIGHBOURS)
    candidates = torch.cat([labels.unsqueeze(1), nearest], 1)
    is_own = (candidates == labels.unsqueeze(1)).flatten()
    member = torch.arange(len(labels)).repeat_interleave(candidates.shape[1])
    candidate = candidates.flatten()
    own = evidence[member]
    without = groups[candidate] - _select(own, is_own)
    num_others = sizes[candidate] - is_own.long()
    odds = log_evidence(without + own) - log_evidence(without) - log_evidence(evidence)[member]
    odds = odds + num_others.to(odds.dtype).log() - math.log(alpha)  # against a group of its own
    odds = odds.where(num_others > 0, 0.0).view_as(candidates)
    best = odds.argmax(1, keepdim=True)
    best_odds = odds.gather(1, best).squeeze(1)
    best_group = candidates.gather(1, best).squeeze(1)
    new_group = len(sizes) + torch.arange(len(labels))
    moved = best_group.where(best_odds > 0.0, new_group)
    return torch.unique(moved, return_inverse=True)[1]


def _select(evidence: Quadratic, rows: Tensor) -> Quadratic:
    """Keep the evidence in some rows, and replace the others by none."""
    weights = rows.to(evidence.information.dtype)
    return Quadratic(
        weights[:, None] * evidence.information, weights[:, None, None] * evidence.precision
    )


def _nearest(points: Tensor, places: Tensor, number: int) -> Tensor:
    index = cKDTree(places.numpy()).query(points.numpy(), k=min(number, len(places)))[1]
    return torch.from_numpy(index.reshape(len(points), -1)).long()


def misfit(
    location: Tensor, covariance: Tensor, labels: Tensor, start: Tensor, num_iterations: int = 30
) -> Tensor:
    r"""Estimate the covariance (d, d) of the error of a trajectory's latents beyond their own covariance, by EM.

    Latents of one system inferred from two trajectories differ by :math:`\mathrm{Normal}(0, C_i + C_j + 2 M)`; this is
    EM for M.

    Arguments:
        location, covariance: the latents inferred from each trajectory alone, (n, d) and (n, d, d).
        labels: the group of each trajectory, (n,).
        start: the first guess of M.
        num_iterations: number of EM steps.
    """
    order = labels.argsort(stable=True)
    is_pair = labels[order][1:] == labels[order][:-1]
    one = order[:-1][is_pair]
    other = order[1:][is_pair]
    require(len(one) > 0, "two trajectories in one group", "none", "Group more generously.")
    differences = location[one] - location[other]
    known = covariance[one] + covariance[other]
    extra = 2.0 * start
    for _ in range(num_iterations):
        gain = extra @ torch.linalg.inv(known + extra)
        guess = (gain @ differences.unsqueeze(-1)).squeeze(-1)
        extra = guess.T @ guess / len(guess) + extra - gain.mean(0) @ extra
        extra = 0.5 * (extra + extra.T)
    return 0.5 * extra


def concentration(labels: Tensor) -> float:
    r"""Find the concentration α that expects this number of groups: :math:`\alpha \log(1 + n / \alpha) = K`."""
    num_members = len(labels)
    num_groups = min(int(labels.unique().numel()), 0.95 * num_members)

    def excess(alpha: float) -> float:
        return alpha * math.log1p(num_members / alpha) - num_groups

    return float(brentq(excess, 1e-3, 100.0 * num_members))
