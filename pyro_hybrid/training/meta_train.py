"""meta_train: train a program and its guide over many tasks."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyro_hybrid.data.tasks import Tasks, require_tasks
from pyro_hybrid.errors import require
from pyro_hybrid.evidence.encoder import Encoder
from pyro_hybrid.nets.encoders import SetEncoder
from pyro_hybrid.programs.module import one_thread, require_local
from pyro_hybrid.training.checkpoint import Checkpoints, Found
from pyro_hybrid.training.fit import Fit, fit_from_json
from pyro_hybrid.training.guards import DeferredSignals
from pyro_hybrid.training.loop import Loop, TrainingError
from pyro_hybrid.training.named_tensors import (
    adam,
    load_model_tensors,
)
from pyro_hybrid.training.schedule import (
    Curriculum,
    Length,
    PenaltyWeight,
    Schedule,
    curriculum_of,
    require_integer,
)
from pyro_hybrid.training.settings import Settings, identity, penalty_weights_of
from pyro_hybrid.training.state import LoopState
from pyro_hybrid.training.storage import REMEDY, CheckpointError
from pyro_hybrid.training.svi import SVI

__all__ = ["meta_train"]

_log = logging.getLogger(__name__)


def meta_train(
    model: nn.Module,
    guide: nn.Module,
    tasks: Tasks,
    *,
    num_steps: int = 1000,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    curriculum: Mapping[float, Length] | None = None,
    segments_per_shot: int | None = None,
    warmup: float = 0.0,
    penalty_weights: Mapping[str, PenaltyWeight] | None = None,
    clip: float = 4.0,
    average_last: float = 0.0,
    held_out: Tasks | None = None,
    eval_every: int = 100,
    patience: int | None = None,
    loss: Any = None,
    max_skips: int = 20,
    checkpoint: str | os.PathLike[str] | None = None,
    keep_last: int = 2,
    resume: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
    callback: Callable[[int, Fit], None] | None = None,
) -> Fit:
    """Train model and guide over many tasks. The same seed gives the same result.

    Run one training at a time in a process: the library isn't thread-safe, as Pyro isn't.

    Arguments:
        model, guide: a Pyro program and its guide, changed in place.
        tasks: the data set. Which shots are support and which are query is drawn anew at every step.
        num_steps, batch_size: number of gradient steps, and of tasks in each.
        learning_rate: peak of the learning rate, which rises over the first 5% of the steps, then follows a cosine down
            to a fiftieth.
        seed: seed of batches and samples. The global random state is left as it was.
        curriculum: ``{fraction of the steps: length}``. From that fraction on, trajectories are cut into segments of
            ``length`` intervals (None: not cut); of ``(length, horizon)``, only their first ``horizon`` intervals are
            used. Default: segments of a seventh of the trajectory, from 25% on of two sevenths, from 50% on the whole;
            always the whole if there are fewer than 15 times, or if states are not measured at all times.
        segments_per_shot: use this number of segments per query shot, drawn anew at every step, instead of all. Their
            likelihood is scaled up, so that the loss stays right on average. Steps cost less and inform nearly as well,
            since all segments of a task share its latents. The guide must not use computed evidence.
        warmup: fraction of the steps over which the weight of the KL divergence rises from 0 to 1.
        penalty_weights: weights of the model's penalties by name, numbers or functions of the progress such as
            ``{"projection": ph.Ramp(1000.0, power=2)}``. Default: those in ``model.penalty_weights``, to which the
            model returns after the training.
        clip: shorten gradients that are longer than this multiple of their running mean.
        average_last: average the parameters over this final fraction of the steps (0: off). An average damps the noise
            of directions that the data determine weakly.
        held_out: tasks on which the loss is evaluated, without training on them.
        eval_every: evaluate the held-out tasks and write a checkpoint each time this number of steps is done.
        patience: stop, and restore the best state, after this number of evaluations without improvement.
        loss: a Pyro ELBO; default ``TraceMeanField_ELBO()``.
        max_skips: stop after this number of consecutive non-finite steps, and restore the last good state.
        checkpoint: a folder for checkpoints. Ctrl-C, or a cluster's SIGTERM, then writes one before the training ends.
        keep_last: keep this number of the last checkpoints, and the one that did best on the held-out tasks.
        resume: go on from the last checkpoint in the folder, if there is one. With the same arguments and number of
            threads, parameters are the same bit for bit as those of a training that was never stopped.
        device: where to train.
        progress: show a progress bar.
        callback: called after each step with its number and the record so far. It is for observation: what it changes
            in the model isn't part of a checkpoint.
    """
    require_local(model=model, guide=guide)
    require_tasks(tasks)
    if held_out is not None:
        require_tasks(held_out, "held_out")
    require(len(tasks) > 0, "one task or more", "none", "Check the data set.")
    _require_trainable(guide, held_out, patience, segments_per_shot)
    schedule = Schedule(
        num_steps=num_steps,
        learning_rate=learning_rate,
        curriculum=_default_curriculum(tasks) if curriculum is None else curriculum_of(curriculum),
        warmup=warmup,
        average_last=average_last,
        penalty_weights=penalty_weights_of(model, penalty_weights),
    )
    settings = Settings(
        schedule=schedule,
        batch_size=batch_size,
        seed=seed,
        segments_per_shot=segments_per_shot,
        clip=clip,
        eval_every=eval_every,
        patience=patience,
        max_skips=max_skips,
    )
    description = identity(
        settings, model=model, guide=guide, loss=loss, tasks=tasks, held_out=held_out
    )
    checkpoints = _checkpoints(checkpoint, description, keep_last, resume)
    with one_thread(), DeferredSignals(checkpoints is not None) as signals:
        folder = checkpoints.opened(resume) if checkpoints else contextlib.nullcontext()
        with folder as found:
            if found and found.manifest.finished:
                fit = _finished_before(found, num_steps, model, guide)
            else:
                state = _resumed_state(found, model, guide, len(tasks))
                device = torch.device(tasks.values.device if device is None else device)
                svi = _prepared(model, guide, tasks, settings, loss, device)
                if state is not None:
                    state.restore(model, guide, svi.optimizer)
                fit = Loop(
                    svi=svi,
                    tasks=tasks,
                    held_out=held_out,
                    settings=settings,
                    state=state or LoopState.initial(model, guide, len(tasks)),
                    checkpoints=checkpoints,
                    callback=callback,
                    device=device,
                    progress=progress,
                ).run(signals)
        _end_on_signal(signals, fit, num_steps, checkpoints)
    return fit


def _checkpoints(
    folder: str | os.PathLike[str] | None, description: dict[str, Any], keep_last: int, resume: bool
) -> Checkpoints | None:
    require(
        folder is not None or not resume,
        "a folder to resume from",
        "none",
        "Pass checkpoint=folder.",
    )
    require_integer("keep_last", keep_last)
    return None if folder is None else Checkpoints(Path(folder), description, keep_last)


def _require_trainable(
    guide: nn.Module, held_out: Tasks | None, patience: int | None, segments_per_shot: int | None
) -> None:
    require(
        torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
        "gradients to train with",
        "a call inside torch.no_grad or torch.inference_mode",
        "Call meta_train outside of them.",
        RuntimeError,
    )
    require(
        patience is None or held_out is not None,
        "held_out tasks for early stopping",
        "none",
        "Pass held_out=tasks, or patience=None.",
    )
    evidence = getattr(guide, "evidence", None)
    require(
        segments_per_shot is None or evidence is None or isinstance(evidence, Encoder),
        "a guide that reads by its encoder, to look at some segments of a shot",
        f"{type(guide).__name__} with computed evidence, which needs all that was observed",
        "Leave segments_per_shot=None.",
    )


def _default_curriculum(tasks: Tasks) -> Curriculum:
    last = tasks.times.shape[-1] - 1
    if tasks.states is None or last < 14:
        return ((0.0, None),)
    return ((0.0, last // 7), (0.25, 2 * last // 7), (0.5, None))


def _finished_before(found: Found, num_steps: int, model: nn.Module, guide: nn.Module) -> Fit:
    """Load a training that is finished already."""
    fit = fit_from_json(found.stored.state.get("fit"), found.source)
    num_done = len(fit.loss)
    require(
        num_done == found.manifest.step and (fit.stopped_early or num_done == num_steps),
        f"{found.source} with all of its {num_steps} steps",
        f"{num_done} of them",
        REMEDY,
        CheckpointError,
    )
    load_model_tensors(model, guide, found.stored.weights, f"{found.source} to be a checkpoint")
    return fit


def _resumed_state(
    found: Found | None, model: nn.Module, guide: nn.Module, num_tasks: int
) -> LoopState | None:
    """Read and check the state to go on from; nothing is changed yet."""
    if found is None:
        return None
    return LoopState.from_stored(
        found.stored, found.source, model=model, guide=guide, num_tasks=num_tasks
    )


def _prepared(
    model: nn.Module,
    guide: nn.Module,
    tasks: Tasks,
    settings: Settings,
    loss: Any,
    device: torch.device,
) -> SVI:
    """Move model and guide to a device, standardize their encoders by the tasks, and give them an optimizer."""
    model.to(device)
    guide.to(device)
    for module in {*model.modules(), *guide.modules()}:
        if isinstance(module, SetEncoder):
            module.standardize(tasks.values.to(module.center.device), tasks.observed)
    optimizer = adam(model, guide, settings.schedule.learning_rate, device)
    return SVI(model, guide, optimizer, loss)


def _end_on_signal(
    signals: DeferredSignals, fit: Fit, num_steps: int, checkpoints: Checkpoints | None
) -> None:
    """Deliver a signal that came during the training, and refuse to return a part of one."""
    if signals.received is None or checkpoints is None:
        return
    num_done = len(fit.loss)
    if num_done < num_steps and not fit.stopped_early:
        _log.warning(
            "Stopped after step %d of %d, which is saved in %s. The same call with resume=True goes on from there.",
            num_done,
            num_steps,
            checkpoints.folder,
        )
    signals.deliver()
    if num_done < num_steps and not fit.stopped_early:
        raise TrainingError(
            f"expected {num_steps} steps; got {num_done} of them before {signal.Signals(signals.received).name}. "
            "Call meta_train again with resume=True."
        )
