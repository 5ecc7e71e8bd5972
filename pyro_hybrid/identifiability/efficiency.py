"""How near estimates come to what is possible: their error against the Cramér-Rao bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import require
from pyro_hybrid.evidence.gauss_newton import Program, information
from pyro_hybrid.identifiability.check import Check, Interval, Threshold, judged, unchecked
from pyro_hybrid.identifiability.fisher import posed
from pyro_hybrid.identifiability.task_beliefs import Reading, names_of

__all__ = ["Efficiency", "efficiency", "judge_efficiency"]

RATIO = Threshold(holds=4.0, fails=10.0, larger=False)
RESAMPLES, FOLDS = 200, 5
BLIND = 1e-2  # a direction that moves observations by less, in noises, has no bound worth the name


class Efficiency(NamedTuple):
    """Mean squared errors and the smallest that unbiased estimates from the same support could have.

    Attributes:
        names: of the latents, or of the true ones.
        against: ``halves`` where errors come from two supports of each task, ``truth`` where they are known.
        error, bound: mean squared error and mean bound, by name.
        ratios: of the two, resampled over tasks, ``(resample, name)``.
    """

    names: list[str]
    against: Literal["halves", "truth"]
    error: Tensor
    bound: Tensor
    ratios: Tensor


@torch.no_grad()
def efficiency(
    program: Program,
    tasks: Tasks,
    reading: Reading,
    *,
    truth: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Efficiency:
    r"""Errors of what is read from supports, in units of the Cramér-Rao bound.

    .. math:: \operatorname{E} (\hat z_i - z_i)^2 \;\ge\; \operatorname{E} \bigl[(J^\top W J)^{-1}\bigr]_{ii}

    The bound is the program's own, linearised where the support's estimate is. Without truth, half the mean squared
    difference of two supports' estimates stands for the error: what both have in common isn't seen. With truth, the
    error is what a linear map to it leaves, fitted on other tasks, and the bound is mapped along.

    Arguments:
        program: the model.
        tasks: the tasks of the reading, in its order.
        reading: natural parameters from two supports or more of each task.
        truth: the true latents by name, ``(task, component)``, where they are known.
        seed: of the resampling.
    """
    mean = reading.coordinates()[0]
    require(
        truth is not None or len(mean) > 1,
        "two supports or more of each task, or the truth",
        "one support",
        "Read smaller supports: read(..., shots=...).",
    )
    support = tasks.shots(slice(0, reading.shots))
    problem = posed(program, Episode(support, support), reading, mean[0])
    fisher, spread = information(problem, mean[0]), reading.spread()[1]
    inverse = torch.linalg.pinv(fisher, hermitian=True)
    blind = torch.linalg.eigvalsh(fisher * spread * spread.unsqueeze(-1))[:, 0] < BLIND**2
    if truth is None:
        names, error, bound = (
            reading.names,
            0.5 * (mean[0] - mean[1]).square(),
            inverse.diagonal(dim1=-2, dim2=-1),
        )
    else:
        names = names_of({name: value.shape[-1] for name, value in truth.items()})
        step = 1e-5 * spread
        slope = (reading.constrained(mean[0] + step) - reading.constrained(mean[0] - step)) / (
            2.0 * step
        )
        error, map_ = _linear(
            reading.constrained(mean[0]),
            torch.cat([value.double() for value in truth.values()], -1),
        )
        inverse = slope.unsqueeze(-1) * inverse * slope.unsqueeze(-2)
        bound = torch.einsum("ia,tij,ja->ta", map_, inverse, map_)
    bound = bound.masked_fill(blind.unsqueeze(-1), torch.inf)
    rows = torch.randint(
        len(error), (RESAMPLES, len(error)), generator=torch.Generator().manual_seed(seed)
    )
    return Efficiency(
        names,
        "halves" if truth is None else "truth",
        error.mean(0),
        bound.mean(0),
        error[rows].mean(1) / bound[rows].mean(1),
    )


def _linear(z: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors of the truth regressed on z, each fold's by a map of the others; and the map of all of them."""
    centre, scale = z.mean(0), z.std(0).clamp(min=1e-300)
    design = torch.cat([(z - centre) / scale, torch.ones_like(z[:, :1])], -1)
    fold, error = torch.arange(len(z)) % FOLDS, torch.empty_like(truth)
    for k in range(FOLDS):
        found = torch.linalg.lstsq(design[fold != k], truth[fold != k], driver="gelsd").solution
        error[fold == k] = (truth[fold == k] - design[fold == k] @ found).square()
    found = torch.linalg.lstsq(design, truth, driver="gelsd").solution
    return error, found[:-1] / scale.unsqueeze(-1)


def judge_efficiency(found: Efficiency) -> Check:
    """The latent whose error is the largest multiple of its bound."""
    if not torch.isfinite(found.bound).all():
        return unchecked(
            "efficiency",
            "in some systems a direction of the latents isn't seen at all",
            "See (ii).",
        )
    ratio = found.error / found.bound
    worst = int(ratio.argmax())
    low, high = (
        found.ratios[:, worst].quantile(torch.tensor([0.025, 0.975], dtype=ratio.dtype)).tolist()
    )
    interval: Interval = (low, high)
    why = (
        "mean squared error over Cramér-Rao bound, "
        + ", ".join(
            f"{name} {value:.3g}" for name, value in zip(found.names, ratio.tolist(), strict=True)
        )
        + (
            " (after a linear map to the truth)"
            if found.against == "truth"
            else " (between halves of a task)"
        )
    )
    return judged(
        "efficiency",
        float(ratio[worst]),
        interval,
        RATIO,
        why,
        "Read supports with evidence=ph.Linearised(...), with restarts for tasks in a wrong optimum; "
        "what remains is the neural term's own error.",
    )
