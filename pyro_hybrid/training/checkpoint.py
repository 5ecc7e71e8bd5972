"""Fit, the record of a training; saving it with the parameters; and a folder of checkpoints by step."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import require
from pyro_hybrid.programs.module import require_local
from pyro_hybrid.training.storage import ASIDE, CheckpointError, Stored, discard, read, write

__all__ = ["Checkpoints", "Fit", "Parameters", "digest", "load", "parameters", "put_back"]

Parameters = dict[str, Tensor]


@dataclass
class Fit:
    """What came out of a training: a history of every step, per task, and of every look at the held-out tasks.

    ``step_error`` is the ``typical`` one of :func:`~pyro_hybrid.step_error` on the last batch; NaN where there is none.
    ``skipped`` counts steps that were not taken; ``left_out`` counts by task, ``{number: steps}``, those that did
    without it because its density wasn't finite.
    """

    loss: list[float] = field(default_factory=list)
    log_likelihood: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    skipped: int = 0
    left_out: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_compiling: float = 0.0
    step_error: float = 0.0
    stopped_early: bool = False

    def save(self, folder: str | os.PathLike[str], model: nn.Module, guide: nn.Module) -> None:
        """Write this record and the parameters into a folder of their own, for :func:`~pyro_hybrid.load`."""
        about = {"step": len(self.loss), "finished": True, **_classes(model, guide)}
        write(Path(folder), Stored(_copied(parameters(model, guide)), {"fit": asdict(self)}, about))


def load(folder: str | os.PathLike[str], model: nn.Module, guide: nn.Module) -> Fit:
    """Put saved parameters into a model and guide of your own making, and return the record of their training.

    Nothing in the files is executed, and files that changed since they were written are refused, the model untouched.

    Arguments:
        folder: what :meth:`Fit.save` wrote; or the ``checkpoint=`` folder of a training, for the last of its
            checkpoints; or one of these.
        model, guide: built as they were for training; changed in place.
    """
    path = Path(folder)
    last = Checkpoints(path).last()
    stored = read(path if last is None else last)
    fit = stored.state.get("fit")
    if not isinstance(fit, dict) or set(fit) != {one.name for one in fields(Fit)}:
        raise CheckpointError(
            f"{path} can't be loaded: it holds no record of a training. Load what Fit.save or "
            "meta_train wrote."
        )
    put_back(model, guide, stored.weights, stored.about)
    return Fit(**fit)


def parameters(model: nn.Module, guide: nn.Module) -> Parameters:
    """Everything that training changes, by name, what model and guide share once."""
    require_local(model=model, guide=guide)
    found: Parameters = {}
    known: set[int] = set()
    for role, module in (("model", model), ("guide", guide)):
        for name, value in module.state_dict(keep_vars=True).items():
            require(
                isinstance(value, Tensor),
                f"tensors alone in the state of the {role}",
                f"{name}, a {type(value).__name__}",
                "Keep other settings in attributes.",
                TypeError,
            )
            if id(value) not in known:
                known.add(id(value))
                found[f"{role}.{name.replace('_orig_mod.', '')}"] = (
                    value  # which torch.compile adds
                )
    return found


def put_back(
    model: nn.Module, guide: nn.Module, saved: Parameters, about: Mapping[str, Any]
) -> None:
    """Copy saved parameters into their places, all or none."""
    own, by = parameters(model, guide), f"a {about.get('model')} with a {about.get('guide')}"
    if missing := [name for name in own if name not in saved] or [
        name for name in saved if name not in own
    ]:
        whose = "only the model has" if missing[0] in own else "only the checkpoint has"
        raise CheckpointError(
            f"The checkpoint, of {by}, doesn't fit the model: {whose} {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}. Build model and guide as they were trained."
        )
    for name, value in own.items():
        if (value.shape, value.dtype) != (saved[name].shape, saved[name].dtype):
            raise CheckpointError(
                f"The checkpoint, of {by}, doesn't fit the model: {name} has shape {tuple(saved[name].shape)} and "
                f"{saved[name].dtype} there, {tuple(value.shape)} and {value.dtype} here. Build model and guide as "
                "they were trained."
            )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(saved[name])


def digest(tasks: Tasks | None) -> str | None:
    """What tells a data set from another."""
    if tasks is None:
        return None
    found = hashlib.sha256(str(tasks.num_support).encode())
    for name in ("times", "values", "initial", "states", "scored", "observed", "inputs"):
        part = getattr(tasks, name)
        if part is None:
            found.update(f"no {name}".encode())
            continue
        found.update(f"{tuple(part.shape)} {part.dtype}".encode())
        found.update(part.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


class Checkpoints:
    """A folder with a checkpoint for each of some steps: the last ones, and the best.

    Arguments:
        folder: where.
        settings: of the training, which a resumed one must share; JSON.
        keep: how many of the last ones to keep.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any] | None = None, keep: int = 2
    ) -> None:
        self.folder, self.keep = folder, keep
        self.settings = json.loads(json.dumps(settings or {}, default=float))

    def all(self) -> list[Path]:
        """From first to last."""
        return sorted(self.folder.glob("step-" + "[0-9]" * 8))

    def last(self) -> Path | None:
        """The last one, if there is any."""
        every = self.all()
        return every[-1] if every else None

    def begin(self, resume: bool) -> Stored | None:
        """Clear away what a killed process left, and find what to go on from."""
        for left in self.folder.glob(ASIDE + "step-*"):
            discard(left)
        last = self.last()
        if last is None:
            return None
        require(
            resume,
            f"a folder without checkpoints, or resume=True to go on after {last.name}",
            f"{len(self.all())} of them in {self.folder}",
            "Pass resume=True, or choose another folder.",
        )
        stored = read(last)
        for name, value in self.settings.items():
            before = stored.about.get("settings", {}).get(name)
            require(
                before == value,
                f"{name} = {before!r}, as in the training to be resumed",
                f"{value!r}",
                f"Pass what it was, or train anew into another folder than {self.folder}.",
            )
        return stored

    def save(
        self,
        step: int,
        model: nn.Module,
        guide: nn.Module,
        state: dict[str, Any],
        *,
        finished: bool,
        held_out: float = math.inf,
    ) -> None:
        """Write one, then remove those that are neither among the last ones nor the best."""
        about = {
            "step": step,
            "finished": finished,
            "settings": self.settings,
            **_classes(model, guide),
            "held_out": held_out if math.isfinite(held_out) else None,
        }
        write(
            self.folder / f"step-{step:08d}",
            Stored(_copied(parameters(model, guide)), state, about),
        )
        every = self.all()
        best = min(map(_held_out, every))
        for old in every[: -self.keep]:
            if best == math.inf or _held_out(old) > best:
                discard(old)


def _held_out(path: Path) -> float:
    """What was measured on the held-out tasks, if anything was."""
    try:
        value = json.loads((path / "manifest.json").read_bytes())["held_out"]
        return float(value) if isinstance(value, int | float) else math.inf
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def _classes(model: nn.Module, guide: nn.Module) -> dict[str, str]:
    """For people to read, and never to be imported."""
    return {"model": type(model).__qualname__, "guide": type(guide).__qualname__}


def _copied(values: Parameters) -> Parameters:
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in values.items()
    }
