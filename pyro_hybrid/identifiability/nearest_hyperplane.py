"""Find the hyperplane of natural parameters that costs a prior the least, and its price in nats."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported when they are used
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["generalized_eigen", "nearest_hyperplane"]

THROUGH = 60  # tasks through which hyperplanes are put to start from
ROUNDS = 6
STARTS = 12
ALIKE = 0.99  # cosine above which two directions are one


class _Cloud(NamedTuple):
    """Natural parameters (point, number), the inverse metric at each, and the weight of each."""

    natural: Tensor
    inverse: Tensor
    weight: Tensor


def nearest_hyperplane(
    natural: Tensor, inverse: Tensor, counts: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return the least loss over hyperplanes, with the losses of the directions orthogonal to its own, and its normal.

    .. math:: \min_{v, c} \; \tfrac12 \sum_t w_t \frac{(v^\top \lambda_t - c)^2}{v^\top G_t^{-1} v}

    Arguments:
        natural: λ, ``(support, task, number)``.
        inverse: :math:`G^{-1}` there.
        counts: number of times that each task counts.
        start: the direction to descend from, instead of a search for it.
    """
    weight = (counts / counts.sum() / len(natural)).expand(natural.shape[:2]).flatten()
    cloud = _Cloud(natural.flatten(0, 1), inverse.flatten(0, 1), weight)
    starts = _starts(cloud) if start is None else [start]
    ends = [
        scipy.optimize.minimize(
            _loss, begin.numpy(), args=(cloud,), jac=True, method="BFGS", options={"gtol": 1e-12}
        )
        for begin in starts
    ]
    best = min(ends, key=lambda end: end.fun)
    direction = natural.new_tensor(best.x)
    values = 0.5 * _reweighted_eigen(direction.unsqueeze(0), cloud)[0][0]
    values = values.clamp(min=best.fun)
    values[0] = best.fun
    return values, direction / direction.norm()


def _loss(direction: NDArray[np.float64], cloud: _Cloud) -> tuple[float, Tensor]:
    """Return the divergence to the best hyperplane across a direction, and its gradient."""
    normal = torch.from_numpy(direction)
    turned = cloud.inverse @ normal
    bound = turned @ normal
    share = cloud.weight / bound
    height = cloud.natural @ normal
    height = height - (share @ height) / share.sum()
    excess = share * height
    gradient = excess @ cloud.natural - (excess * height / bound) @ turned
    return float(0.5 * (excess @ height)), gradient


def _starts(cloud: _Cloud) -> list[Tensor]:
    """Return the best of many directions, one of each kind.

    Candidates are the normals of hyperplanes through many tasks, the axes, and the directions that these lead to.
    """
    rows = torch.linspace(0, len(cloud.natural) - 1, min(THROUGH, len(cloud.natural))).long()
    through = torch.linalg.inv(cloud.inverse[rows]).flatten(0, 1)
    axes = torch.eye(cloud.natural.shape[1], dtype=cloud.natural.dtype)
    pool = [torch.cat([through, axes])]
    for _ in range(ROUNDS):
        pool.append(_reweighted_eigen(pool[-1], cloud)[1][..., 0])
    candidates = torch.cat(pool)
    candidates = candidates / candidates.norm(dim=-1, keepdim=True)
    kept: list[Tensor] = []
    for direction in candidates[_losses(candidates, cloud).argsort()]:
        is_new = all(abs(direction @ other) < ALIKE for other in kept)
        if len(kept) < STARTS and is_new:
            kept.append(direction)
    return kept


def _losses(directions: Tensor, cloud: _Cloud) -> Tensor:
    share = cloud.weight / _bounds(directions, cloud)
    height = directions @ cloud.natural.mT
    height = height - ((share * height).sum(1) / share.sum(1)).unsqueeze(1)
    return (share * height.square()).sum(1)


def _bounds(directions: Tensor, cloud: _Cloud) -> Tensor:
    return torch.einsum("si,tij,sj->st", directions, cloud.inverse, directions)


def _reweighted_eigen(directions: Tensor, cloud: _Cloud) -> tuple[Tensor, Tensor]:
    """Solve the eigenproblem that each direction would have if every task's bound stayed as it is there."""
    share = cloud.weight / _bounds(directions, cloud)
    center = share @ cloud.natural / share.sum(1, keepdim=True)
    second = torch.einsum("st,ti,tj->sij", share, cloud.natural, cloud.natural)
    second = second - share.sum(1)[:, None, None] * center.unsqueeze(2) * center.unsqueeze(1)
    return generalized_eigen(second, torch.einsum("st,tij->sij", share, cloud.inverse))


def generalized_eigen(matrix: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Solve matrix x = e metric x: ascending eigenvalues, and eigenvectors as columns, with x metric x = 1."""
    root = torch.linalg.cholesky(metric)
    white = torch.linalg.solve_triangular(root, matrix, upper=False)
    white = torch.linalg.solve_triangular(root, white.mT, upper=False)
    values, vectors = torch.linalg.eigh(0.5 * (white + white.mT))
    return values, torch.linalg.solve_triangular(root.mT, vectors, upper=True)
