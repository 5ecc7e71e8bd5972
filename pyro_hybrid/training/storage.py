"""A checkpoint on disk: tensors in safetensors and the rest in JSON, written whole or not at all, never executed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
import stat
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from safetensors import torch as safetensors
from torch import Tensor

from pyro_hybrid.errors import fail
from pyro_hybrid.training.json_values import parse_json

__all__ = ["ASIDE", "REMEDY", "CheckpointError", "Stored", "discard", "is_stored", "read", "write"]

FORMAT = 2
WEIGHTS = "model.safetensors"
TRAINING = "training.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
ASIDE = ".partial-"  # how the names of folders begin that are being written, or removed
LONGEST_MANIFEST = 10**6
REMEDY = "Go back to an earlier checkpoint: remove this one, or name that one."


class CheckpointError(RuntimeError):
    """A checkpoint that can't be written, trusted or used; files and models are as they were before."""


@dataclass(frozen=True)
class Stored:
    """The content of a checkpoint.

    Arguments:
        weights: named tensors, everything that training changes.
        state: the numbers of a training, as JSON.
        about: what the manifest says, as JSON: names, the step, the settings.
        training: named tensors that only a resumed training needs.
    """

    weights: dict[str, Tensor]
    state: dict[str, Any]
    about: dict[str, Any]
    training: dict[str, Tensor] = field(default_factory=dict)


def write(folder: Path, content: Stored, *, overwrite: bool = False) -> None:
    """Write a checkpoint aside, flush it to the disk, and only then give it its name.

    Whenever the process is killed, the folder either isn't there or is complete.

    Arguments:
        folder: the checkpoint's name.
        content: what to write.
        overwrite: replace a checkpoint of that name; never a folder of anything else.
    """
    aside = _beside(folder)
    try:
        _require_free(folder, overwrite)
        aside.mkdir(parents=True)
        for name, data in _files(content).items():
            _write_flushed(aside / name, data)
        _flush(aside)
        if os.path.lexists(folder):
            _require_free(folder, overwrite)
            _replace(folder, aside)
        else:
            aside.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        fail(
            f"a place to write {folder} to",
            f"an error ({error.strerror or error})",
            "Earlier checkpoints are as they were. Free some space, or save elsewhere.",
            CheckpointError,
        )
    finally:
        discard(aside)


def is_stored(folder: Path) -> bool:
    """Tell whether a folder looks like a checkpoint, without reading it."""
    return folder.is_dir() and not folder.is_symlink() and (folder / MANIFEST).is_file()


def _beside(folder: Path) -> Path:
    """Return a name that no other process uses."""
    return folder.with_name(f"{ASIDE}{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")


def _require_free(folder: Path, overwrite: bool) -> None:
    if not os.path.lexists(folder) or overwrite and is_stored(folder):
        return
    fail(
        "a folder that doesn't exist yet" + (", or a checkpoint to overwrite" * overwrite),
        f"{folder}, which is there already",
        "Choose another folder, or remove it first.",
        CheckpointError,
    )


def _replace(folder: Path, aside: Path) -> None:
    old = _beside(folder)
    folder.rename(old)
    try:
        aside.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    discard(old)


def _files(content: Stored) -> dict[str, bytes]:
    files = {WEIGHTS: safetensors.save(content.weights), STATE: _encoded(content.state)}
    if content.training:
        files[TRAINING] = safetensors.save(content.training)
    versions = {name: version(name) for name in ("pyro_hybrid", "pyro-ppl", "torch")}
    about = content.about | {
        "format": FORMAT,
        "versions": versions | {"python": platform.python_version()},
        "sha256": {name: _sha256(data) for name, data in files.items()},
    }
    seal = _sha256(_encoded(about))
    return {**files, MANIFEST: _encoded(about | {"sha256_of_the_rest": seal})}


def _encoded(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_flushed(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(folder: Path) -> None:
    """Remove a checkpoint or the remains of one; a link is removed, not followed."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink(missing_ok=True)
        return
    if not folder.exists():
        return
    if not folder.name.startswith(ASIDE):
        folder = folder.rename(_beside(folder))
    shutil.rmtree(folder, ignore_errors=True)


def read(folder: Path) -> Stored:
    """Read a checkpoint if it is as it was written. Nothing in it is executed or imported; no name in it is a path."""
    about = _manifest(folder)
    sums = about["sha256"]
    if not {WEIGHTS, STATE} <= set(sums) <= {WEIGHTS, STATE, TRAINING}:
        _refuse(folder, f"{WEIGHTS} and {STATE}", f"a manifest of {sorted(sums)}")
    files = {name: _content(folder / name) for name in sums}
    for name, data in files.items():
        if sums[name] != _sha256(data):
            _refuse(folder, f"{name} as it was written", "other bytes (its checksum differs)")
    training = _tensors(folder, TRAINING, files[TRAINING]) if TRAINING in files else {}
    weights = _tensors(folder, WEIGHTS, files[WEIGHTS])
    return Stored(weights, _state(folder, files[STATE]), about, training)


def _content(path: Path, longest: int | None = None) -> bytes:
    """Return the content of a file proper."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            _refuse(path.parent, f"a file {path.name}", "a link or a folder")
        if longest is not None and status.st_size > longest:
            _refuse(
                path.parent, f"{path.name} of at most {longest} bytes", f"{status.st_size} of them"
            )
        return path.read_bytes()
    except OSError as error:
        _refuse(path.parent, f"{path.name} that can be read", f"an error ({error.strerror})")


def _manifest(folder: Path) -> dict[str, Any]:
    data = _content(folder / MANIFEST, LONGEST_MANIFEST)
    try:
        about = parse_json(data)
    except ValueError:
        about = None
    if not isinstance(about, dict) or not isinstance(about.get("sha256"), dict):
        _refuse(folder, f"a manifest in {MANIFEST}", "something else")
    if about.get("format") != FORMAT:
        newer = isinstance(about.get("format"), int) and about["format"] > FORMAT
        _refuse(
            folder,
            f"format {FORMAT}, which this version of pyro_hybrid reads",
            f"format {about.get('format')!r}",
            "Upgrade pyro_hybrid." if newer else "Load it with the version that wrote it.",
        )
    rest = {name: value for name, value in about.items() if name != "sha256_of_the_rest"}
    if data != _encoded(about) or about.get("sha256_of_the_rest") != _sha256(_encoded(rest)):
        _refuse(folder, f"{MANIFEST} as it was written", "other bytes (its checksum differs)")
    return about


def _tensors(folder: Path, name: str, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.load(data)
    except Exception as error:  # a parser may raise anything for bytes from a stranger
        _refuse(folder, f"tensors in {name}", f"an error ({error})")


def _state(folder: Path, data: bytes) -> dict[str, Any]:
    try:
        state = parse_json(data)
    except ValueError as error:
        _refuse(folder, f"JSON in {STATE}", f"an error ({error})")
    if not isinstance(state, dict):
        _refuse(folder, f"a JSON object in {STATE}", f"a {type(state).__name__}")
    return state


def _refuse(folder: Path, expected: str, got: str, remedy: str = REMEDY) -> NoReturn:
    fail(f"{folder} with {expected}", got, remedy, CheckpointError)
