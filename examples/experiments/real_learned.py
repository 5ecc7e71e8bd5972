"""Training on the real double pendulum: tasks by different clocks, the hybrid model, and the classical models."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.models import MetaHybridVAE
from pyro_hybrid.nets.residual import Residual
from pyro_hybrid.systems import RecordedDoublePendulum, Recordings
from pyro_hybrid.systems.compound_pendulum import compound, fitted, point_mass
from pyro_hybrid.training.fit import Fit
from pyro_hybrid.training.meta_train import meta_train
from pyro_hybrid.training.schedule import Ramp

__all__ = ["FAST", "SUPPORT", "Rivals", "Settings", "rivals", "tasks", "trained"]

SUPPORT = 4


class Settings(NamedTuple):
    """Sizes of the experiment.

    Attributes:
        tasks, shots: number of tasks to learn from, and of windows in each.
        steps, batch: number of training steps, and of tasks in each.
        judged, queries: number of tasks to judge on, and of windows in each beside its support.
        windows: number of windows that the rivals are fitted to.
        resamples: number of resamples of the windows, for the intervals.
    """

    tasks: int = 800
    shots: int = 8
    steps: int = 500
    batch: int = 8
    judged: int = 60
    queries: int = 12
    windows: int = 400
    resamples: int = 400


FAST = Settings(tasks=8, shots=4, steps=4, batch=4, judged=14, queries=4, windows=30, resamples=20)


class Rivals(NamedTuple):
    """Parameters of the classical models."""

    compound: Tensor
    point_mass: Tensor


def tasks(recordings: Recordings, number: int, shots: int, seed: int, *, points: int = 50) -> Tasks:
    """Cut tasks whose truth has the model's names: gravity in units of the real one, and s for the unknown."""
    made = recordings.tasks(
        number, shots, seed, step=0.01, points=points, num_support=min(SUPPORT, shots // 2)
    )
    known = made.true_latents
    assert known is not None
    return replace(made, true_latents={**known, "unknown": known["scale"]})


def rivals(recordings: Recordings, settings: Settings) -> Rivals:
    """Fit the classical models to windows of 0.2 s, by the true clock."""
    windows = recordings.tasks(1, settings.windows, 0, step=0.005, points=41, scale=(1.0, 1.0))
    return Rivals(fitted(compound, windows), fitted(point_mass, windows))


def trained(
    recordings: Recordings, classical: Rivals, seed: int, settings: Settings, progress: bool = False
) -> tuple[MetaHybridVAE, AmortizedGuide, Fit]:
    """Train the hybrid model, with the lower mass's share of the point masses that fit best."""
    torch.manual_seed(seed)
    model = MetaHybridVAE(
        RecordedDoublePendulum(float(classical.point_mass[1])),
        GaussNewton(1, segments=(7, 7)),
        noise=1.0,
    )
    guide = model.guide(GaussNewton(1))
    _for_friction_alone(model.residual)

    fit = meta_train(
        model,
        guide,
        tasks(recordings, settings.tasks, settings.shots, seed),
        num_steps=settings.steps,
        batch_size=settings.batch,
        learning_rate=8e-3,
        seed=seed,
        curriculum={0.0: 5, 0.15: 10, 0.5: 16, 0.8: 24},
        average_last=0.3,
        progress=progress,
        # First learn what is unknown, then credit gravity with all that it can explain.
        penalty_weights={"projection": Ramp(30.0, power=2)},
    )
    model.prior.evidence = GaussNewton(3, segments=(7, 7))  # for the final answer
    return model, guide, fit


def _for_friction_alone(residual: Residual) -> None:
    """Let latents change the rates of damping alone: in units of gravity's, other torques are the same by any clock."""
    free = torch.ones(residual.latents + 1, residual.outputs)
    free[1:, :2] = 0.0
    for weight in (residual.last.weight, residual.last.bias, residual.straight):
        mask = free.flatten().view(-1, *[1] * (weight.dim() - 1))
        with torch.no_grad():
            weight.mul_(mask)
        weight.register_hook(mask.mul)
