"""Trainings that were stopped and go on, bit for bit, and models that are saved and loaded."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Note
from test_training import SHORT, TASKS, Fragile, pair, quiet, same, state
from torch import nn

import pyro_hybrid as ph
from pyro_hybrid.training.checkpoint import Checkpoints
from pyro_hybrid.training.storage import ASIDE, MANIFEST, read

LONG: dict[str, Any] = {
    **SHORT,
    "steps": 24,
    "every": 5,
    "average": 0.4,
    "warmup": 0.3,
    "curriculum": {0.0: 2, 0.4: None},
}


class Stop(Exception):
    """What ends a training at a step."""


def stopped_at(step: int, both: Any, **options: Any) -> None:
    def stop(at: int, fit: ph.Fit) -> None:
        if at == step:
            raise Stop

    with pytest.raises(Stop):
        ph.meta_train(*both, TASKS, callback=stop, **options)


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in Checkpoints(folder).all()]


# ---- save and load -------------------------------------------------------------------------------


@pytest.mark.parametrize("evidence", [None, ph.GaussNewton(1)], ids=["learned", "computed"])
def test_a_model_that_was_saved_is_loaded_into_another_bit_for_bit(
    tmp_path: Path, evidence: Any
) -> None:
    both, others = pair(evidence), pair(evidence, seed=1)
    fit = ph.meta_train(*both, TASKS, **SHORT)
    fit.save(tmp_path / "saved", *both)
    assert not same(state(*both), state(*others))
    found = ph.load(tmp_path / "saved", *others)
    assert same(state(*both), state(*others)) and found == fit


def test_float64_stays_float64(tmp_path: Path) -> None:
    both, others = ([m.double() for m in pair(seed=seed)] for seed in (0, 1))
    ph.Fit().save(tmp_path / "saved", *both)
    ph.load(tmp_path / "saved", *others)
    assert same(state(*both), state(*others)) and others[0].noise.dtype == torch.float64


def test_what_model_and_guide_share_is_saved_once(tmp_path: Path) -> None:
    model, guide = pair()
    ph.Fit().save(tmp_path / "saved", model, guide)
    names = read(tmp_path / "saved").weights
    assert guide.prior is model.prior and any(name.startswith("model.prior.") for name in names)
    assert not any(name.startswith("guide.prior.") for name in names)


def test_a_compiled_part_has_the_names_of_the_plain_one(tmp_path: Path) -> None:
    both, others = pair(), pair(seed=1)
    wrapped = nn.Module()  # as torch.compile wraps
    wrapped._orig_mod = both[0].prior.encoder.joint
    both[0].prior.encoder.joint = wrapped
    assert any("_orig_mod" in name for name in both[0].state_dict())
    ph.Fit().save(tmp_path / "saved", *both)
    ph.load(tmp_path / "saved", *others)
    assert same(state(*both), state(*others))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"inferred": False, "sites": {"slope": ph.families.Normal(1)}},
            r"model\.prior.* has shape .* there, .* here",
        ),
        ({"evidence": ph.GaussNewton(1)}, r"only the checkpoint has guide\.\S+"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(
    tmp_path: Path, options: Any, said: str
) -> None:
    ph.Fit().save(tmp_path / "saved", *pair())
    others = pair(seed=1, **options)
    before = state(*others)
    with pytest.raises(
        ph.CheckpointError,
        match=f"of a Line with a AmortizedGuide, doesn't fit the model: .*{said}",
    ):
        ph.load(tmp_path / "saved", *others)
    assert same(before, state(*others))


def test_a_damaged_checkpoint_changes_nothing(tmp_path: Path) -> None:
    both = pair()
    ph.Fit().save(tmp_path / "saved", *both)
    path = tmp_path / "saved" / "state.pt"
    path.write_bytes(path.read_bytes()[:-1])
    others = pair(seed=1)
    before = state(*others)
    with pytest.raises(
        ph.CheckpointError, match=r"state.pt isn't what was written \(its checksum differs\)"
    ):
        ph.load(tmp_path / "saved", *others)
    assert same(before, state(*others))


def test_more_than_tensors_in_a_model_is_refused(tmp_path: Path) -> None:
    model, guide = pair()

    class Odd(nn.Module):
        def get_extra_state(self) -> str:
            return "a note"

        def set_extra_state(self, value: str) -> None: ...

    model.odd = Odd()
    with pytest.raises(
        TypeError, match="tensors alone in the state of the model; got odd._extra_state, a str"
    ):
        ph.Fit().save(tmp_path / "saved", model, guide)


# ---- a training goes on --------------------------------------------------------------------------


def test_a_training_with_checkpoints_is_the_training_without(tmp_path: Path) -> None:
    plain, kept = pair(), pair()
    one = ph.meta_train(*plain, TASKS, **LONG)
    other = ph.meta_train(*kept, TASKS, checkpoint=tmp_path / "run", **LONG)
    assert same(state(*plain), state(*kept)) and one.loss == other.loss
    assert steps(tmp_path / "run") == [20, 24]


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
def test_from_20_random_stops_a_training_ends_in_the_same_bits(
    tmp_path: Path, threads: int, figure: Note
) -> None:
    before, dice = torch.get_num_threads(), random.Random(threads)
    torch.set_num_threads(threads)
    try:
        options = {**LONG, "held_out": TASKS[:6], "every": 3}
        whole = pair()
        expected = ph.meta_train(*whole, TASKS, **options)
        for turn in range(20):
            if turn == 10:  # another way to end: the best state, not the average
                options = {**options, "patience": 2, "learning_rate": 1.0}
                whole = pair()
                expected = ph.meta_train(*whole, TASKS, **options)
            folder, both, again = tmp_path / str(turn), pair(), pair(seed=99)
            stopped_at(
                dice.randrange(3, len(expected.loss) - 1), both, checkpoint=folder, **options
            )
            found = ph.meta_train(*again, TASKS, checkpoint=folder, resume=True, **options)
            assert same(state(*whole), state(*again)), turn
            assert (found.loss, found.held_out, found.kl) == (
                expected.loss,
                expected.held_out,
                expected.kl,
            )
            assert found.stopped_early == expected.stopped_early
            figure("resume", **{f"equal_on_{threads}": 1})
        assert expected.stopped_early and len(expected.loss) < LONG["steps"]
    finally:
        torch.set_num_threads(before)


def test_a_training_may_be_stopped_again_and_again(tmp_path: Path) -> None:
    whole, both = pair(), pair()
    ph.meta_train(*whole, TASKS, **LONG)
    for step in (6, 12, 17):
        stopped_at(step, both, checkpoint=tmp_path, resume=True, **LONG)
        both = pair(seed=step)
    ph.meta_train(*both, TASKS, checkpoint=tmp_path, resume=True, **LONG)
    assert same(state(*whole), state(*both))


def test_what_is_finished_is_loaded_and_not_trained_again(tmp_path: Path) -> None:
    both, again = pair(), pair(seed=1)
    fit = ph.meta_train(*both, TASKS, checkpoint=tmp_path, **LONG)

    def never(step: int, fit: ph.Fit) -> None:
        raise Stop

    assert (
        ph.meta_train(*again, TASKS, checkpoint=tmp_path, resume=True, callback=never, **LONG)
        == fit
    )
    assert same(state(*both), state(*again)) and ph.load(tmp_path, *pair()) == fit


@quiet
def test_skips_are_remembered(tmp_path: Path) -> None:
    """Failures before and after the stop make a run of failures."""

    def poison(model: Fragile) -> Any:
        def change(step: int, fit: ph.Fit) -> None:
            model.failure = "nan" if step >= 2 else None
            if step == 5 and not both[0].noise.isnan():
                raise Stop

        return change

    both = pair(model=Fragile)
    with pytest.raises(Stop):
        ph.meta_train(
            *both,
            TASKS,
            callback=poison(both[0]),
            checkpoint=tmp_path,
            max_skips=6,
            **{**LONG, "every": 1},
        )
    again = pair(model=Fragile)
    again[0].failure = "nan"
    with pytest.raises(ph.TrainingError, match="6 steps in a row up to step 8 "):
        ph.meta_train(
            *again, TASKS, checkpoint=tmp_path, resume=True, max_skips=6, **{**LONG, "every": 1}
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 25),
        ("seed", 1),
        ("learning_rate", 1e-3),
        ("batch_size", 4),
        ("clip", 5.0),
        ("curriculum", {0.0: 3}),
    ],
)
def test_a_training_with_other_settings_is_not_the_same_training(
    tmp_path: Path, name: str, value: object
) -> None:
    stopped_at(7, pair(), checkpoint=tmp_path, **LONG)
    with pytest.raises(
        ValueError, match=f"{name} = .*, as in the training to be resumed; got .* Pass what it was"
    ):
        ph.meta_train(*pair(), TASKS, checkpoint=tmp_path, resume=True, **{**LONG, name: value})


def test_other_data_are_noticed(tmp_path: Path) -> None:
    stopped_at(7, pair(), checkpoint=tmp_path, **LONG)
    with pytest.raises(ValueError, match="tasks = .*, as in the training to be resumed"):
        ph.meta_train(*pair(), TASKS[:-1], checkpoint=tmp_path, resume=True, **LONG)


def test_a_folder_with_checkpoints_is_not_trained_into_by_accident(tmp_path: Path) -> None:
    stopped_at(7, pair(), checkpoint=tmp_path, **LONG)
    with pytest.raises(
        ValueError, match="resume=True to go on after step-00000005; got 1 of them in "
    ):
        ph.meta_train(*pair(), TASKS, checkpoint=tmp_path, **LONG)
    with pytest.raises(
        ValueError, match="a folder to resume from; got none. Pass checkpoint=folder"
    ):
        ph.meta_train(*pair(), TASKS, resume=True, **LONG)


def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    stopped_at(12, pair(), checkpoint=tmp_path, **LONG)
    path = tmp_path / "step-00000010" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(
        ph.CheckpointError,
        match="step-00000010 can't be loaded: .* Go back to an earlier one: remove",
    ):
        ph.meta_train(*pair(), TASKS, checkpoint=tmp_path, resume=True, **LONG)
    for file in sorted(path.parent.iterdir()):
        file.unlink()
    path.parent.rmdir()
    whole, both = pair(), pair()
    ph.meta_train(*whole, TASKS, **LONG)
    ph.meta_train(*both, TASKS, checkpoint=tmp_path, resume=True, **LONG)  # from step 5
    assert same(state(*whole), state(*both))


def test_leftovers_are_cleared_away_and_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / f"{ASIDE}step-00000003").mkdir()
    (tmp_path / f"{ASIDE}step-00000003" / "state.pt").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    ph.meta_train(*pair(), TASKS, checkpoint=tmp_path, **SHORT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000006"]


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    fit = ph.meta_train(
        *pair(),
        TASKS,
        checkpoint=tmp_path,
        keep=3,
        **{**LONG, "every": 2, "held_out": TASKS, "learning_rate": 1.0, "curriculum": {0.0: None}},
    )
    best = min(fit.held_out[:-1], key=lambda look: look[1])[0] + 1
    assert best < 18  # a learning rate that spoils what was learned
    assert steps(tmp_path) == [best, 20, 22, 24]


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    ph.meta_train(*pair(), TASKS, checkpoint=tmp_path, **LONG)
    about = json.loads((tmp_path / "step-00000024" / MANIFEST).read_bytes())
    assert (about["step"], about["finished"], about["model"], about["guide"]) == (
        24,
        True,
        "Line",
        "AmortizedGuide",
    )
    assert about["settings"]["steps"] == 24 and about["settings"]["curriculum"] == [
        [0.0, 2],
        [0.4, None],
    ]


# ---- Ctrl-C --------------------------------------------------------------------------------------


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C as in a terminal: what is started in the background may have been told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


SCRIPT = """
import signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {tests!r})
from test_checkpoint import LONG, TASKS, pair, ph
def slowly(step, fit):
    print(step, flush=True)
    time.sleep(0.05)
