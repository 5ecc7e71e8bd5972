"""Measure what a neural term does that the known physics could have done, and how far it is from linear."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pyro_hybrid.errors import fail, require

__all__ = ["explained_share", "nonlinearity_penalty", "projection_penalty"]

SMALLEST_SQUARE = 1e-12  # of a tangent, by which its projections are divided


def projection_penalty(correction: Tensor, tangents: Sequence[Tensor]) -> Tensor:
    r"""Measure how much of a neural term the known physics could have explained: zero for the least correction.

    .. math:: \sum_j \frac{\langle f_N, \partial_j f_P \rangle^2}{\lVert \partial_j f_P \rVert^2}

    It vanishes where APHYNITY's :math:`\lVert f_N \rVert^2` is least, given the sum of both terms. Unlike that norm it
    does not penalize what no physics latent could have explained. The squares are unbiased estimates: the square of a
    mean over samples would also penalize their variance.

    References:
        Augmenting Physical Models with Deep Networks for Complex Dynamics Forecasting (Yin et al., 2021),
        https://arxiv.org/abs/2010.04456

    Arguments:
        correction: what the neural term adds to the slopes, ``(..., task, sample, component)``, at sampled states.
        tangents: for each physics latent, what a change of it would add, of the same shape.

    Returns:
        One number for each task, to be weighted in a ``pyro.factor``.

    >>> gravity = torch.tensor([[1.0], [-1.0], [0.5]]).expand(4, 3, 1)
    >>> projection_penalty(2.0 * gravity, [gravity]) > projection_penalty(gravity, [gravity])
    tensor([True, True, True, True])
    """
    shape = tuple(correction.shape)
    require(
        len(shape) > 1 and shape[-2] > 1,
        "a correction (..., task, sample, component) of two samples or more",
        shape,
        "Evaluate both terms at many states of each task.",
    )
    num_samples = shape[-2]
    num_pairs = num_samples * (num_samples - 1)
    total = torch.zeros_like(correction[..., 0, 0])
    for tangent in tangents:
        products = (correction * tangent).sum(-1)
        square = (products.sum(-1).square() - products.square().sum(-1)) / num_pairs
        size = tangent.square().sum(-1).mean(-1)
        total = total + square / size.clamp(min=SMALLEST_SQUARE)
    return total


def nonlinearity_penalty(first: Tensor, second: Tensor, halfway: Tensor) -> Tensor:
    r"""Measure how far a neural term between two latent vectors is from the average of those at both.

    .. math:: \bigl\lVert f_N(\tfrac12 (z + z')) - \tfrac12 \bigl(f_N(z) + f_N(z')\bigr) \bigr\rVert^2

    It is zero for a term that is linear in its latents.

    Arguments:
        first, second: the term at the two latent vectors, ``(..., task, sample, component)``, at sampled states.
        halfway: the term at their midpoint, of the same shape.

    Returns:
        One number for each task, to be weighted in a ``pyro.factor``.
    """
    return (halfway - 0.5 * (first + second)).square().sum(-1).mean(-1)


def explained_share(
    pieces: Iterable[tuple[Tensor, Sequence[Tensor]]], centered: bool = False
) -> Tensor:
    r"""Find the change of each physics latent that does most of a neural term's work, by least squares over states.

    .. math:: \arg\min_c \bigl\lVert f_N - \sum_j c_j\, \partial_j f_P \bigr\rVert^2

    Arguments:
        pieces: corrections and tangents as for :func:`projection_penalty`; each piece covers some of the states.
        centered: take covariances rather than inner products, component by component. Over states whose components are
            independent, functions of different components then share nothing.

    Returns:
        The changes ``(..., task, latent)``, in units of those that gave the tangents; zero where the states do not
        determine them.
    """
    sums: _Sums | None = None
    for correction, tangents in pieces:
        sums = _Sums(correction, tangents) if sums is None else sums.add(correction, tangents)
    if sums is None:
        fail(
            "one piece or more",
            "none",
            "Evaluate both terms at some states of each task.",
        )
    return sums.solution(centered)


class _Sums:
    """Sums over states, in float64, from which the least-squares problem of all states is built."""

    def __init__(self, correction: Tensor, tangents: Sequence[Tensor]) -> None:
        target, *basis = torch.broadcast_tensors(correction, *tangents)
        stacked = torch.stack(basis, -3)  # (..., latent, state, component)
        flat = stacked.flatten(-2)
        self.dtype = target.dtype
        self.num_states = target.shape[-2]
        self.gram = (flat @ flat.mT).double()
        self.products = (flat @ target.flatten(-2).unsqueeze(-1)).double()
        self.basis = stacked.sum(-2).double()
        self.target = target.sum(-2).double()

    def add(self, correction: Tensor, tangents: Sequence[Tensor]) -> _Sums:
        """Add those of further states."""
        more = _Sums(correction, tangents)
        self.num_states += more.num_states
        self.gram = self.gram + more.gram
        self.products = self.products + more.products
        self.basis = self.basis + more.basis
        self.target = self.target + more.target
        return self

    def solution(self, centered: bool) -> Tensor:
        """Solve the normal equations; zero where they are singular."""
        gram, products = self.gram, self.products
        if centered:
            gram = gram - self.basis @ self.basis.mT / self.num_states
            products = products - self.basis @ self.target.unsqueeze(-1) / self.num_states
        solution: Tensor = torch.linalg.solve_ex(gram, products).result.squeeze(-1)
        return solution.nan_to_num(0.0, 0.0, 0.0).to(self.dtype)
