"""The noise of a program as what its predictions leave unexplained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_hybrid.errors import fail, require
from pyro_hybrid.evidence.least_squares import Iterate, LeastSquares
from pyro_hybrid.programs.module import HybridModel
from pyro_hybrid.programs.run import run_at

__all__ = ["UnexplainedNoise", "assign", "set_noise"]


class UnexplainedNoise:
    """Variances of the observations by sensor, of the last few batches: squared errors over degrees of freedom."""

    def __init__(self) -> None:
        self.squares = torch.zeros(())
        self.freedom = torch.zeros(())

    def after(self, problem: LeastSquares, iterate: Iterate, kept: Tensor) -> Tensor:
        """Standard deviations with one more batch."""
        values = problem.values(iterate.task[None], iterate.shot[None])
        observations = run_at(problem.program, problem.episode, values).observations
        require(
            len(observations) == 1,
            "a program with one observed site",
            f"{len(observations)} of them",
            "Pass noise=None.",
        )
        site = observations[0]
        error = site.value - site.mean  # (1, task, shot, time, sensor)
        counts = site.mask.expand_as(error)[0][kept].double()
        error = error[0][kept].double()
        num_values = counts.sum()
        freedom = 1.0 - self._num_fitted(problem, iterate, kept) / num_values
        self.squares = 0.5 * self.squares + (counts * error.square()).sum((0, 1, 2))
        self.freedom = 0.5 * self.freedom + counts.sum((0, 1, 2)) * freedom
        return (self.squares / self.freedom).sqrt()

    def _num_fitted(self, problem: LeastSquares, iterate: Iterate, kept: Tensor) -> Tensor:
        """Number of values that were used up by the latents of tasks and shots."""
        by_task = torch.as_tensor(problem.d * int(kept.sum()), dtype=torch.float64)
        if not problem.m:
            return by_task
        slopes = problem.jacobian(iterate.task, iterate.shot)[1][kept].double()[:, :, problem.d :]
        gram = slopes @ slopes.mT
        weight = torch.diag_embed(problem.shot_precision[kept])
        by_shot: Tensor = torch.linalg.solve(gram + weight, gram).diagonal(dim1=-2, dim2=-1).sum()
        return by_task + by_shot


def set_noise(model: HybridModel, name: str, deviations: Tensor) -> None:
    """Set the attribute that holds the standard deviation of all sensors, or of each."""
    old = getattr(model, name, None)
    if not isinstance(old, Tensor) or old.numel() not in (1, len(deviations)):
        fail(
            f"{name!r}, a standard deviation of {len(deviations)} sensors, or of all",
            getattr(old, "shape", type(old).__name__),
            "Pass the attribute's name, or noise=None.",
        )
    new = deviations if old.numel() == len(deviations) else deviations.square().mean().sqrt()
    new = new.reshape(old.shape).to(old)
    is_usable = new > 0.0  # False where it isn't a number
    assign(model, name, torch.where(is_usable, new, old))


@torch.no_grad()
def assign(model: HybridModel, name: str, value: Tensor) -> None:
    """Set an attribute of a model to a value, be it a parameter of torch or of Pyro."""
    old = getattr(model, name)
    if isinstance(old, nn.Parameter):
        old.copy_(value)
    else:
        setattr(model, name, value)
