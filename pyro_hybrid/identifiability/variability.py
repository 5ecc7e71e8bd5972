"""Condition (iv): the support moves the prior in every direction of its natural parameters, beyond its own noise."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hybrid.beliefs.families import Family
from pyro_hybrid.errors import require
from pyro_hybrid.identifiability.check import Check, Interval, Threshold, judged
from pyro_hybrid.identifiability.nearest_hyperplane import generalised, weakest
from pyro_hybrid.identifiability.task_beliefs import Reading

__all__ = ["Variability", "culprits", "judge_variability", "too_few", "variability"]

LOCATIONS = Threshold(
    holds=1.0, fails=0.25
)  # variance between systems, in variances between supports of one system
NATS, FAINT = (
    3.0,
    1e-3,
)  # twenty to one against a prior that leaves a direction out; too little to wait for
NAMES = ("variability of means (iv)", "variability (iv)")
RESAMPLES, FEW = 100, 8
OUTLYING = 6.0  # standard deviations of the bulk
ROUNDING = 1e-12  # variance, in population units, that float32 alone makes


class Variability(NamedTuple):
    """How the natural parameters of tasks vary.

    Attributes:
        latents, terms: names of the latents, and of their natural parameters.
        tasks: number of tasks that stand behind it, those not looked at included.
        shots: size of the supports.
        locations: signal-to-noise ratios of the latents' means, in their principal directions, rising.
        location_interval: of the smallest, 95%.
        location_weights: what the direction of the smallest consists of, by latent, as shares.
        nats: evidence of one task for each direction of λ, rising.
        nats_interval: of the smallest, 95%.
        nats_weights: what the direction of the smallest consists of, by natural parameter, as shares.
    """

    latents: list[str]
    terms: list[str]
    tasks: int
    shots: int
    locations: Tensor
    location_interval: Interval
    location_weights: Tensor
    nats: Tensor
    nats_interval: Interval
    nats_weights: Tensor


@torch.no_grad()
def variability(reading: Reading, *, tasks: int | None = None, seed: int = 0) -> Variability:
    r"""Spread of λ over tasks, in two units: noise for the latents' means, nats for all of λ.

    The means, in unconstrained coordinates, are known from disjoint supports of each task. How these differ within a
    task is the noise floor W; the variance between tasks, B, is what remains of the means' variance without it. The
    first numbers are the eigenvalues of :math:`W^{-1} B`: zero for one task repeated, however often.

    Then the means are shrunk to their variance B, each keeping the precision that its support gave it. The second
    numbers are what a prior confined to a hyperplane would lose, per task:

    .. math::
        \rho = \min_{v, c} \; \tfrac12 \operatorname{E}_S
               \frac{(v^\top \lambda(S) - c)^2}{v^\top G(\lambda(S))^{-1} v}, \qquad G = \nabla^2 A,

    which is the divergence from :math:`p(z \mid S)` to its nearest neighbour in the hyperplane, to second order. It is
    zero where L of the theorem is singular for every choice of supports, as when only means or only variances vary.

    Arguments:
        reading: natural parameters of many tasks from several supports each.
        tasks: number of tasks in the training set, if the reading is a sample of them.
        seed: of the resampling; the global random state is left alone.
    """
    require(
        len(reading.flat) > 1,
        "two supports or more of each system",
        len(reading.flat),
        "What two supports of one system disagree about is the noise: record twice as many shots.",
    )
    generator = torch.Generator().manual_seed(seed)
    spread = reading.spread()[1].clamp(min=1e-300)
    mean, scale = reading.coordinates()
    mean, everyone = _tame(mean) / spread, torch.ones(mean.shape[1], dtype=mean.dtype)
    between, within = _covariances(mean, everyone)
    ratios, directions = generalised(between, within)
    natural, inverse = _noiseless(reading, _shrunk(mean, between, within) * spread, scale)
    nats, direction = weakest(natural, inverse, everyone)
    resampled = [_counts(mean.shape[1], generator) for _ in range(RESAMPLES)]
    low = torch.stack(
        [generalised(*_covariances(mean, counts))[0][0] for counts in resampled]
    ).quantile(0.025)
    high = torch.stack([_elsewhere(mean, generator) for _ in resampled]).quantile(
        0.975, interpolation="higher"
    )
    again = torch.stack(
        [weakest(natural, inverse, counts, direction)[0][0] for counts in resampled]
    )
    again = again + (nats[0] - again.mean()).clamp(
        min=0.0
    )  # a minimum over directions is too low in every sample
    return Variability(
        reading.names,
        reading.terms,
        tasks or mean.shape[1],
        reading.shots,
        ratios,
        (min(float(low), float(ratios[0])), max(float(high), float(ratios[0]))),
        _shares(directions[:, 0]),
        nats,
        (float(again.quantile(0.025)), float(again.quantile(0.975))),
        _shares(direction * inverse.diagonal(dim1=-2, dim2=-1).mean((0, 1)).sqrt()),
    )


def _counts(tasks: int, generator: torch.Generator) -> Tensor:
    """How often each task is drawn when as many are drawn with replacement."""
    drawn = torch.randint(tasks, (tasks,), generator=generator)
    return torch.bincount(drawn, minlength=tasks).double()


def _covariances(mean: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Between and within tasks, of means (support, task, latent) in population units, each task counted so often."""
    supports, total = mean.shape[0], counts.sum()
    centre = mean.mean(0)
    inner = (mean - centre) * counts.sqrt().unsqueeze(-1)
    within = torch.einsum("rti,rtj->ij", inner, inner) / (total * (supports - 1))
    outer = (centre - (counts @ centre) / total) * counts.sqrt().unsqueeze(-1)
    between = outer.mT @ outer / (total - 1.0) - within / supports
    return between, within + ROUNDING * torch.eye(len(within), dtype=within.dtype)


