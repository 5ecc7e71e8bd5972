"""Check condition (iv): the support moves the prior in every direction of its natural parameters, beyond its noise."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hybrid.beliefs.families import Family
from pyro_hybrid.errors import require
from pyro_hybrid.identifiability.directions import main_contributors
from pyro_hybrid.identifiability.nearest_hyperplane import generalized_eigen, nearest_hyperplane
from pyro_hybrid.identifiability.task_beliefs import TaskBeliefs
from pyro_hybrid.scores.check import Check, Interval, Threshold

__all__ = [
    "NAMES",
    "Variability",
    "judge_too_few_tasks",
    "judge_variability",
    "measure_variability",
]

NAMES = ("variability of means (iv)", "variability (iv)")
# Variance between systems, in variances between supports of one system.
LOCATIONS = Threshold(holds=1.0, fails=0.25)
NATS = 3.0  # twenty to one against a prior that leaves a direction out
FAINT = 1e-3  # nats in a system: too little to wait for
RESAMPLES = 100
FEW = 8  # systems, too few to split
OUTLYING = 6.0  # standard deviations of the bulk
ROUNDING = 1e-12  # variance, in population units, that float32 alone makes


class Variability(NamedTuple):
    """Variation of the natural parameters over tasks.

    Attributes:
        latents: names of the latents.
        terms: names of their natural parameters.
        num_tasks: number of tasks in the training set, those not looked at included.
        num_support: number of shots in each support.
        locations: signal-to-noise ratios of the latents' means, in their principal directions, ascending.
        location_interval: 95% interval of the smallest.
        location_shares: composition of the direction of the smallest, by latent, as shares.
        nats: evidence of one task for each direction of λ, ascending.
        nats_interval: 95% interval of the smallest.
        nats_shares: composition of the direction of the smallest, by natural parameter, as shares.
    """

    latents: list[str]
    terms: list[str]
    num_tasks: int
    num_support: int
    locations: Tensor
    location_interval: Interval
    location_shares: Tensor
    nats: Tensor
    nats_interval: Interval
    nats_shares: Tensor


@torch.no_grad()
def measure_variability(
    beliefs: TaskBeliefs, *, num_tasks: int | None = None, seed: int = 0
) -> Variability:
    r"""Measure the spread of λ over tasks in two units: noise for the latents' means, nats for all of λ.

    The means, in unconstrained coordinates, are known from disjoint supports of each task. Their differences within a
    task are the noise floor W; the variance between tasks, B, is the rest of the means' variance. The first numbers
    are the eigenvalues of :math:`W^{-1} B`: zero for one task repeated, however often.

    Then the means are shrunk to their variance B, and each keeps the precision that its support gave it. The second
    numbers are the loss per task of a prior that is confined to a hyperplane:

    .. math::
        \rho = \min_{v, c} \; \tfrac12 \operatorname{E}_S
               \frac{(v^\top \lambda(S) - c)^2}{v^\top G(\lambda(S))^{-1} v}, \qquad G = \nabla^2 A,

    which is the divergence from :math:`p(z \mid S)` to its nearest neighbor in the hyperplane, to second order. It is
    zero where L of the theorem is singular for every choice of supports, as when only means or only variances vary.

    Arguments:
        beliefs: natural parameters of many tasks, from several supports each.
        num_tasks: number of tasks in the training set, if the beliefs are of a sample of them.
        seed: of the resampling; the global random state is left alone.
    """
    num_supports = len(beliefs.flat)
    require(
        num_supports > 1,
        "two supports or more of each system",
        num_supports,
        "Differences between supports of one system are the noise: record twice as many shots.",
    )
    generator = torch.Generator().manual_seed(seed)
    sd = beliefs.population_sd.clamp(min=1e-300)
    mean = _without_outliers(beliefs.mean) / sd
    once = torch.ones(mean.shape[1], dtype=mean.dtype)
    between, within = _covariances(mean, once)
    ratios, directions = generalized_eigen(between, within)
    natural, inverse = _noiseless(beliefs, _shrunk(mean, between, within) * sd)
    nats, normal = nearest_hyperplane(natural, inverse, once)
    resamples = [_resampled_counts(mean.shape[1], generator) for _ in range(RESAMPLES)]
    location_interval = _location_interval(mean, ratios[0], resamples, generator)
    resampled_nats = [
        nearest_hyperplane(natural, inverse, counts, normal)[0][0] for counts in resamples
    ]
    return Variability(
        latents=beliefs.names,
        terms=beliefs.terms,
        num_tasks=num_tasks or mean.shape[1],
        num_support=beliefs.num_support,
        locations=ratios,
        location_interval=location_interval,
        location_shares=_shares(directions[:, 0]),
        nats=nats,
        nats_interval=_nats_interval(nats[0], torch.stack(resampled_nats)),
        nats_shares=_shares(normal * inverse.diagonal(dim1=-2, dim2=-1).mean((0, 1)).sqrt()),
    )


def _location_interval(
    mean: Tensor, smallest: Tensor, resamples: list[Tensor], generator: torch.Generator
) -> Interval:
    """Return the interval of the smallest ratio: resampled tasks below, cross-validated directions above."""
    low = torch.stack(
        [generalized_eigen(*_covariances(mean, counts))[0][0] for counts in resamples]
    ).quantile(0.025)
    high = torch.stack([_cross_validated_ratio(mean, generator) for _ in resamples]).quantile(
        0.975, interpolation="higher"
    )
    value = float(smallest)
    return min(float(low), value), max(float(high), value)


def _nats_interval(smallest: Tensor, resampled: Tensor) -> Interval:
    """Return the interval of the resampled values, moved up where their mean is below the value.

    A minimum over directions is too low in every resample.
    """
    resampled = resampled + (smallest - resampled.mean()).clamp(min=0.0)
    return float(resampled.quantile(0.025)), float(resampled.quantile(0.975))


def _resampled_counts(num_tasks: int, generator: torch.Generator) -> Tensor:
    """Count how often each task is drawn when as many are drawn with replacement."""
    rows = torch.randint(num_tasks, (num_tasks,), generator=generator)
    return torch.bincount(rows, minlength=num_tasks).double()


def _covariances(mean: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return covariances between and within tasks of means (support, task, latent), each task counted ``counts`` times.

    Means are in population units.
    """
    num_supports = mean.shape[0]
    total = counts.sum()
    center = mean.mean(0)
    inner = (mean - center) * counts.sqrt().unsqueeze(-1)
    within = torch.einsum("rti,rtj->ij", inner, inner) / (total * (num_supports - 1))
    outer = (center - (counts @ center) / total) * counts.sqrt().unsqueeze(-1)
    between = outer.mT @ outer / (total - 1.0) - within / num_supports
    return between, within + ROUNDING * torch.eye(len(within), dtype=within.dtype)


