"""The format of checkpoints: whole or not at all on the disk, refused when changed, never executed."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Note

from pyro_hybrid.training import storage
from pyro_hybrid.training.storage import (
    MANIFEST,
    STATE,
    WEIGHTS,
    CheckpointError,
    Stored,
    discard,
    read,
    write,
)

CONTENT = Stored(
    {"model.a": torch.arange(200.0).reshape(20, 10), "model.flag": torch.tensor([True, False])},
    {
        "fit": {"loss": [0.5, float("nan")], "stopped_early": False},
        "mean": [torch.ones(30)],
        "none": None,
    },
    {"step": 7},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "step", CONTENT)
    return tmp_path / "step"


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def test_what_was_written_is_read(folder: Path) -> None:
    found = read(folder)
    assert same(found.weights, CONTENT.weights) and same(found.state, CONTENT.state)
    assert found.about["step"] == 7 and found.about["format"] == 1
    assert found.about["versions"].keys() == {"pyro_hybrid", "pyro-ppl", "torch", "python"}
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, WEIGHTS, STATE]


def test_the_checksums_are_those_of_sha256sum(folder: Path) -> None:
    for name, digest in json.loads((folder / MANIFEST).read_bytes())["sha256"].items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_others_can_open_the_files(folder: Path) -> None:
    assert same(safetensors.torch.load_file(folder / WEIGHTS), CONTENT.weights)
    assert same(torch.load(folder / STATE, weights_only=True), CONTENT.state)


def test_nothing_is_overwritten(folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match="exists already. Choose another folder, or remove it first"
    ):
        write(folder, Stored({}, {}, {}))
    assert read(folder).about["step"] == 7 and len(list(folder.parent.iterdir())) == 1


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"nowhere can't be loaded: manifest.json can't be read \(No such file",
    ):
        read(tmp_path / "nowhere")


OLDER = "the version that wrote it"


@pytest.mark.parametrize(
    ("format", "remedy"), [(2, "Upgrade"), (0, OLDER), ("x", OLDER), (None, OLDER)]
)
def test_another_format_says_so(folder: Path, format: object, remedy: str) -> None:
    about = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps(about | {"format": format}))
    with pytest.raises(
        CheckpointError, match=f"it has format {format!r}, and .* reads format 1. .*{remedy}"
    ):
        read(folder)


# ---- files that rot ------------------------------------------------------------------------------


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def refused(folder: Path) -> bool:
    try:
        read(folder)
    except CheckpointError as error:
        assert str(folder) in str(error) and "can't be loaded" in str(error)
        return True
    return False


def accepted(load: Callable[[bytes], object], data: bytes) -> bool:
    try:
        load(data)
    except Exception:  # whatever the library raises
        return False
    return True


ALONE: dict[str, Callable[[bytes], object]] = {
    WEIGHTS: safetensors.torch.load,
    STATE: lambda data: torch.load(io.BytesIO(data), weights_only=True),
}


def test_of_500_bit_flips_and_200_truncations_all_are_refused(folder: Path, figure: Note) -> None:
    dice, alone, read_by_others = random.Random(0), 0, 0
    originals = {name: (folder / name).read_bytes() for name in (WEIGHTS, STATE, MANIFEST)}
    for turn in range(700):
        name = dice.choices([WEIGHTS, STATE, MANIFEST], [len(data) for data in originals.values()])[
            0
        ]
        data = originals[name]
        spoilt = (
            flipped(data, dice.randrange(8 * len(data)))
            if turn < 500
            else data[: dice.randrange(len(data))]
        )
        (folder / name).write_bytes(spoilt)
        assert refused(folder), (turn, name)
        (folder / name).write_bytes(data)
        if turn < 500 and name != MANIFEST:
            alone += accepted(ALONE[name], spoilt)
            read_by_others += 1
    assert same(read(folder).weights, CONTENT.weights)
    assert (
        alone > 100
    )  # flips that the two libraries by themselves take for the file that was saved
    figure(
        "rot",
        flips=500,
        truncations=200,
        refused=700,
        flips_for_others=read_by_others,
        accepted_by_others=alone,
    )


@pytest.mark.parametrize("name", [WEIGHTS, STATE, MANIFEST])
@pytest.mark.parametrize("spoil", ["removed", "emptied", "lengthened", "linked", "a folder"])
def test_a_file_that_is_not_as_it_was_is_refused(folder: Path, name: str, spoil: str) -> None:
    path, data = folder / name, (folder / name).read_bytes()
    path.unlink()
    if spoil == "linked":  # to the very same content
        (folder / "elsewhere").write_bytes(data)
        path.symlink_to(folder / "elsewhere")
    elif spoil == "a folder":
        path.mkdir()
    elif spoil != "removed":
        path.write_bytes(b"" if spoil == "emptied" else data + b"\0")
    assert refused(folder)


# ---- files from a stranger -----------------------------------------------------------------------

PLANTED = "planted by a test"


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, PLANTED)


def forged(folder: Path, **files: bytes) -> None:
    """Other files, with checksums as they should be."""
    about = json.loads((folder / MANIFEST).read_bytes())
    del about["sha256_of_the_rest"]
    for name, data in files.items():
        name = {"weights": WEIGHTS, "state": STATE}[name]
        (folder / name).write_bytes(data)
        about["sha256"][name] = hashlib.sha256(data).hexdigest()
    manifest(folder, about)


def manifest(folder: Path, about: dict[str, Any]) -> None:
    rest = storage._digest(storage._encoded(about))
    (folder / MANIFEST).write_bytes(storage._encoded(about | {"sha256_of_the_rest": rest}))


def archive(
    pickled: bytes, compression: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None
) -> bytes:
    """What torch.save would write, with a pickle of one's own."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as file:
        for name, content in {
            "archive/data.pkl": pickled,
            "archive/version": b"3\n",
            **(more or {}),
        }.items():
            file.writestr(name, content)
    return data.getvalue()