def _tame(mean: Tensor) -> Tensor:
    """Means without outliers: a support that was read in a wrong optimum would drown the others."""
    middle = mean.flatten(0, 1).median(0).values
    width = OUTLYING * 1.48 * (mean - middle).abs().flatten(0, 1).median(0).values
    return torch.minimum(torch.maximum(mean, middle - width), middle + width)


def _elsewhere(mean: Tensor, generator: torch.Generator) -> Tensor:
    """The ratio on one half of the tasks of the direction that is the weakest on the other, and the other way round.

    No direction does better than the weakest there.
    """
    if mean.shape[1] < FEW:
        return mean.new_tensor(math.inf)
    halves = torch.randperm(mean.shape[1], generator=generator).tensor_split(2)
    ratios = []
    for here, there in (halves, halves[::-1]):
        direction = generalised(
            *_covariances(mean[:, here], torch.ones(len(here), dtype=mean.dtype))
        )[1][:, :1]
        ratios.append(
            generalised(*_covariances(mean[:, there] @ direction, _counts(len(there), generator)))[
                0
            ][0]
        )
    return torch.stack(ratios).mean()


def _shrunk(mean: Tensor, between: Tensor, within: Tensor) -> Tensor:
    """Each task's mean, drawn in so that their covariance is what it would be without the noise of supports."""
    ratios, directions = generalised(between, within)
    ratios = ratios.clamp(min=0.0)
    kept = (ratios / (ratios + 1.0 / mean.shape[0])).sqrt()
    centre = mean.mean(0)
    average = centre.mean(0)
    return average + (centre - average) @ directions * kept @ torch.linalg.inv(directions)


