"""meta_train -> Fit: the one loop, around ph.SVI."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import require
from pyro_hybrid.nets.encoders import SetEncoder
from pyro_hybrid.training.checkpoint import Checkpoints, Fit, digest
from pyro_hybrid.training.loop import Length, Loop, Plan, TrainingError
from pyro_hybrid.training.svi import SVI

__all__ = ["TrainingError", "meta_train"]


def meta_train(
    model: nn.Module,
    guide: nn.Module,
    tasks: Tasks,
    *,
    steps: int = 1000,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    curriculum: Mapping[float, Length] | None = None,
    segments: int | None = None,
    warmup: float = 0.0,
    clip: float = 4.0,
    average: float = 0.0,
    held_out: Tasks | None = None,
    every: int = 100,
    patience: int | None = None,
    loss: Any = None,
    max_skips: int = 20,
    checkpoint: str | os.PathLike[str] | None = None,
    keep: int = 2,
    resume: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
    callback: Callable[[int, Fit], None] | None = None,
) -> Fit:
    """Train model and guide over many tasks; same seed, same result.

    Arguments:
        model, guide: a Pyro program and its guide, changed in place.
        tasks: the data set. Who is support and who query is drawn anew at every step.
        steps, batch_size: number of gradient steps, and tasks in each.
        learning_rate: its peak; it rises over the first 5% of the steps and then follows a cosine down to a fiftieth.
        seed: of batches and samples. The global random state is left as it was.
        curriculum: ``{fraction of the steps: length}``: from there on, trajectories are cut into segments of so many
            steps (None: not cut); of ``(length, horizon)``, only their first ``horizon`` steps are used. Default:
            segments of a seventh, then of two sevenths, then the whole.
        segments: look at so many segments of each query shot at a step, drawn anew, instead of at all of them. Their
            likelihood is scaled up, so that the loss stays right on average: steps that cost less and inform nearly as
            well, since the segments of a shot share its task's latents. Not with computed evidence in the guide.
        warmup: fraction of the steps over which the KL's weight rises from 0 to 1.
        clip: gradients longer than so many times their running mean are shortened.
        average: the parameters' mean over so large a last fraction of the steps is what remains; it damps the noise of
            directions that the data determine weakly. 0 for the last step's.
        held_out: tasks on which the ELBO is looked at.
        every: look at the held-out tasks, and write a checkpoint, every so many steps.
        patience: stop, and go back to the best state, after so many looks without improvement.
        loss: a Pyro ELBO; default ``TraceMeanField_ELBO()``.
        max_skips: so many non-finite steps in a row end the training, back at the last good state.
        checkpoint: a folder for checkpoints. Ctrl-C, or a cluster's SIGTERM, then writes one before the training ends.
        keep: so many of the last checkpoints are kept, and the one that did best on the held-out tasks.
        resume: go on from the last checkpoint in the folder, if there is one, as if nothing had happened: with the same
            arguments and number of threads, parameters come out bit for bit the same.
        device: where to train.
        progress: show a progress bar.
        callback: called with the step's number and the fit so far.
    """
    require(
        len(tasks) > 0 and steps >= 1 and batch_size >= 1,
        "steps, batch_size and tasks of 1 or more",
        f"{steps}, {batch_size}, {len(tasks)}",
        "Check the arguments.",
    )
    require(
        patience is None or held_out is not None,
        "held_out tasks for early stopping",
        "none",
        "Pass held_out=tasks, or patience=None.",
    )
    require(
        segments is None or segments >= 1 and getattr(guide, "evidence", None) is None,
        "segments of 1 or more, and a guide that reads by its encoder",
        f"{segments} and {type(guide).__name__}",
        "Leave segments=None: computed evidence needs all that was observed.",
    )
    require(
        checkpoint is not None or not resume,
        "a folder to resume from",
        "none",
        "Pass checkpoint=folder.",
    )
    require(
        keep >= 1 and every >= 1,
        "keep and every of 1 or more",
        f"{keep} and {every}",
        "Check the arguments.",
    )
    device = torch.device(device) if device is not None else tasks.values.device
    model.to(device), guide.to(device)
    plan = _plan(curriculum, tasks)
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "curriculum": list(plan.items()),
        "segments": segments,
        "warmup": warmup,
        "clip": clip,
        "average": average,
        "every": every,
        "patience": patience,
        "max_skips": max_skips,
        "loss": type(loss).__name__,
        "tasks": digest(tasks),
        "held_out": digest(held_out),
    }
    folder = None if checkpoint is None else Checkpoints(Path(checkpoint), settings, keep)
    stored = folder.begin(resume) if folder else None
    _standardise(model, guide, tasks)
    svi = SVI(model, guide, _adam(model, guide, learning_rate, device), loss)
    return Loop(
        svi,
        tasks,
        steps,
        batch_size,
        learning_rate,
        seed,
        plan,
        segments,
        warmup,
        clip,
        average,
        held_out,
        every,
        patience,
        max_skips,
        device,
        callback,
        folder,
    ).run(progress, stored)


def _adam(
    model: nn.Module, guide: nn.Module, learning_rate: float, device: torch.device
) -> torch.optim.Adam:
    parameters = {id(p): p for p in (*model.parameters(), *guide.parameters())}
    fused = device.type in ("cpu", "cuda")
    return torch.optim.Adam(parameters.values(), lr=learning_rate, betas=(0.9, 0.99), fused=fused)


def _standardise(model: nn.Module, guide: nn.Module, tasks: Tasks) -> None:
    for module in {*model.modules(), *guide.modules()}:
        if isinstance(module, SetEncoder):
            module.standardise(tasks.values.to(module.centre.device), tasks.observed)


def _plan(curriculum: Mapping[float, Length] | None, tasks: Tasks) -> Plan:
    if curriculum is not None:
        require(
            0.0 in curriculum,
            "a curriculum that says what to do from 0.0 on",
            dict(curriculum),
            "Add {0.0: ...}.",
        )
        return dict(sorted(curriculum.items()))
    last = len(tasks.times) - 1
    if tasks.states is None or last < 14:
        return {0.0: None}
    return {0.0: last // 7, 0.25: 2 * last // 7, 0.5: None}
