"""Measure Fisher information of the latents: local injectivity, and the bound on any estimate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hybrid.beliefs.belief import Gaussian
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.evidence.least_squares import LeastSquares, fisher_information
from pyro_hybrid.identifiability.directions import main_contributors
from pyro_hybrid.identifiability.task_beliefs import TaskBeliefs, copy_in_double
from pyro_hybrid.inference.draws import draws
from pyro_hybrid.programs.run import Program
from pyro_hybrid.scores.check import Check, Threshold

__all__ = ["FisherInformation", "judge_information", "least_squares_at", "measure_information"]

SEEN = Threshold(holds=3.0, fails=1.0)  # standard deviations of the noise
DRAWS = 2
NEGLIGIBLE = 1e-9  # precision of the prior, relative to that of the population


class FisherInformation(NamedTuple):
    """Fisher information of the latents at draws from their posterior.

    Attributes:
        names: of the latents.
        points: draws, in unconstrained coordinates, ``(draw, task, latent)``.
        information: of the latents in units of their standard deviation over systems, ``(draw, task, latent, latent)``.
        singular: singular values of ∂x/∂z in those units and the noise's, ascending, ``(draw, task, latent)``.
        weakest: average composition of the weakest direction, by latent, as shares.
    """

    names: list[str]
    points: Tensor
    information: Tensor
    singular: Tensor
    weakest: Tensor


def least_squares_at(
    program: Program, episode: Episode, beliefs: TaskBeliefs, points: Tensor
) -> LeastSquares:
    """Return the program on these trajectories as a least-squares problem in float64, around points (task, latent).

    The prior in it is negligible: a billionth of the precision of a latent's population.
    """
    sd = beliefs.population_sd
    flat = torch.diag_embed((NEGLIGIBLE / sd.square()).expand_as(points))
    belief = Gaussian.around(beliefs.families, points, flat)
    return LeastSquares(copy_in_double(program), episode.query.double(), belief, sd)


@torch.no_grad()
def measure_information(
    model: Program, guide: Program, episode: Episode, beliefs: TaskBeliefs
) -> FisherInformation:
    r"""Measure Fisher information :math:`J^\top W J` of a program's latents, by linearizing the program.

    .. math:: J = \partial \mu / \partial u \cdot \operatorname{diag}(s), \qquad W = \operatorname{diag}(\sigma^{-2})

    Here u are the unconstrained latents and s their standard deviations over systems; uncertainty about the latents of
    shots is subtracted.
    A singular value is the number of standard deviations of the noise by which all observations together move when the
    direction moves by one population standard deviation: zero where a parametrization is redundant or the field ignores
    a latent.

    Arguments:
        model, guide: the program, and the guide that its latents are drawn from.
        episode: trajectories of some tasks, with their support.
        beliefs: families and population of the latents.
    """
    samples = draws(model, guide, episode, DRAWS)
    by_site = [
        family.unconstrained(samples[name].double()) for name, family in beliefs.families.items()
    ]
    points = torch.cat(by_site, -1)
    problem = least_squares_at(model, episode, beliefs, points[0])
    by_draw = torch.stack([fisher_information(problem, point) for point in points])
    scaled = _in_population_units(by_draw, beliefs.population_sd)
    values, vectors = torch.linalg.eigh(scaled)
    return FisherInformation(
        names=beliefs.names,
        points=points,
        information=scaled,
        singular=values.clamp(min=0.0).sqrt(),
        weakest=vectors[..., 0].square().flatten(0, -2).mean(0),
    )


def _in_population_units(information: Tensor, sd: Tensor) -> Tensor:
    """Scale information to latents of standard deviation 1; matrices that are not finite count as no information."""
    scaled = information * sd * sd.unsqueeze(-1)
    is_finite = torch.isfinite(scaled).all(-1, keepdim=True).all(-2, keepdim=True)
    return scaled.where(is_finite, 0.0)


def judge_information(fisher: FisherInformation) -> Check:
    """Judge the weakest direction, in nine tenths of the systems: well above the noise, or below it.

    Arguments:
        fisher: result of :func:`measure_information`.
    """
    smallest = fisher.singular[..., 0].flatten()
    quantiles = torch.tensor([0.05, 0.5, 0.95], dtype=smallest.dtype)
    low, value, high = smallest.quantile(quantiles).tolist()
    typical = fisher.singular.flatten(0, -2).median(0).values
    num_lost = int((typical < SEEN.fails).sum())
    contributors = main_contributors(fisher.names, fisher.weakest, least=0.02)
    if num_lost:
        verb = "moves" if num_lost == 1 else "move"
        pronoun = "it varies" if num_lost == 1 else "they vary"
        why = (
            f"{num_lost} of {len(fisher.names)} directions of the latents {verb} the observations by less than the "
            f"noise when {pronoun} as much as between systems. Weakest direction: {contributors}."
        )
    else:
        why = (
            f"Weakest direction: {contributors}; the value says by how many standard deviations of the noise all "
            "observations together move when it varies as much as between systems."
        )
    return Check.from_interval(
        "injectivity, local (ii)",
        value,
        (low, high),
        SEEN,
        why,
        f"Fix or merge latents that only count together ({contributors}), drop latents that the field ignores, or "
        "observe more.",
    )