def _noiseless(reading: Reading, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """λ (support, task, number) of these means and each support's scales, and the inverse metric there.

    In a basis of statistics that are uncorrelated on average: the result doesn't depend on it, its digits do.
    """
    naturals, inverses, at = [], [], 0
    for family in reading.families.values():
        part = slice(at, at + family.n)
        natural = family.from_gaussian(
            mean[:, part].expand_as(scale[..., part]).contiguous(), scale[..., part]
        )
        metric = _metric(family, natural)
        basis = torch.linalg.cholesky(metric.mean((0, 1)))
        inner = torch.linalg.solve_triangular(
            torch.linalg.cholesky(metric), basis.expand_as(metric), upper=False
        )
        naturals.append((basis.mT @ natural.unsqueeze(-1)).flatten(-3))
        inverses.extend((inner.mT @ inner).unbind(-3))
        at += family.n
    return torch.cat(naturals, -1), _block_diagonal(inverses)


def _metric(family: Family, natural: Tensor) -> Tensor:
    """Covariance of the statistics, the derivative of their mean: (..., component, statistic, statistic)."""
    with torch.enable_grad():
        natural = natural.detach().requires_grad_()
        means = family.mean_statistics(natural).sum((*range(natural.dim() - 2), -2))
        rows = [torch.autograd.grad(one, natural, retain_graph=True)[0] for one in means]
    metric = torch.stack(rows, -2)
    return 0.5 * (metric + metric.mT)


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    size = sum(block.shape[-1] for block in blocks)
    whole, at = blocks[0].new_zeros(*blocks[0].shape[:-2], size, size), 0
    for block in blocks:
        end = at + block.shape[-1]
        whole[..., at:end, at:end], at = block, end
    return whole


def _shares(direction: Tensor) -> Tensor:
    return direction.square() / direction.square().sum()


def judge_variability(found: Variability) -> list[Check]:
    """Two checks: the latents' means, against noise; all natural parameters, in nats of the whole training set."""
    return [_judge_means(found), _judge_all(found)]


def too_few(terms: int, tasks: int) -> list[Check]:
    """What there is to say without looking, where there are fewer systems than the theorem counts."""
    threshold, why = Threshold(terms, terms), f"n·k + 1 = {terms + 1} different systems are needed"
    return [
        Check(
            name,
            "fails",
            float(tasks),
            (float(tasks), float(tasks)),
            threshold,
            why,
            "Record more systems.",
        )
        for name in NAMES
    ]


def _judge_means(found: Variability) -> Check:
    ratio, who = float(found.locations[0]), culprits(found.latents, found.location_weights)
    if float(found.nats[-1]) < ROUNDING:
        why, remedy = (
            "the prior doesn't look at the support",
            "Use a SupportPrior: it is what the theorem rests on.",
        )
    else:
        others = "another shot" if found.shots == 1 else f"{found.shots} other shots"
        why = f"weakest direction: {who}, against what {others} of the same system change{'s' * (found.shots == 1)}"
        shots = math.ceil(found.shots * LOCATIONS.holds / max(ratio, 1e-12))
        remedy = f"Record systems that differ more in {who}" + (
            f", or {shots} shots for each support."
            if found.shots < shots <= 16 * found.shots
            else "."
        )
    return judged(NAMES[0], ratio, found.location_interval, LOCATIONS, why, remedy)


def _judge_all(found: Variability) -> Check:
    low, high = found.nats_interval
    moving = int((found.tasks * found.nats > 1.0).sum())
    why = (
        f"nats in {found.tasks} systems for the weakest of {len(found.terms)} directions, "
        f"{culprits(found.terms, found.nats_weights)}; {moving} "
        f"direction{' has' if moving == 1 else 's have'} more than one"
    )
    remedy = (
        f"{math.floor(NATS / low) + 1} systems like these would do."
        if low > FAINT
        else "Let supports differ in how much they say (initial states, lengths), or let the family have only the "
        "statistics that vary."
    )
    threshold = Threshold(NATS, min(1.0, FAINT * found.tasks))
    return judged(
        NAMES[1],
        found.tasks * float(found.nats[0]),
        (found.tasks * low, found.tasks * high),
        threshold,
        why,
        remedy,
    )


def culprits(names: list[str], weights: Tensor, least: float = 0.15) -> str:
    """The names that make up most of a direction, with their shares where there are several."""
    order = [int(i) for i in weights.argsort(descending=True) if weights[i] >= least] or [
        int(weights.argmax())
    ]
    return ", ".join(
        names[i] if weights[i] > 0.9 else f"{names[i]} ({weights[i]:.0%})" for i in order
    )
