"""Fit, the record of a training; saving it with the parameters, and loading both."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pyro_hybrid.errors import fail, require
from pyro_hybrid.training.json_values import from_json, to_json
from pyro_hybrid.training.named_tensors import (
    copied,
    load_model_tensors,
    model_tensors,
)
from pyro_hybrid.training.storage import REMEDY, CheckpointError, Stored, is_stored, read, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Fit", "class_names", "fit_from_json", "load", "step_folders"]


@dataclass
class Fit:
    """The record of a training: the history of every step, per task, and of every look at the held-out tasks.

    Attributes:
        loss, log_likelihood, kl: by step, per task; NaN for a step that was skipped.
        held_out: the step and the loss per task of every look at the held-out tasks.
        skipped: number of steps that weren't taken, because loss or gradient weren't finite.
        skipped_tasks: by task, the number of steps that left it out because its density wasn't finite.
        seconds, seconds_compiling: time of the training, and of the compiler in it.
        step_error: the ``typical`` one of :func:`~pyro_hybrid.step_error` on the last batch; NaN if there is none.
        stopped_early: whether early stopping ended the training.
    """

    loss: list[float] = field(default_factory=list)
    log_likelihood: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    skipped: int = 0
    skipped_tasks: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_compiling: float = 0.0
    step_error: float = 0.0
    stopped_early: bool = False

    def plot(self) -> Figure:
        """Plot the loss of every step."""
        from pyro_hybrid.training.plots import loss_figure

        return loss_figure(self.loss)

    def save(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        guide: nn.Module,
        *,
        overwrite: bool = False,
    ) -> None:
        """Write this record and the parameters into a folder of their own, for :func:`~pyro_hybrid.load`.

        Arguments:
            folder: a name that isn't taken. If it is, the training is saved beside it, and the error says where.
            model, guide: as they were trained.
            overwrite: replace what was saved in the folder before; never a folder of anything else.
        """
        path = Path(folder)
        content = Stored(
            copied(model_tensors(model, guide), to_cpu=True),
            {"fit": to_json(self)},
            {"step": len(self.loss), "finished": True, **class_names(model, guide)},
        )
        if not os.path.lexists(path) or (overwrite and is_stored(path)):
            write(path, content, overwrite=overwrite)
            return
        rescue = _free_name(path)
        write(rescue, content)
        fail(
            "a folder that doesn't exist yet" + (", or a saved training to overwrite" * overwrite),
            f"{path}, which is there already",
            f"This training is saved in {rescue} instead: rename that folder, or pass overwrite=True.",
            CheckpointError,
        )


def _free_name(path: Path) -> Path:
    number = 1
    while os.path.lexists(path.with_name(f"{path.name}-{number}")):
        number += 1
    return path.with_name(f"{path.name}-{number}")


def class_names(model: nn.Module, guide: nn.Module) -> dict[str, str]:
    """Return the names of the classes, for people to read and never to be imported."""
    return {"model": type(model).__qualname__, "guide": type(guide).__qualname__}


def load(folder: str | os.PathLike[str], model: nn.Module, guide: nn.Module) -> Fit:
    """Put saved parameters into a model and guide that you built, and return the record of their training.

    Nothing in the files is executed. Files that changed since they were written are refused, with the model untouched.

    Arguments:
        folder: one that :meth:`Fit.save` wrote; or the ``checkpoint=`` folder of a training, for the last of its
            checkpoints; or one of these.
        model, guide: built as they were for training; changed in place.
    """
    path = Path(folder)
    steps = step_folders(path)
    source = steps[-1] if steps else path
    stored = read(source)
    fit = fit_from_json(stored.state.get("fit"), source)
    saved_class = stored.about.get("model")
    load_model_tensors(
        model, guide, stored.weights, f"{source}, of a {saved_class}, to be a checkpoint"
    )
    return fit


def step_folders(folder: Path) -> list[Path]:
    """Return the checkpoints in the folder of a training, from first to last."""
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def fit_from_json(value: Any, source: Path) -> Fit:
    """Build the record of a training, if all of its fields are there and fit together."""
    fit = from_json(Fit, value, f"{source} with fit", CheckpointError)
    lengths = {len(history) for history in (fit.loss, fit.log_likelihood, fit.kl)}
    require(
        len(lengths) == 1,
        f"{source} with histories of equal lengths",
        sorted(lengths),
        REMEDY,
        CheckpointError,
    )
    return fit
