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
import sys
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
    TRAINING,
    WEIGHTS,
    CheckpointError,
    Stored,
    discard,
    read,
    write,
)

CONTENT = Stored(
    {"model.a": torch.arange(200.0).reshape(20, 10), "model.flag": torch.tensor([True, False])},
    {"fit": {"loss": [0.5, 1e-300], "stopped_early": False}, "none": None},
    {"step": 7},
    {"average/model.a": torch.ones(30)},
)
FILES = (WEIGHTS, TRAINING, STATE, MANIFEST)


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
    assert same(found.training, CONTENT.training)
    assert found.about["step"] == 7 and found.about["format"] == 2
    assert found.about["versions"].keys() == {"pyro_hybrid", "pyro-ppl", "torch", "python"}
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_only_an_unfinished_training_has_tensors_besides_the_weights(tmp_path: Path) -> None:
    write(tmp_path / "fit", Stored(CONTENT.weights, CONTENT.state, {}))
    assert sorted(path.name for path in (tmp_path / "fit").iterdir()) == [MANIFEST, WEIGHTS, STATE]
    assert read(tmp_path / "fit").training == {}


def test_the_checksums_are_those_of_sha256sum(folder: Path) -> None:
    for name, digest in json.loads((folder / MANIFEST).read_bytes())["sha256"].items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_others_can_open_the_files(folder: Path) -> None:
    assert same(safetensors.torch.load_file(folder / WEIGHTS), CONTENT.weights)
    assert same(safetensors.torch.load_file(folder / TRAINING), CONTENT.training)
    assert json.loads((folder / STATE).read_bytes()) == CONTENT.state


def test_nothing_is_overwritten(folder: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match="a folder that doesn't exist yet; got .*step, which is there already. Choose another",
    ):
        write(folder, Stored({}, {}, {}))
    assert read(folder).about["step"] == 7 and len(list(folder.parent.iterdir())) == 1


def test_a_checkpoint_is_overwritten_on_demand_and_anything_else_never(folder: Path) -> None:
    write(folder, Stored({}, {"new": True}, {"step": 8}), overwrite=True)
    assert read(folder).about["step"] == 8 and not (folder / TRAINING).exists()
    assert [path.name for path in folder.parent.iterdir()] == ["step"]
    notes = folder.parent / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    link = folder.parent / "link"
    link.symlink_to(folder)
    for taken in (notes, link, notes / "mine.txt"):
        with pytest.raises(CheckpointError, match="or a checkpoint to overwrite; got .* already"):
            write(taken, CONTENT, overwrite=True)
    assert (notes / "mine.txt").read_text() == "mine" and read(folder).about["step"] == 8


def test_the_old_checkpoint_stays_where_the_new_one_can_not_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write(folder, Stored({}, {}, {}), overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == ["step"] and same(
        read(folder).weights, CONTENT.weights
    )


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"expected .*nowhere with manifest.json that can be read; got an error \(No such file",
    ):
        read(tmp_path / "nowhere")


OLDER = "the version that wrote it"


@pytest.mark.parametrize(
    ("format", "remedy"), [(3, "Upgrade"), (1, OLDER), ("x", OLDER), (None, OLDER)]
)
def test_another_format_says_so(folder: Path, format: object, remedy: str) -> None:
    about = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps(about | {"format": format}))
    with pytest.raises(
        CheckpointError, match=f"with format 2, .*; got format {format!r}. .*{remedy}"
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
        assert str(error).startswith(f"expected {folder} with ")
        return True
    return False


def accepted(load: Callable[[Any], object], data: Any) -> bool:
    try:
        load(data)
    except Exception:  # whatever the library raises
        return False
    return True


ALONE: dict[str, Callable[[bytes], object]] = {
    WEIGHTS: safetensors.torch.load,
    TRAINING: safetensors.torch.load,
    STATE: json.loads,
}


def test_of_500_bit_flips_and_200_truncations_all_are_refused(folder: Path, figure: Note) -> None:
    dice, alone, read_by_others = random.Random(0), 0, 0
    originals = {name: (folder / name).read_bytes() for name in FILES}
    for turn in range(700):
        (name,) = dice.choices(FILES, [len(data) for data in originals.values()])
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
    )  # flips that safetensors and JSON by themselves take for the file that was saved
    figure(
        "rot",
        flips=500,
        truncations=200,
        refused=700,
        flips_for_others=read_by_others,
        accepted_by_others=alone,
    )


