"""Compare the ends of restarts of a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hybrid.errors import require

__all__ = ["Agreement", "measure_agreement"]


class Agreement(NamedTuple):
    """Largest distance between the ends of restarts.

    Attributes:
        gap: nats per task between two of them, by the curvature at one.
        difference: length of their difference, relative to the longer of the two.
    """

    gap: float
    difference: float


def measure_agreement(points: Sequence[Tensor], hessian: Tensor) -> Agreement:
    r"""Compare the ends of restarts: a small gap with a large difference is a direction that nothing determines.

    .. math:: \max_{i, j}\ \tfrac12 \lvert \Delta_{ij}^\top H \Delta_{ij} \rvert, \qquad
              \max_{i, j}\ \lVert \Delta_{ij} \rVert / \max(\lVert \varphi_i \rVert, \lVert \varphi_j \rVert)

    Networks also have discrete symmetries, such as the order and signs of tanh units: these are other optima, far away.

    Arguments:
        points: two ends or more, (P,) each.
        hessian: of the mean loss at one of them, (P, P).

    >>> points = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]
    >>> measure_agreement(points, torch.tensor([[2.0, 0.0], [0.0, 0.0]])).gap
    0.0
    """
    size = len(hessian)
    require(
        len(points) > 1 and all(point.shape == (size,) for point in points),
        f"two points or more of shape ({size},)",
        [tuple(point.shape) for point in points],
        "Pass the end of each restart, flattened in the same order.",
    )
    ends = torch.stack([point.detach().double() for point in points])
    moves = ends.unsqueeze(1) - ends
    lengths = ends.norm(dim=-1)
    longer = torch.maximum(lengths.unsqueeze(1), lengths).clamp(min=torch.finfo(torch.float64).tiny)
    gaps = 0.5 * torch.einsum("abi,ij,abj->ab", moves, hessian.double(), moves)
    differences = moves.norm(dim=-1) / longer
    return Agreement(float(gaps.abs().max()), float(differences.max()))
