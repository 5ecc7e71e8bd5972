"""Compare the errors of estimates with the Cramér-Rao bound, the smallest that is possible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import require
from pyro_hybrid.evidence.least_squares import fisher_information
from pyro_hybrid.identifiability.fisher import least_squares_at
from pyro_hybrid.identifiability.task_beliefs import TaskBeliefs, latent_names
from pyro_hybrid.programs.run import Program
from pyro_hybrid.scores.check import Check, Threshold

__all__ = ["RATIO", "Efficiency", "judge_efficiency", "measure_efficiency"]

RATIO = Threshold(holds=4.0, fails=10.0, larger=False)
RESAMPLES = 200
FOLDS = 5
UNSEEN = (
    1e-2  # noise sds by which observations must move: less in a direction gives it no useful bound
)


class Efficiency(NamedTuple):
    """Mean squared errors, and the smallest that unbiased estimates from the same support could have.

    Attributes:
        names: of the latents, or of the true ones.
        against: ``halves`` where errors come from two supports of each task, ``truth`` where they are known.
        error: mean squared error, by name.
        bound: mean bound, by name; infinite where a direction is not seen.
        ratios: of the two, resampled over tasks, ``(resample, name)``.
    """

    names: list[str]
    against: Literal["halves", "truth"]
    error: Tensor
    bound: Tensor
    ratios: Tensor


@torch.no_grad()
def measure_efficiency(
    program: Program,
    tasks: Tasks,
    beliefs: TaskBeliefs,
    *,
    true_latents: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Efficiency:
    r"""Measure errors of estimates from supports, in units of the Cramér-Rao bound.

    .. math:: \operatorname{E} (\hat z_i - z_i)^2 \;\ge\; \operatorname{E} \bigl[(J^\top W J)^{-1}\bigr]_{ii}

    The bound is the program's own, linearized at the support's estimate. Without true latents, half the mean squared
    difference of two supports' estimates stands for the error: an error that both have in common is not seen. With
    true latents, the error is the rest after a linear map to them, fitted on other tasks, and the bound is mapped
    along.

    Arguments:
        program: the model.
        tasks: the tasks of the beliefs, in their order.
        beliefs: natural parameters from two supports or more of each task.
        true_latents: by name, ``(task, component)``, where they are known.
        seed: of the resampling.
    """
    mean = beliefs.mean
    require(
        true_latents is not None or len(mean) > 1,
        "two supports or more of each task, or the true latents",
        "one support",
        "Infer tasks from smaller supports: infer_tasks(..., num_support=...).",
    )
    support = tasks.shots(slice(0, beliefs.num_support))
    problem = least_squares_at(program, Episode(support, support), beliefs, mean[0])
    fisher = fisher_information(problem, mean[0])
    covariance = torch.linalg.pinv(fisher, hermitian=True)
    if true_latents is None:
        names = beliefs.names
        error = 0.5 * (mean[0] - mean[1]).square()
        bound = covariance.diagonal(dim1=-2, dim2=-1)
    else:
        names = latent_names({name: value.shape[-1] for name, value in true_latents.items()})
        target = torch.cat([value.double() for value in true_latents.values()], -1)
        error, linear_map = _regress(beliefs.constrained(mean[0]), target)
        to_target = linear_map * _constrained_slope(beliefs, mean[0]).unsqueeze(-1)
        bound = torch.einsum("tia,tij,tja->ta", to_target, covariance, to_target)
    bound = bound.masked_fill(_is_unseen(fisher, beliefs.population_sd).unsqueeze(-1), torch.inf)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(error), (RESAMPLES, len(error)), generator=generator)
    return Efficiency(
        names=names,
        against="halves" if true_latents is None else "truth",
        error=error.mean(0),
        bound=bound.mean(0),
        ratios=error[rows].mean(1) / bound[rows].mean(1),
    )


def _is_unseen(fisher: Tensor, sd: Tensor) -> Tensor:
    """Return True for tasks in which a direction of the latents hardly moves the observations."""
    scaled = fisher * sd * sd.unsqueeze(-1)
    smallest: Tensor = torch.linalg.eigvalsh(scaled)[:, 0]
    return smallest < UNSEEN**2


def _constrained_slope(beliefs: TaskBeliefs, u: Tensor) -> Tensor:
    """Return the derivative of each latent with respect to its unconstrained coordinate."""
    step = 1e-5 * beliefs.population_sd
    difference = beliefs.constrained(u + step) - beliefs.constrained(u - step)
    return difference / (2.0 * step)


def _regress(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Regress a target on z: squared errors, each fold's by a map of the others; and the map of all tasks."""
    center = z.mean(0)
    scale = z.std(0).clamp(min=1e-300)
    design = torch.cat([(z - center) / scale, torch.ones_like(z[:, :1])], -1)
    folds = torch.arange(len(z)) % FOLDS
    error = torch.empty_like(target)
    for fold in range(FOLDS):
        held_out = folds == fold
        coefficients = _solve(design[~held_out], target[~held_out])
        error[held_out] = (target[held_out] - design[held_out] @ coefficients).square()
    return error, _solve(design, target)[:-1] / scale.unsqueeze(-1)


def _solve(design: Tensor, target: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.lstsq(design, target, driver="gelsd").solution
    return solution


def judge_efficiency(efficiency: Efficiency) -> Check:
    """Judge the latent whose error is the largest multiple of its bound.

    Arguments:
        efficiency: result of :func:`measure_efficiency`.
    """
    if not torch.isfinite(efficiency.bound).all():
        return Check.skipped(
            "efficiency",
            "In some systems the observations say nothing about a direction of the latents.",
            "See (ii).",
        )
    ratio = efficiency.error / efficiency.bound
    worst = int(ratio.argmax())
    quantiles = torch.tensor([0.025, 0.975], dtype=ratio.dtype)
    low, high = efficiency.ratios[:, worst].quantile(quantiles).tolist()
    pairs = zip(efficiency.names, ratio.tolist(), strict=True)
    by_name = ", ".join(f"`{name}` {value:.3g}" for name, value in pairs)
    if efficiency.against == "truth":
        source = "after a linear map to the truth"
    else:
        source = "from the difference of two halves of each task"
    return Check.from_interval(
        "efficiency",
        float(ratio[worst]),
        (low, high),
        RATIO,
        f"Mean squared error in units of the Cramér-Rao bound, the smallest possible: {by_name} ({source}).",
        "Call ph.compute_evidence(posterior, ph.GaussNewton(8, num_restarts=4)), for tasks in a wrong optimum, and "
        "ph.fix_gauge for physics latents whose work the neural term does; the rest is the neural term's own error.",
    )