@pytest.mark.parametrize("name", FILES)
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
    """Replace files, with checksums as they should be."""
    about = json.loads((folder / MANIFEST).read_bytes())
    del about["sha256_of_the_rest"]
    for name, data in files.items():
        name = {"weights": WEIGHTS, "training": TRAINING, "state": STATE}[name]
        (folder / name).write_bytes(data)
        about["sha256"][name] = hashlib.sha256(data).hexdigest()
    manifest(folder, about)


def manifest(folder: Path, about: dict[str, Any]) -> None:
    """Replace the manifest, with a seal as it should be."""
    about.pop("sha256_of_the_rest", None)
    rest = hashlib.sha256(encoded(about)).hexdigest()
    (folder / MANIFEST).write_bytes(encoded(about | {"sha256_of_the_rest": rest}))


def encoded(value: dict[str, Any]) -> bytes:
    """JSON as the library writes it, and with NaN as it doesn't."""
    return json.dumps(value, indent=2, sort_keys=True).encode()


def saved(value: object) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def header(text: bytes, more: bytes = b"") -> bytes:
    """A safetensors file with a header of one's own."""
    return struct.pack("<Q", len(text)) + text + more


def names_files(folder: Path, names: dict[str, str]) -> None:
    manifest(folder, json.loads((folder / MANIFEST).read_bytes()) | {"sha256": names})


