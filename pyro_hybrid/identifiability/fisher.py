"""What trajectories say of every latent, in units of the noise: local injectivity, and the bound on any estimate."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.evidence.gauss_newton import Problem, Program, information
from pyro_hybrid.identifiability.check import Check, Threshold, judged
from pyro_hybrid.identifiability.task_beliefs import Reading, in_double
from pyro_hybrid.identifiability.variability import culprits
from pyro_hybrid.inference.posterior import draws
from pyro_hybrid.inference.prior import SupportPrior

__all__ = ["Fisher", "fisher", "judge_fisher", "posed"]

SEEN = Threshold(holds=3.0, fails=1.0)  # standard deviations of the noise
DRAWS = 2


class Fisher(NamedTuple):
    """Fisher information of the latents at draws from their posterior.

    Attributes:
        names: the latents.
        points: the draws, in unconstrained coordinates, ``(draw, task, latent)``.
        information: of the latents in units of their spread over systems, ``(draw, task, latent, latent)``.
        singular: singular values of ∂x/∂z in those units and the noise's, rising, ``(draw, task, latent)``.
        weakest: what the weakest direction consists of, by latent, as shares, on average.
    """

    names: list[str]
    points: Tensor
    information: Tensor
    singular: Tensor
    weakest: Tensor


def posed(program: Program, episode: Episode, reading: Reading, points: Tensor) -> Problem:
    """The program on these trajectories as a least-squares problem in float64, around points (task, latent).

    There is no prior in it, or hardly any: a billionth of a latent's spread over systems.
    """
    modules = program.modules() if isinstance(program, nn.Module) else ()
    if any(isinstance(module, SupportPrior) and module.evidence for module in modules):
        episode = replace(
            episode, support=None
        )  # latents are given, and reading it again would take longest
    flat = torch.diag_embed(1e-9 * reading.spread()[1].square().reciprocal().expand_as(points))
    return Problem(in_double(program), episode.double(), reading.families, points, flat)


@torch.no_grad()
def fisher(model: Program, guide: Program, episode: Episode, reading: Reading) -> Fisher:
    r"""Fisher information :math:`J^\top W J` of a program's latents, from the linearisation that computes evidence.

    .. math:: J = \partial \mu / \partial u \cdot \operatorname{diag}(s), \qquad W = \operatorname{diag}(\sigma^{-2})

    with u the unconstrained latents, s their spread over systems, and what is unknown about shots' latents taken off.
    A singular value is how many standard deviations of the noise all observations together move when that direction
    moves by one spread: zero where a parametrisation is redundant or the field ignores a latent.

    Arguments:
        model, guide: the program, and where its latents are drawn from.
        episode: trajectories of some tasks, with their support.
        reading: families and spread of the latents.
    """
    found = draws(model, guide, episode, DRAWS)
    points = torch.cat(
        [family.unconstrained(found[name].double()) for name, family in reading.families.items()],
        -1,
    )
    spread = reading.spread()[1]
    problem = posed(model, episode, reading, points[0])
    scaled = (
        torch.stack([information(problem, point) for point in points])
        * spread
        * spread.unsqueeze(-1)
    )
    scaled = scaled.where(
        torch.isfinite(scaled).all(-1, keepdim=True).all(-2, keepdim=True), 0.0
    )  # as if it diverged
    values, vectors = torch.linalg.eigh(scaled)
    return Fisher(
        reading.names,
        points,
        scaled,
        values.clamp(min=0.0).sqrt(),
        vectors[..., 0].square().flatten(0, -2).mean(0),
    )


def judge_fisher(found: Fisher) -> Check:
    """The weakest direction, in nine tenths of the systems: well above the noise, or below it."""
    least = found.singular[..., 0].flatten()
    low, value, high = least.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=least.dtype)).tolist()
    typical = found.singular.flatten(0, -2).median(0).values
    lost, who = int((typical < SEEN.fails).sum()), culprits(found.names, found.weakest, least=0.02)
    move = "moves" if lost == 1 else "move"
    why = (
        f"{lost} of {len(found.names)} directions {move} no observation by the noise: {who}"
        if lost
        else f"what {who} moves least, in standard deviations of the noise"
    )
    return judged(
        "injectivity, local (ii)",
        value,
        (low, high),
        SEEN,
        why,
        f"Fix or merge what only counts together ({who}), drop what the field ignores, or observe more.",
    )