def saved(value: object) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def bare(value: object) -> bytes:
    data = io.BytesIO()
    torch.save(value, data, _use_new_zipfile_serialization=False)
    return data.getvalue()


ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    "a pickle as weights": lambda f, out: forged(f, weights=pickle.dumps(Evil(out))),
    "a pickle as state": lambda f, out: forged(f, state=pickle.dumps(Evil(out))),
    "a pickle as manifest": lambda f, out: (
        (f / MANIFEST).write_bytes(pickle.dumps(Evil(out))) and None
    ),
    "a pickle in torch's old format": lambda f, out: forged(f, state=bare({"fit": Evil(out)})),
    "a pickle in torch's archive": lambda f, out: forged(f, state=saved({"fit": Evil(out)})),
    "a pickle in torch's archive, by a newer protocol": lambda f, out: forged(
        f, state=archive(pickle.dumps({"fit": Evil(out)}, protocol=4))
    ),
    "a second pickle in the archive": lambda f, out: forged(
        f, state=archive(pickle.dumps({}, 2), more={"other/data.pkl": pickle.dumps(Evil(out), 2)})
    ),
    "names of files that lead out": lambda f, out: manifest(
        f, {"format": 1, "sha256": {f"../{out.name}": "0" * 64, str(out): "0" * 64}}
    ),
    "entries of the archive that lead out": lambda f, out: forged(
        f, state=archive(pickle.dumps({"fit": {}}, 2), more={f"../../{out.name}": b"planted"})
    ),
    "a manifest that names a module": lambda f, out: manifest(
        f, json.loads((f / MANIFEST).read_bytes()) | {"model": "planted_module.Evil", "sha256": {}}
    ),
    "a header of 10 GB": lambda f, out: forged(
        f, weights=struct.pack("<Q", 10**10) + b"{" + b" " * 100
    ),
    "a zip bomb": lambda f, out: forged(
        f,
        state=archive(pickle.dumps({}, 2), zipfile.ZIP_DEFLATED, {"archive/data/0": bytes(10**8)}),
    ),
    "a nested manifest": lambda f, out: (f / MANIFEST).write_bytes(b"[" * 500_000) and None,
    "an endless manifest": lambda f, out: (f / MANIFEST).write_bytes(b" " * 2 * 10**6) and None,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malicious_file_is_not_executed_and_writes_nothing(
    folder: Path, attack: str, figure: Note, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = folder.parent / "outside"
    (folder.parent / "planted_module.py").write_text(
        f"open({str(outside)!r}, 'w').write({PLANTED!r})"
    )
    monkeypatch.syspath_prepend(folder.parent)
    ATTACKS[attack](folder, outside)
    before = {
        path: path.read_bytes() for path in sorted(folder.parent.rglob("*")) if path.is_file()
    }
    start, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = read(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)
    else:  # harmless entries of an archive are nobody's business
        assert attack == "entries of the archive that lead out" and found.state == {"fit": {}}
    assert (
        time.perf_counter() - start < 5.0
        and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 10**6
    )
    assert before == {
        path: path.read_bytes() for path in sorted(folder.parent.rglob("*")) if path.is_file()
    }
    figure("malice", files=1, executed=0, written_outside=0)


def test_the_attacks_would_succeed_where_pickles_are_loaded(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "outside")))
    assert (tmp_path / "outside").read_text() == PLANTED