ph.meta_train(*pair(), TASKS, checkpoint={folder!r}, callback=slowly, **{{**LONG, "progress": True}})
"""


@pytest.mark.parametrize(
    ("number", "ends_with"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path, number: int, ends_with: int) -> None:
    folder = tmp_path / "run"
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder))
    run = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    for line in run.stdout:
        if line.strip() == "7":
            run.send_signal(number)
            break
    _, said = run.communicate(timeout=60)
    assert run.returncode == ends_with, said
    step = steps(folder)[-1]
    assert (
        step in (8, 9) and f"Stopped after step {step} of 24, which is saved in {folder}." in said
    )
    assert "The same call with resume=True goes on" in said
    whole, both = pair(), pair()
    ph.meta_train(*whole, TASKS, **LONG)
    ph.meta_train(*both, TASKS, checkpoint=folder, resume=True, **LONG)
    assert same(state(*whole), state(*both))


@pytest.mark.usefixtures("heeded")
def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    def twice(step: int, fit: ph.Fit) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5.0)

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        ph.meta_train(*pair(), TASKS, checkpoint=tmp_path, callback=twice, **LONG)
    assert time.perf_counter() - start < 4.0 and steps(tmp_path) == []


@pytest.mark.usefixtures("heeded")
def test_a_signal_in_the_last_step_ends_a_training_that_is_finished_and_saved(
    tmp_path: Path,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        ph.meta_train(
            *pair(),
            TASKS,
            checkpoint=tmp_path,
            **LONG,
            callback=lambda step, fit: os.kill(os.getpid(), signal.SIGINT) if step == 23 else None,
        )
    assert steps(tmp_path) == [20, 24] and read(tmp_path / "step-00000024").about["finished"]


@pytest.mark.usefixtures("heeded")
def test_a_signal_that_was_to_be_ignored_is_ignored(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fit = ph.meta_train(
        *pair(),
        TASKS,
        checkpoint=tmp_path,
        **LONG,
        callback=lambda step, fit: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None,
    )
    assert len(fit.loss) == LONG["steps"] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("checkpoint", [True, False])
def test_handlers_of_signals_are_as_before(tmp_path: Path, checkpoint: bool) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(step: int, fit: ph.Fit) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        ph.meta_train(
            *pair(),
            TASKS,
            checkpoint=tmp_path / "run" if checkpoint else None,
            callback=interrupt,
            **LONG,
        )
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert (tmp_path / "run").exists() == checkpoint


def test_the_progress_bar_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_at(12, pair(), checkpoint=tmp_path, **LONG)
    ph.meta_train(*pair(), TASKS, checkpoint=tmp_path, resume=True, **{**LONG, "progress": True})
    said = capsys.readouterr().err
    assert "10/24" in said and "24/24" in said and " 9/24" not in said
