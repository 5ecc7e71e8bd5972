"""The hyperplane of natural parameters that costs a prior the least, and its price in nats."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

__all__ = ["generalised", "weakest"]

THROUGH, ROUNDS, STARTS, ALIKE = 60, 6, 12, 0.99


def weakest(
    natural: Tensor, inverse: Tensor, counts: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""The least loss over hyperplanes, with those of the directions orthogonal to its own, and that direction.

    .. math:: \min_{v, c} \; \tfrac12 \sum_t w_t \frac{(v^\top \lambda_t - c)^2}{v^\top G_t^{-1} v}

    Arguments:
        natural: λ, ``(support, task, number)``.
        inverse: :math:`G^{-1}` there.
        counts: how often each task counts.
        start: the direction to descend from, instead of a search for it.
    """
    weight = (counts / counts.sum() / len(natural)).expand(natural.shape[:2]).flatten()
    problem = natural.flatten(0, 1), inverse.flatten(0, 1), weight
    starts = _starts(*problem) if start is None else [start]
    ends = [
        minimize(
            _loss, begun.numpy(), args=problem, jac=True, method="BFGS", options={"gtol": 1e-12}
        )
        for begun in starts
    ]
    best = min(ends, key=lambda end: end.fun)
    direction = natural.new_tensor(best.x)
    values = 0.5 * _reweighted(direction.unsqueeze(0), *problem)[0][0]
    return values.clamp(min=best.fun).index_fill(
        0, torch.tensor(0), best.fun
    ), direction / direction.norm()


def _loss(
    direction: NDArray[np.float64], natural: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[float, Tensor]:
    """The divergence to the best hyperplane across a direction, and its gradient."""
    across = torch.from_numpy(direction)
    turned = inverse @ across
    bound = turned @ across
    share, along = weight / bound, natural @ across
    along = along - (share @ along) / share.sum()
    excess = share * along
    return float(0.5 * (excess @ along)), excess @ natural - (excess * along / bound) @ turned


def _starts(natural: Tensor, inverse: Tensor, weight: Tensor) -> list[Tensor]:
    """The best directions of many, of each kind one: across hyperplanes through many tasks, and what these lead to."""
    some = torch.linspace(0, len(natural) - 1, min(THROUGH, len(natural))).long()
    through = torch.linalg.inv(inverse[some]).flatten(0, 1)
    pool = [torch.cat([through, torch.eye(natural.shape[1], dtype=natural.dtype)])]
    for _ in range(ROUNDS):
        pool.append(_reweighted(pool[-1], natural, inverse, weight)[1][..., 0])
    every = torch.cat(pool)
    every = every / every.norm(dim=-1, keepdim=True)
    bound = torch.einsum("si,tij,sj->st", every, inverse, every)
    share, along = weight / bound, every @ natural.mT
    along = along - ((share * along).sum(1) / share.sum(1)).unsqueeze(1)
    kept: list[Tensor] = []
    for direction in every[(share * along.square()).sum(1).argsort()]:
        if len(kept) < STARTS and all(abs(direction @ other) < ALIKE for other in kept):
            kept.append(direction)
    return kept


def _reweighted(
    direction: Tensor, natural: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The eigenproblem that each direction would solve if the bound of every task stayed as it is there."""
    share = weight / torch.einsum("si,tij,sj->st", direction, inverse, direction)
    centre = share @ natural / share.sum(1, keepdim=True)
    spread = torch.einsum("st,ti,tj->sij", share, natural, natural)
    spread = spread - share.sum(1)[:, None, None] * centre.unsqueeze(2) * centre.unsqueeze(1)
    return generalised(spread, torch.einsum("st,tij->sij", share, inverse))


def generalised(matrix: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of matrix x = e metric x, rising, and eigenvectors as columns, with x metric x = 1."""
    root = torch.linalg.cholesky(metric)
    white = torch.linalg.solve_triangular(root, matrix, upper=False)
    white = torch.linalg.solve_triangular(root, white.mT, upper=False)
    values, vectors = torch.linalg.eigh(0.5 * (white + white.mT))
    return values, torch.linalg.solve_triangular(root.mT, vectors, upper=True)