def _without_outliers(mean: Tensor) -> Tensor:
    """Clamp outlying means: a support that was inferred in a wrong optimum would dominate all others."""
    median = mean.flatten(0, 1).median(0).values
    deviation = (mean - median).abs().flatten(0, 1).median(0).values
    reach = OUTLYING * 1.48 * deviation
    return torch.minimum(torch.maximum(mean, median - reach), median + reach)


def _cross_validated_ratio(mean: Tensor, generator: torch.Generator) -> Tensor:
    """Return the ratio, on one half of the tasks, of the direction that is the weakest on the other half.

    The result is an average over both roles of the halves. No direction does better than the weakest there.
    """
    num_tasks = mean.shape[1]
    if num_tasks < FEW:
        return mean.new_tensor(math.inf)
    one, other = torch.randperm(num_tasks, generator=generator).tensor_split(2)
    ratios = []
    for fitted, judged in ((one, other), (other, one)):
        once = torch.ones(len(fitted), dtype=mean.dtype)
        _, directions = generalized_eigen(*_covariances(mean[:, fitted], once))
        counts = _resampled_counts(len(judged), generator)
        along = mean[:, judged] @ directions[:, :1]
        ratios.append(generalized_eigen(*_covariances(along, counts))[0][0])
    return torch.stack(ratios).mean()


def _shrunk(mean: Tensor, between: Tensor, within: Tensor) -> Tensor:
    """Shrink each task's mean so that their covariance is that without the noise of supports."""
    ratios, directions = generalized_eigen(between, within)
    ratios = ratios.clamp(min=0.0)
    kept = (ratios / (ratios + 1.0 / mean.shape[0])).sqrt()
    center = mean.mean(0)
    average = center.mean(0)
    back: Tensor = torch.linalg.inv(directions)
    return average + (center - average) @ directions * kept @ back