# ---- ends at any time ----------------------------------------------------------------------------


def numbered(step: int) -> Stored:
    """Too small for torch's threads, which a fork would wait for without end."""
    return Stored({"model.a": torch.full((100, 100), float(step))}, {"step": step}, {"step": step})


def killed(work: Callable[[], None], after: float) -> None:
    """A process that begins to work, and is killed so many seconds later."""
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(begun, b"!")
            work()
        finally:
            os._exit(0)
    os.read(ready, 1)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready), os.close(begun)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_of_200_processes_killed_while_they_save_none_leaves_a_broken_checkpoint(
    tmp_path: Path, figure: Note
) -> None:
    dice, broken, partial = random.Random(0), 0, 0

    def save_on_and_on() -> None:
        step = len(list(tmp_path.glob("step-*")))
        while True:
            write(tmp_path / f"step-{step:08d}", numbered(step))
            step += 1

    start = time.perf_counter()
    write(tmp_path / "step-00000000", numbered(0))
    usual = time.perf_counter() - start
    for _ in range(200):
        killed(save_on_and_on, dice.uniform(0.0, 6.0) * usual)
        every = sorted(tmp_path.glob("step-*"))
        for path in every[-2:]:
            found, step = read(path), int(path.name[5:])
            broken += found.state["step"] != step or not (found.weights["model.a"] == step).all()
        for left in tmp_path.glob(storage.ASIDE + "*"):
            partial += 1
            discard(left)
    assert broken == 0 and len(every) > 20
    assert partial > 20  # of the kills, so many fell into a save
    figure("kills", kills=200, lost=broken, in_a_save=partial)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_torch_save_in_place_does_lose_checkpoints_to_kills(tmp_path: Path, figure: Note) -> None:
    """What the test above would find if it could find nothing: written over the old file, as many scripts do."""
    dice, lost, path = random.Random(0), 0, tmp_path / "model.pt"
    values = {"a": torch.zeros(1000, 1000)}
    start = time.perf_counter()
    torch.save(values, path)
    usual = time.perf_counter() - start

    def save_on_and_on() -> None:
        while True:
            torch.save(values, path)

    for _ in range(60):
        killed(save_on_and_on, dice.uniform(0.5, 5.0) * usual)
        lost += not accepted(
            lambda data: torch.load(io.BytesIO(data), weights_only=True), path.read_bytes()
        )
    assert lost > 0
    figure("kills", kills_in_place=60, lost_in_place=lost)


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """No file longer than so many bytes, as after ``ulimit -f``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_file_sizes_leaves_the_old_checkpoint_and_nothing_else(
    folder: Path, small_files: Callable[[int], None], figure: Note
) -> None:
    small_files(20_000)
    with pytest.raises(
        CheckpointError,
        match="next could not be written: File too large. Earlier .* are as they were",
    ):
        write(folder.parent / "next", numbered(1))
    assert [path.name for path in folder.parent.iterdir()] == ["step"] and read(folder).about[
        "step"
    ] == 7
    figure("full", file_size_limits=1, intact=1)


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    folder: Path, room: int, figure: Note, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full after so many flushes: one for each file, one for the folder."""
    flushes, fsync = iter(range(99)), os.fsync

    def full(handle: int) -> None:
        if next(flushes) == room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match="No space left on device. .* Free some space, or save elsewhere"
    ):
        write(folder.parent / "next", numbered(1))
    assert [path.name for path in folder.parent.iterdir()] == ["step"] and read(folder).about[
        "step"
    ] == 7
    figure("full", full_disks=1, intact=1)


def test_a_link_is_removed_and_not_followed(folder: Path) -> None:
    link = folder.parent / (storage.ASIDE + "link")
    link.symlink_to(folder)
    discard(link)
    assert not os.path.lexists(link) and read(folder).about["step"] == 7
