"""How a checkpoint lies on disk: written whole or not at all, checked before it is read, never executed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickletools
import platform
import shutil
import stat
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import torch as safetensors
from torch import Tensor

__all__ = ["ASIDE", "CheckpointError", "Stored", "discard", "read", "write"]

FORMAT = 1
WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"
ASIDE = ".partial-"  # how the names of folders begin that are being written, or removed
LONGEST_MANIFEST = 10**6
KINDS = ("Bool", "Byte", "Double", "Float", "Half", "BFloat16", "Int", "Long")
HARMLESS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in KINDS),
}


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or that can't be trusted or used; what was there before still is."""


class Stored(NamedTuple):
    """What a checkpoint holds: named tensors, the rest of the state, and what its manifest says about them."""

    weights: dict[str, Tensor]
    state: dict[str, Any]
    about: dict[str, Any]


def write(folder: Path, content: Stored) -> None:
    """Write a checkpoint aside, flush it to the disk, and only then give it its name.

    Whenever the process is killed, the folder either isn't there or is complete.
    """
    aside = folder.with_name(ASIDE + folder.name)
    try:
        if os.path.lexists(folder):
            raise CheckpointError(
                f"{folder} exists already. Choose another folder, or remove it first."
            )
        discard(aside)
        aside.mkdir(parents=True)
        for name, data in _files(content).items():
            _flushed(aside / name, data)
        _flush(aside)
        aside.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written: {error.strerror or error}. Earlier checkpoints are as "
            "they were. Free some space, or save elsewhere."
        ) from error
    finally:
        discard(aside)


def _files(content: Stored) -> dict[str, bytes]:
    state = io.BytesIO()
    torch.save(content.state, state)
    files = {WEIGHTS: safetensors.save(content.weights), STATE: state.getvalue()}
    about = content.about | {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("pyro_hybrid", "pyro-ppl", "torch")}
        | {"python": platform.python_version()},
        "sha256": {name: _digest(data) for name, data in files.items()},
    }
    return {**files, MANIFEST: _encoded(about | {"sha256_of_the_rest": _digest(_encoded(about))})}


def _encoded(about: dict[str, Any]) -> bytes:
    return json.dumps(about, indent=2, sort_keys=True, allow_nan=False).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _flushed(path: Path, data: bytes) -> None:
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
    """Remove a checkpoint, or what was left of one; a link is removed, not followed."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink(missing_ok=True)
    elif folder.exists():
        aside = (
            folder
            if folder.name.startswith(ASIDE)
            else folder.rename(folder.with_name(ASIDE + folder.name))
        )
        shutil.rmtree(aside, ignore_errors=True)


def read(folder: Path) -> Stored:
    """A checkpoint, if it is as it was written. Nothing in it is executed or imported; no name in it is a path."""
    about = _manifest(folder)
    data = {}
    for name in (WEIGHTS, STATE):
        data[name] = _content(folder / name)
        if about["sha256"].get(name) != _digest(data[name]):
            _refuse(folder, f"{name} isn't what was written (its checksum differs)")
    try:
        weights = safetensors.load(data[WEIGHTS])
    except Exception as error:  # whatever a parser says of bytes from a stranger
        _refuse(folder, f"{WEIGHTS} holds no tensors ({error})")
    return Stored(weights, _unpickled(folder, data[STATE]), about)


def _content(path: Path, longest: int | None = None) -> bytes:
    """A file's content, if it is a file proper."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            _refuse(path.parent, f"{path.name} isn't a file but a link or a folder")
        if longest is not None and status.st_size > longest:
            _refuse(path.parent, f"{path.name} has {status.st_size} bytes, which no manifest has")
        return path.read_bytes()
    except OSError as error:
        _refuse(path.parent, f"{path.name} can't be read ({error.strerror})")


def _manifest(folder: Path) -> dict[str, Any]:
    data = _content(folder / MANIFEST, LONGEST_MANIFEST)
    try:
        about = json.loads(data)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or not isinstance(about.get("sha256"), dict):
        _refuse(folder, f"{MANIFEST} isn't a manifest")
    if about.get("format") != FORMAT:
        newer = isinstance(about.get("format"), int) and about["format"] > FORMAT
        _refuse(
            folder,
            f"it has format {about.get('format')!r}, and this version of pyro_hybrid reads format {FORMAT}",
            "Upgrade pyro_hybrid." if newer else "Load it with the version that wrote it.",
        )
    rest = {name: value for name, value in about.items() if name != "sha256_of_the_rest"}
    if data != _encoded(about) or about.get("sha256_of_the_rest") != _digest(_encoded(rest)):
        _refuse(folder, f"{MANIFEST} isn't what was written (its checksum differs)")
    return about


def _unpickled(folder: Path, data: bytes) -> dict[str, Any]:
    """Tensors, numbers, strings and containers of them; refused before anything is built if it names anything else."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if (
                any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
                or len(set(names)) < len(names)
                or (sum(entry.file_size for entry in entries) > len(data))
            ):
                _refuse(folder, f"{STATE} would be larger in memory than on the disk")
            pickles = [name for name in names if name.endswith("data.pkl")]
            strangers = {word for name in pickles for word in _named(archive.read(name))} - HARMLESS
            if len(pickles) != 1 or strangers:
                _refuse(
                    folder,
                    f"{STATE} names {sorted(strangers) or 'nothing'}, which no checkpoint does",
                )
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a parser says of bytes from a stranger
        _refuse(
            folder, f"{STATE} isn't the state of a training ({str(error).partition(chr(10))[0]})"
        )
    if not isinstance(state, dict):
        _refuse(folder, f"{STATE} isn't the state of a training")
    return state


def _named(pickled: bytes) -> set[str]:
    """Whatever a pickle would import."""
    return {
        str(argument) if code.name == "GLOBAL" else code.name
        for code, argument, _ in pickletools.genops(pickled)
        if code.name
        in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "OBJ", "NEWOBJ", "NEWOBJ_EX")
    }


def _refuse(
    folder: Path,
    why: str,
    remedy: str = "Go back to an earlier one: remove this one, or name that.",
) -> NoReturn:
    raise CheckpointError(f"{folder} can't be loaded: {why}. {remedy}") from None