def _noiseless(beliefs: TaskBeliefs, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return λ (support, task, number) of these means and each support's sds, and the inverse metric there.

    The basis of statistics is one in which they are uncorrelated on average: the result doesn't depend on it, its
    digits do.
    """
    sd = beliefs.sd
    naturals = []
    inverses: list[Tensor] = []
    start = 0
    for family in beliefs.families.values():
        columns = slice(start, start + family.n)
        same_for_supports = mean[:, columns].expand_as(sd[..., columns]).contiguous()
        natural = family.from_gaussian(same_for_supports, sd[..., columns])
        metric = _metric(family, natural)
        basis = torch.linalg.cholesky(metric.mean((0, 1)))
        root = torch.linalg.cholesky(metric)
        inner = torch.linalg.solve_triangular(root, basis.expand_as(metric), upper=False)
        naturals.append((basis.mT @ natural.unsqueeze(-1)).flatten(-3))
        inverses.extend((inner.mT @ inner).unbind(-3))
        start += family.n
    return torch.cat(naturals, -1), _block_diagonal(inverses)


def _metric(family: Family, natural: Tensor) -> Tensor:
    """Return the covariance of the statistics, the derivative of their mean: (..., component, statistic, statistic)."""
    with torch.enable_grad():
        natural = natural.detach().requires_grad_()
        means = family.mean_statistics(natural).sum((*range(natural.dim() - 2), -2))
        rows = [torch.autograd.grad(mean, natural, retain_graph=True)[0] for mean in means]
    metric = torch.stack(rows, -2)
    return 0.5 * (metric + metric.mT)


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    size = sum(block.shape[-1] for block in blocks)
    matrix = blocks[0].new_zeros(*blocks[0].shape[:-2], size, size)
    start = 0
    for block in blocks:
        end = start + block.shape[-1]
        matrix[..., start:end, start:end] = block
        start = end
    return matrix


def _shares(direction: Tensor) -> Tensor:
    return direction.square() / direction.square().sum()


def judge_variability(variability: Variability) -> list[Check]:
    """Judge the latents' means against noise, and all natural parameters in nats of the whole training set.

    Arguments:
        variability: result of :func:`measure_variability`.
    """
    return [_judge_means(variability), _judge_all(variability)]


def judge_too_few_tasks(num_terms: int, num_tasks: int) -> list[Check]:
    """Judge a data set that has fewer systems than the theorem counts, without looking at it."""
    why = (
        f"The theorem needs n·k + 1 = {num_terms + 1} different systems, and there are {num_tasks}."
    )
    value = float(num_tasks)
    return [
        Check(
            condition=name,
            status="fails",
            value=value,
            interval=(value, value),
            threshold=Threshold(num_terms, num_terms),
            why=why,
            remedy="Record more systems.",
        )
        for name in NAMES
    ]


def _judge_means(variability: Variability) -> Check:
    ratio = float(variability.locations[0])
    contributors = main_contributors(variability.latents, variability.location_shares)
    if float(variability.nats[-1]) < ROUNDING:
        why = "The prior ignores the support."
        remedy = "Use a SupportPrior: the theorem rests on a prior that depends on the support."
    else:
        why = (
            f"Weakest direction: {contributors}; the value is its variance across systems relative to that between "
            f"supports of one system, of {variability.num_support} shot{'s' * (variability.num_support > 1)} each."
        )
        remedy = f"Record systems that differ more in {contributors}"
        num_shots = math.ceil(variability.num_support * LOCATIONS.holds / max(ratio, 1e-12))
        if variability.num_support < num_shots <= 16 * variability.num_support:
            remedy += f", or {num_shots} shots for each support"
        remedy += "."
    return Check.from_interval(
        NAMES[0], ratio, variability.location_interval, LOCATIONS, why, remedy
    )


def _judge_all(variability: Variability) -> Check:
    num_tasks = variability.num_tasks
    low, high = variability.nats_interval
    num_moving = int((num_tasks * variability.nats > 1.0).sum())
    contributors = main_contributors(variability.terms, variability.nats_shares)
    why = (
        f"Weakest of {len(variability.terms)} directions of the natural parameters: {contributors}; the value is the "
        f"evidence in nats, from {num_tasks} systems, that the prior moves in it. {num_moving} "
        f"direction{' has' if num_moving == 1 else 's have'} more than one nat."
    )
    if low > FAINT:
        remedy = f"{math.floor(NATS / low) + 1} systems like these are enough."
    else:
        remedy = (
            "Let supports differ in how much they say (initial states, lengths), or choose a family that has only the "
            "statistics that vary."
        )
    return Check.from_interval(
        NAMES[1],
        num_tasks * float(variability.nats[0]),
        (num_tasks * low, num_tasks * high),
        Threshold(NATS, min(1.0, FAINT * num_tasks)),
        why,
        remedy,
    )
