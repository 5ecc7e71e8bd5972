"""A folder with checkpoints of a training, by step: the last ones, and the best."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pyro_hybrid.errors import fail, require
from pyro_hybrid.training.fit import class_names, step_folders
from pyro_hybrid.training.json_values import from_json, parse_json
from pyro_hybrid.training.lock import locked
from pyro_hybrid.training.state import LoopState
from pyro_hybrid.training.storage import (
    ASIDE,
    MANIFEST,
    REMEDY,
    CheckpointError,
    Stored,
    discard,
    read,
    write,
)

__all__ = ["Checkpoints", "Found", "Manifest"]


@dataclass(frozen=True)
class Manifest:
    """The statements of a manifest about its checkpoint.

    Attributes:
        step: number of steps that are done.
        finished: whether the training is.
        settings: of the training, which a resumed one must share.
        held_out: the loss of the held-out tasks after this step, if they were looked at.
    """

    step: int
    finished: bool
    settings: dict[str, Any]
    held_out: float | None

    @classmethod
    def of(cls, stored: Stored, source: Path) -> Manifest:
        """Take the manifest out of a checkpoint, if it is one of a training."""
        about = stored.about
        where = f"{source} with"
        settings = about.get("settings")
        require(
            isinstance(settings, dict),
            f"{where} settings, a JSON object",
            repr(settings),
            REMEDY,
            CheckpointError,
        )
        step = from_json(int, about.get("step"), f"{where} step", CheckpointError)
        finished = from_json(bool, about.get("finished"), f"{where} finished", CheckpointError)
        held_out: float | None = _optional_number(about.get("held_out"), f"{where} held_out")
        return cls(step, finished, dict(settings or {}), held_out)


def _optional_number(value: Any, name: str) -> float | None:
    return None if value is None else from_json(float, value, name, CheckpointError)


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from: its content, its manifest and its place."""

    stored: Stored
    manifest: Manifest
    source: Path


class Checkpoints:
    """The folder with the checkpoints of a training.

    Arguments:
        folder: its place.
        settings: the training described by value, in JSON; a resumed training must share them.
        keep_last: number of checkpoints to keep, besides the best.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], keep_last: int = 2) -> None:
        self.folder = folder
        self.settings = dict(settings)
        self.keep_last = keep_last

    def last(self) -> Path | None:
        """Return the last checkpoint, if there is one."""
        steps = step_folders(self.folder)
        return steps[-1] if steps else None

    @contextlib.contextmanager
    def opened(self, resume: bool) -> Iterator[Found | None]:
        """Lock the folder, clear away what a killed process left, and yield the checkpoint to go on from, if any."""
        self._require_new(resume)
        with locked(self.folder):
            for remains in self.folder.glob(ASIDE + "step-*"):
                discard(remains)
            self._require_new(resume)
            yield self._found()

    def _require_new(self, resume: bool) -> None:
        last = self.last()
        require(
            resume or last is None,
            f"a folder without checkpoints, or resume=True to go on after {last and last.name}",
            f"{len(step_folders(self.folder))} of them in {self.folder}",
            "Pass resume=True, or choose another folder.",
        )

    def _found(self) -> Found | None:
        source = self.last()
        if source is None:
            return None
        stored = read(source)
        manifest = Manifest.of(stored, source)
        self._require_same_settings(manifest.settings)
        num_steps = self.settings["num_steps"]
        require(
            source.name == f"step-{manifest.step:08d}"
            and manifest.step <= num_steps
            and (manifest.finished or manifest.step < num_steps),
            f"{source} with the step of its name, of {num_steps} steps",
            f"step {manifest.step}",
            REMEDY,
            CheckpointError,
        )
        return Found(stored, manifest, source)

    def _require_same_settings(self, before: Mapping[str, Any]) -> None:
        for name in [*self.settings, *(set(before) - set(self.settings))]:
            if name in before and name in self.settings and before[name] == self.settings[name]:
                continue
            fail(
                f"{name} = {before.get(name)!r}, as in the training to be resumed",
                f"{self.settings.get(name)!r}",
                f"Pass what it was, or train anew into another folder than {self.folder}.",
            )

    def save(
        self,
        state: LoopState,
        model: nn.Module,
        guide: nn.Module,
        *,
        finished: bool,
        held_out: float = math.inf,
    ) -> Path:
        """Write a checkpoint, then remove those that are neither among the last ones nor the best."""
        step = state.counters.step
        about = {
            "step": step,
            "finished": finished,
            "settings": self.settings,
            **class_names(model, guide),
            "held_out": held_out if math.isfinite(held_out) else None,
        }
        path = self.folder / f"step-{step:08d}"
        write(path, state.stored(about, finished=finished))
        self._prune()
        return path

    def _prune(self) -> None:
        steps = step_folders(self.folder)
        best = min(map(_held_out, steps))
        for old in steps[: -self.keep_last]:
            if best == math.inf or _held_out(old) > best:
                discard(old)


def _held_out(path: Path) -> float:
    """Return the loss of the held-out tasks that a checkpoint's manifest names; infinity if it names none."""
    try:
        value = parse_json((path / MANIFEST).read_bytes())["held_out"]
        return float(value) if isinstance(value, int | float) else math.inf
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf
