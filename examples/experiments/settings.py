"""Settings of three systems and six models. The numbers were chosen on seed 100, which no table shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.systems import AdvectionDiffusion, DoublePendulum, Pendulum, System
from pyro_hybrid.training.schedule import Length

__all__ = ["CASES", "DEAF", "MODELS", "ONE_BY_ONE", "OURS", "Case", "Setting", "Sharpening"]

OURS, DEAF = "MetaHybridVAE", "MetaHybridVAE, unconditional prior"
ONE_BY_ONE = ("HybridVAE", "APHYNITY")  # as published, these read one trajectory at a time
MODELS = (OURS, DEAF, "HybridVAE", "HybridVAE, sets", "APHYNITY", "APHYNITY, sets")


class Sharpening(NamedTuple):
    """Settings of the second-order end of a training: the arguments of ``ph.sharpen``."""

    steps: int
    batch_size: int
    width: float
    reading: GaussNewton
    memory: float = 0.9
    misread: float = 10.0


class Setting(NamedTuple):
    """Settings of the training of one kind of model on one system.

    ``correction`` is the last value of a weight that grows with the square of time. ``evidence`` is computed for
    support and query while training; None trains the encoder alone.
    """

    options: Mapping[str, Any]
    steps: int
    batch_size: int
    learning_rate: float
    curriculum: Mapping[float, Length]
    average: float = 0.2
    segments: int | None = None
    correction: float = 0.0
    evidence: tuple[GaussNewton, GaussNewton] | None = None
    sharpening: Sharpening | None = None


class Case(NamedTuple):
    """Settings of one system: the number of training tasks, and the training of each model.

    After training, ``final`` computes the evidence of a support, and ``query`` that of a query.
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
        return (
            self.vae
            if model.startswith("HybridVAE")
            else self.aphynity
            if "APHYNITY" in model
            else self.ours
        )


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
            segments=8,
            correction=30.0,
            sharpening=Sharpening(24, 32, 0.02, GaussNewton(2, segments=(2, 2, 7)), 0.95),
        ),
        vae=Setting({"latents": 4, "noise": 10.0}, 1500, 48, 3e-3, {0.0: 1}, segments=8),
        aphynity=Setting(
            {"latents": 4, "linear": False, "noise": 10.0, "growth": 100.0},
            3000,
            48,
            3e-3,
            {0.0: 1},
            segments=8,
        ),
        final=GaussNewton(3, segments=(2, 2, 2, 7), restarts=4),
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
            sharpening=Sharpening(6, 32, 0.1, GaussNewton(2, segments=(7, 7))),
        ),
        vae=Setting({"linear": True, "noise": 10.0}, 1500, 48, 3e-3, {0.0: 1, 0.5: 7}, segments=8),
        aphynity=Setting(
            {"noise": 10.0, "growth": 100.0}, 3000, 48, 3e-3, {0.0: 1, 0.5: 7}, segments=8
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
            segments=8,
            correction=1e5,
            sharpening=Sharpening(6, 16, 0.1, GaussNewton(2, segments=(7,))),
        ),
        vae=Setting({"linear": True, "noise": 10.0}, 1000, 16, 3e-3, {0.0: 7}, segments=8),
        aphynity=Setting({"noise": 10.0, "growth": 100.0}, 2000, 16, 3e-3, {0.0: 7}, segments=8),
        final=GaussNewton(2, segments=(7,)),
        query=GaussNewton(1),
    ),
}