ATTACKS: dict[str, Callable[[Path, Path], object]] = {
    "a pickle as weights": lambda f, out: forged(f, weights=pickle.dumps(Evil(out))),
    "a pickle as training": lambda f, out: forged(f, training=pickle.dumps(Evil(out))),
    "a pickle as state": lambda f, out: forged(f, state=pickle.dumps(Evil(out))),
    "a pickle as manifest": lambda f, out: (f / MANIFEST).write_bytes(pickle.dumps(Evil(out))),
    "torch's archive with a pickle as training": lambda f, out: forged(
        f, training=saved({"fit": Evil(out)})
    ),
    "torch's archive with a pickle as state": lambda f, out: forged(f, state=saved(Evil(out))),
    "names of files that lead out": lambda f, out: names_files(
        f, {WEIGHTS: "0" * 64, STATE: "0" * 64, f"../{out.name}": "0" * 64, str(out): "0" * 64}
    ),
    "a file beside": lambda f, out: names_files(
        f, {**json.loads((f / MANIFEST).read_bytes())["sha256"], "state.pt": "0" * 64}
    ),
    "a manifest that names a module": lambda f, out: manifest(
        f, json.loads((f / MANIFEST).read_bytes()) | {"model": "planted_module.Evil", "sha256": {}}
    ),
    "a header of 10 GB": lambda f, out: forged(
        f, weights=struct.pack("<Q", 10**10) + b"{" + b" " * 100
    ),
    "a tensor of 10 TB": lambda f, out: forged(
        f,
        training=header(
            b'{"a":{"dtype":"F32","shape":[9999999,999999],"data_offsets":[0,4]}}', b"0000"
        ),
    ),
    "a tensor that lies beyond the file": lambda f, out: forged(
        f, training=header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4000,4004]}}', b"0000")
    ),
    "a nested manifest": lambda f, out: (f / MANIFEST).write_bytes(b"[" * 500_000),
    "a nested state": lambda f, out: forged(f, state=b"[" * 500_000),
    "a list as state": lambda f, out: forged(f, state=b"[]"),
    "a state with NaN": lambda f, out: forged(f, state=b'{"fit": NaN}'),
    "a state with a number too large": lambda f, out: forged(f, state=b'{"fit": 1e999}'),
    "a state with a number too long": lambda f, out: forged(
        f, state=b'{"fit": ' + b"9" * 10**4 + b"}"
    ),
    "a state that isn't text": lambda f, out: forged(f, state=b"\xff\xfe"),
    "an endless manifest": lambda f, out: (f / MANIFEST).write_bytes(b" " * 2 * 10**6),
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
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="; got .* Go back to an earlier checkpoint: remove"):
        read(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 10**6
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


def killed(work: Callable[[], None], at: int) -> None:
    """Run ``work`` in a process that is killed before its ``at``-th call that touches the file system."""
    calls = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fsync")
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        return
    seen = 0

    def die(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in calls:
            return
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    os.fsync = lambda handle: (die("fsync", ()), fsync(handle))[1]
    sys.addaudithook(die)
    try:
        work()
    finally:
        os._exit(0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_of_200_processes_killed_while_they_save_none_leaves_a_broken_checkpoint(
    tmp_path: Path, figure: Note
) -> None:
    dice = random.Random(0)
    broken = partial = 0

    def save_on_and_on() -> None:
        step = len(list(tmp_path.glob("step-*")))
        while True:
            write(tmp_path / f"step-{step:08d}", numbered(step))
            step += 1

    write(tmp_path / "step-00000000", numbered(0))
    for _ in range(200):
        killed(save_on_and_on, at=dice.randrange(1, 40))
        every = sorted(tmp_path.glob("step-*"))
        for path in every[-2:]:
            found, step = read(path), int(path.name[5:])
            broken += found.state["step"] != step or not (found.weights["model.a"] == step).all()
        for left in tmp_path.glob(storage.ASIDE + "*"):
            partial += 1
            discard(left)
    assert broken == 0 and len(every) > 20
    assert partial > 100  # kills that fell into a save
    figure("kills", kills=200, lost=broken, in_a_save=partial)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_of_processes_killed_while_they_overwrite_none_loses_both(tmp_path: Path) -> None:
    """Between two renames the name is free for a moment; old and new are there whole, aside."""
    write(tmp_path / "fit", numbered(0))
    for at in range(1, 30):
        killed(
            lambda: [write(tmp_path / "fit", numbered(1), overwrite=True) for _ in range(9)], at=at
        )
        places = [tmp_path / "fit", *tmp_path.glob(storage.ASIDE + "*")]
        whole = [path for path in places if accepted(lambda path: read(path), path)]
        assert whole, at
        for path in tmp_path.iterdir():
            discard(path)
        write(tmp_path / "fit", numbered(0))


class Mortal(io.FileIO):
    """A file whose process is killed in the middle of its ``at``-th write."""

    def __init__(self, path: Path, at: int) -> None:
        super().__init__(path, "w")
        self.left = at

    def write(self, data: Any) -> int:
        self.left -= 1
        if self.left == 0:
            super().write(memoryview(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(data)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_torch_save_in_place_does_lose_checkpoints_to_kills(tmp_path: Path, figure: Note) -> None:
    """What the test above would find if it could find nothing: written over the old file, as many scripts do."""
    dice, lost, path = random.Random(0), 0, tmp_path / "model.pt"
    values = {"a": torch.zeros(1000, 1000)}
    torch.save(values, path)
    for _ in range(60):
        at = dice.randrange(1, 6)

        def save_on_and_on(at: int = at) -> None:
            while True:
                torch.save(values, Mortal(path, at))

        killed(save_on_and_on, at=10**9)
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
        match="a place to write .*next to; got an error .File too large.. Earlier .* are as they",
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
        CheckpointError, match="No space left on device.. .* Free some space, or save elsewhere"
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
