"""Settings of three systems and six models. The numbers were chosen on seed 100, which no table shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.systems import AdvectionDiffusion, DoublePendulum, Pendulum, System
from pyro_hybrid.training.refinement import Refinement
from pyro_hybrid.training.schedule import Length

__all__ = ["CASES", "MODELS", "ONE_BY_ONE", "OURS", "UNCONDITIONAL", "Case", "Setting"]

OURS = "MetaHybridVAE"
UNCONDITIONAL = "MetaHybridVAE, unconditional prior"
ONE_BY_ONE = ("HybridVAE", "APHYNITY")  # as published, these read one trajectory at a time
MODELS = (OURS, UNCONDITIONAL, "HybridVAE", "HybridVAE, sets", "APHYNITY", "APHYNITY, sets")


class Setting(NamedTuple):
    """Settings of the training of one kind of model on one system.

    Attributes:
        options: arguments of the model.
        num_steps, batch_size, learning_rate, curriculum, average_last, segments_per_shot: arguments of
            ``ph.meta_train``.
        correction: the last value of the projection penalty's weight, which grows with the square of time.
        evidence: evidence that is computed for support and query while training; None for encoders alone.
        refinement: settings of the second-order end of the training, or None for a training without it.
    """

    options: Mapping[str, Any]
    num_steps: int
    batch_size: int
    learning_rate: float
    curriculum: Mapping[float, Length]
    average_last: float = 0.2
    segments_per_shot: int | None = None
    correction: float = 0.0
    evidence: tuple[GaussNewton, GaussNewton] | None = None
    refinement: Refinement | None = None


class Case(NamedTuple):
    """Settings of one system.

    Attributes:
        system: builds the system.
        tasks: number of training tasks.
        ours, vae, aphynity: how each kind of model is trained.
        final: evidence that is computed for a support after the training.
        query: evidence that is computed for a query after the training.
    """

    system: Callable[[], System]
    tasks: int
    ours: Setting
    vae: Setting
    aphynity: Setting
    final: GaussNewton
    query: GaussNewton

    def setting(self, model: str) -> Setting:
        """Return the training settings of a model."""
        if model.startswith("HybridVAE"):
            return self.vae
        if "APHYNITY" in model:
            return self.aphynity
        return self.ours


CASES = {
    "pendulum": Case(
        Pendulum,
        1000,
        ours=Setting(
            {"linear": False, "straightness": 0.3, "noise": 10.0},
            3000,
            48,
            3e-3,
            {0.0: 1},
            segments_per_shot=8,
            correction=30.0,
            refinement=Refinement(
                num_steps=24,
                batch_size=32,
                prior_sd=0.02,
                evidence=GaussNewton(2, segments=(2, 2, 7)),
                forgetting=0.05,
            ),
        ),
        vae=Setting({"latents": 4, "noise": 10.0}, 1500, 48, 3e-3, {0.0: 1}, segments_per_shot=8),
        aphynity=Setting(
            {"latents": 4, "linear": False, "noise": 10.0, "growth": 100.0},
            3000,
            48,
            3e-3,
            {0.0: 1},
            segments_per_shot=8,
        ),
        final=GaussNewton(3, segments=(2, 2, 2, 7), num_restarts=4),
        query=GaussNewton(2),
    ),
    "double pendulum": Case(
        DoublePendulum,
        1000,
        ours=Setting(
            {},
            900,
            16,
            8e-3,
            {0.0: 7, 0.4: 14},
            0.3,
            correction=1000.0,
            evidence=(GaussNewton(1, segments=(7, 7)), GaussNewton(1)),
            refinement=Refinement(
                num_steps=6, batch_size=32, prior_sd=0.1, evidence=GaussNewton(2, segments=(7, 7))
            ),
        ),
        vae=Setting(
            {"linear": True, "noise": 10.0}, 1500, 48, 3e-3, {0.0: 1, 0.5: 7}, segments_per_shot=8
        ),
        aphynity=Setting(
            {"noise": 10.0, "growth": 100.0}, 3000, 48, 3e-3, {0.0: 1, 0.5: 7}, segments_per_shot=8
        ),
        final=GaussNewton(3, segments=(7, 7)),
        query=GaussNewton(2),
    ),
    "rod": Case(
        AdvectionDiffusion,
        300,
        ours=Setting(
            {"noise": 10.0},
            1500,
            16,
            3e-3,
            {0.0: 7},
            segments_per_shot=8,
            correction=1e5,
            refinement=Refinement(
                num_steps=6, batch_size=16, prior_sd=0.1, evidence=GaussNewton(2, segments=(7,))
            ),
        ),
        vae=Setting({"linear": True, "noise": 10.0}, 1000, 16, 3e-3, {0.0: 7}, segments_per_shot=8),
        aphynity=Setting(
            {"noise": 10.0, "growth": 100.0}, 2000, 16, 3e-3, {0.0: 7}, segments_per_shot=8
        ),
        final=GaussNewton(2, segments=(7,)),
        query=GaussNewton(1),
    ),
}
