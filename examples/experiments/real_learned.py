"""Training on the real double pendulum: tasks by different clocks, the hybrid model, and the classical models."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import fail
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.fitting.posterior import Posterior
from pyro_hybrid.fitting.stages import compute_evidence
from pyro_hybrid.models import MetaHybridVAE
from pyro_hybrid.nets.residual import Residual
from pyro_hybrid.systems import RecordedDoublePendulum, Recordings
from pyro_hybrid.systems.compound_pendulum import compound, fitted, point_mass
from pyro_hybrid.training.fit import Fit
from pyro_hybrid.training.meta_train import meta_train
from pyro_hybrid.training.schedule import Ramp

__all__ = [
    "FAST",
    "SUPPORT",
    "Mask",
    "Rivals",
    "Settings",
    "cut_tasks",
    "fit_rivals",
    "restrict_latents_to_damping",
    "train",
]

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


def cut_tasks(
    recordings: Recordings, num_tasks: int, num_windows: int, seed: int, *, points: int = 50
) -> Tasks:
    """Cut tasks whose true latents have the model's names: gravity in units of the real one, and s for the unknown."""
    tasks = recordings.tasks(
        num_tasks,
        num_windows,
        seed,
        step=0.01,
        points=points,
        num_support=min(SUPPORT, num_windows // 2),
    )
    if tasks.true_latents is None:
        fail("recordings with a known clock", "none", "Cut them with Recordings.tasks.")
    latents = {**tasks.true_latents, "unknown": tasks.true_latents["scale"]}
    return replace(tasks, true_latents=latents)


def fit_rivals(recordings: Recordings, settings: Settings) -> Rivals:
    """Fit the classical models to windows of 0.2 s, by the true clock."""
    windows = recordings.tasks(1, settings.windows, 0, step=0.005, points=41, scale=(1.0, 1.0))
    return Rivals(fitted(compound, windows), fitted(point_mass, windows))


def train(
    recordings: Recordings, rivals: Rivals, seed: int, settings: Settings, progress: bool = False
) -> tuple[Posterior, Fit]:
    """Train the hybrid model, with the lower mass's share of the point masses that fit best."""
    torch.manual_seed(seed)
    share = float(rivals.point_mass[1])
    model = MetaHybridVAE(RecordedDoublePendulum(share), GaussNewton(1, segments=(7, 7)), noise=1.0)
    query = GaussNewton(1)
    guide = model.guide(query)
    restrict_latents_to_damping(model.residual)
    fit = meta_train(
        model,
        guide,
        cut_tasks(recordings, settings.tasks, settings.shots, seed),
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
    support = GaussNewton(3, segments=(7, 7))
    return compute_evidence(Posterior(model, guide), support, query), fit


class Mask(nn.Module):
    """A parametrization that holds some entries of a weight at zero."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Set the entries to zero."""
        return weight * self.mask


def restrict_latents_to_damping(residual: Residual) -> None:
    """Let latents change the rates of damping alone, in place.

    In units of gravity's torque, other torques are the same by any clock.
    """
    is_free = torch.ones(residual.latents + 1, residual.outputs)
    is_free[1:, :2] = 0.0
    rows = is_free.flatten()
    register_parametrization(residual.last, "weight", Mask(rows.unsqueeze(-1)))
    register_parametrization(residual.last, "bias", Mask(rows))
    register_parametrization(residual, "straight", Mask(rows.unsqueeze(-1)))
