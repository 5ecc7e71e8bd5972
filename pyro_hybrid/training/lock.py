"""A lock file that keeps two trainings out of one folder."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from pyro_hybrid.errors import fail
from pyro_hybrid.training.json_values import from_json, parse_json
from pyro_hybrid.training.storage import CheckpointError

__all__ = ["LOCK", "Holder", "locked"]

LOCK = "training.lock"


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        process: its id.
        host: the name of its machine.
        started: when it started, in the kernel's ticks; empty where the system doesn't say. Ids are given out again.
        token: a random word, which tells this lock from an earlier one of the same process.
    """

    process: int
    host: str
    started: str
    token: str

    @classmethod
    def here(cls) -> Holder:
        """Describe this process, with a new token."""
        process = os.getpid()
        return cls(process, platform.node(), _start_of(process), secrets.token_hex(8))

    def is_dead(self) -> bool:
        """Tell whether the process is certainly dead, which only its own machine knows."""
        if self.host != platform.node() or os.name != "posix":
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # the process of another user
            return False
        return bool(self.started) and _start_of(self.process) != self.started


def _start_of(process: int) -> str:
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return status.rpartition(")")[2].split()[19]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it isn't there; take it over from a dead process of this machine."""
    path = folder / LOCK
    holder = Holder.here()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _create(path, holder):
            _take_over(path, holder)
    except OSError as error:
        fail(
            f"a folder to write checkpoints into at {folder}",
            f"an error ({error.strerror or error})",
            "Choose another folder, or make this one writable.",
            CheckpointError,
        )
    try:
        yield
    finally:
        if _read(path) == holder:
            path.unlink(missing_ok=True)


def _create(path: Path, holder: Holder) -> bool:
    """Write the lock unless there is one."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(asdict(holder)))
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> Holder | None:
    """Return the holder of a lock, if it can be told."""
    try:
        return from_json(Holder, parse_json(path.read_bytes()), "a lock")
    except (OSError, ValueError):
        return None


def _take_over(path: Path, holder: Holder) -> None:
    """Replace the lock of a dead process; of several processes that try, one succeeds."""
    other = _read(path)
    if other is None and not path.exists() and _create(path, holder):
        return  # released meanwhile
    if other is None or not other.is_dead():
        _refuse(path, other)
    aside = path.with_name(f"{LOCK}.{holder.token}")
    turn = path.with_name(f"{LOCK}.turn")
    _create(aside, holder)
    try:
        if not _create(turn, holder):
            _refuse(turn, _read(turn))
        try:
            if _read(path) != other:
                _refuse(path, _read(path))
            aside.replace(path)
        finally:
            turn.unlink(missing_ok=True)
    finally:
        aside.unlink(missing_ok=True)


def _refuse(path: Path, other: Holder | None) -> NoReturn:
    who = "a process that can't be told"
    if other is not None:
        who = f"process {other.process} on {other.host}"
        if (other.process, other.host) == (os.getpid(), platform.node()):
            who = "this very process"
    fail(
        f"a folder that no other training writes into; {path.parent} is locked",
        f"a lock of {who}",
        f"Wait until it ends, or choose another folder. If it is dead, remove {path}.",
        CheckpointError,
    )
