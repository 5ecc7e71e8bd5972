"""Name the latents that a direction consists of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["main_contributors"]

WHOLE = 0.9  # share beyond which a single latent is named without it


def main_contributors(names: Sequence[str], shares: Tensor, least: float = 0.15) -> str:
    """Name the latents that make up most of a direction, with their shares where there are several.

    Arguments:
        names: of the latents.
        shares: of the direction, one for each latent.
        least: smallest share that is named.
    """
    order = [int(i) for i in shares.argsort(descending=True) if shares[i] >= least]
    order = order or [int(shares.argmax())]
    if len(order) == 1 and shares[order[0]] > WHOLE:
        return f"`{names[order[0]]}`"
    return ", ".join(f"`{names[i]}` ({shares[i]:.0%})" for i in order)
