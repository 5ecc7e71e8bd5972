"""Trainings that were stopped and go on, bit for bit, and models that are saved and loaded."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Note
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from test_storage import forged, manifest
from test_training import SHORT, TASKS, Fragile, pair, quiet, same, state
from torch import Tensor, nn
from toys import SYSTEMS, Line

import pyro_hybrid as ph
from pyro_hybrid.training.fit import step_folders
from pyro_hybrid.training.lock import LOCK
from pyro_hybrid.training.storage import ASIDE, MANIFEST, STATE, TRAINING, read

LONG: dict[str, Any] = {
    **SHORT,
    "num_steps": 24,
    "eval_every": 5,
    "average_last": 0.4,
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
    return [int(path.name[5:]) for path in step_folders(folder)]


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
    wrapped._orig_mod = both[0].prior.network.encoder.joint
    both[0].prior.network.encoder.joint = wrapped
    assert any("_orig_mod" in name for name in both[0].state_dict())
    ph.Fit().save(tmp_path / "saved", *both)
    ph.load(tmp_path / "saved", *others)
    assert same(state(*both), state(*others))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"inferred": False, "sites": {"slope": ph.families.Normal(1)}},
            r"model\.prior\S* of shape .*, as this model's; got shape .* in torch.float32",
        ),
        (
            {"evidence": ph.GaussNewton(1)},
            r"the tensors of this model; got one that has guide\.\S+",
        ),
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
        match=f"saved, of a Line, to be a checkpoint with {said}.* Build model and guide as they were",
    ):
        ph.load(tmp_path / "saved", *others)
    assert same(before, state(*others))


def test_a_damaged_checkpoint_changes_nothing(tmp_path: Path) -> None:
    both = pair()
    ph.Fit().save(tmp_path / "saved", *both)
    path = tmp_path / "saved" / STATE
    path.write_bytes(path.read_bytes()[:-1])
    others = pair(seed=1)
    before = state(*others)
    with pytest.raises(
        ph.CheckpointError,
        match=r"state.json as it was written; got other bytes \(its checksum differs\)",
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


RECIPE: dict[str, Any] = {
    "num_steps": 20,
    "batch_size": 5,
    "learning_rate": 1e-2,
    "seed": 4,
    "curriculum": {0.0: 1, 0.4: 2, 0.8: None},
    "segments_per_shot": 2,
    "warmup": 0.3,
    "penalty_weights": {"projection": ph.Ramp(30.0, power=2), "nonlinearity": ph.Ramp(0.3)},
    "average_last": 0.3,
    "eval_every": 3,
    "progress": False,
}
EARLY = {"patience": 3, "eval_every": 2}  # ends early, at the best state


class Recipe:
    """A training as the examples have it: everything that steers one, in one."""

    def __init__(self) -> None:
        self.system = SYSTEMS["pendulum"]()
        self.train, self.held_out = self.system.simulate(16, 4, seed=0).split(6)
        self.known: dict[str, tuple[list[Tensor], ph.Fit]] = {}

    def uninterrupted(self, **options: Any) -> tuple[list[Tensor], ph.Fit]:
        """What comes out without a stop, once for all tests."""
        key = f"{options} on {torch.get_num_threads()}"
        if key not in self.known:
            self.known[key] = self.run(**options)
        return self.known[key]

    def run(self, seed: int = 0, **options: Any) -> tuple[list[Tensor], ph.Fit]:
        """Train a new model; return its state and the record."""
        torch.manual_seed(seed)
        model = ph.models.MetaHybridVAE(self.system, linear=False, straightness=0.1, noise=10.0)
        guide = model.guide()
        options = {"held_out": self.held_out, **RECIPE, **options}
        fit = ph.meta_train(model, guide, self.train, **options)
        return state(model, guide), fit

    def resumed(self, folder: Path, stop: int, **options: Any) -> tuple[list[Tensor], ph.Fit]:
        """What comes out after a stop and a resumption into another model."""

        def interrupt(step: int, fit: ph.Fit) -> None:
            if step == stop:
                raise Stop

        with pytest.raises(Stop):
            self.run(checkpoint=folder, callback=interrupt, **options)
        return self.run(seed=99, checkpoint=folder, resume=True, **options)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe()


def history(fit: ph.Fit) -> list[str]:
    """Everything that was recorded but the time; as text, where NaN equals NaN."""
    told = vars(copy.copy(fit)) | {"seconds": 0, "seconds_compiling": 0}
    return [f"{name}: {value}" for name, value in told.items()]


def assert_resumes(recipe: Recipe, folder: Path, turn: int) -> None:
    """Stop at a random step, resume, and compare with a training without a stop, bit for bit."""
    options = EARLY if turn % 2 else {}
    expected, fit = recipe.uninterrupted(**options)
    first = options.get("eval_every", RECIPE["eval_every"])  # after which there is a checkpoint
    stop = random.Random(turn).randrange(first, len(fit.loss) - 1)
    found, again = recipe.resumed(folder, stop, **options)
    assert same(expected, found) and history(again) == history(fit), stop
    assert fit.stopped_early == bool(options)


@quiet
@pytest.mark.parametrize("turn", range(5))
def test_the_full_recipe_resumes_bit_for_bit_at_a_random_stop(
    recipe: Recipe, tmp_path: Path, turn: int
) -> None:
    assert_resumes(recipe, tmp_path, turn)


@quiet
@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("turn", range(20))
def test_the_full_recipe_resumes_bit_for_bit_at_20_random_stops(
    recipe: Recipe, tmp_path: Path, turn: int, threads: int, figure: Note
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_resumes(recipe, tmp_path, turn + 100)
        figure("resume", **{f"equal_on_{threads}": 1})
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
            **{**LONG, "eval_every": 1},
        )
    again = pair(model=Fragile)
    again[0].failure = "nan"
    with pytest.raises(ph.TrainingError, match="6 steps in a row up to step 8 "):
        ph.meta_train(
            *again,
            TASKS,
            checkpoint=tmp_path,
            resume=True,
            max_skips=6,
            **{**LONG, "eval_every": 1},
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_steps", 25),
        ("seed", 1),
        ("learning_rate", 1e-3),
        ("batch_size", 4),
        ("clip", 5.0),
        ("clip", math.inf),
        ("loss", Trace_ELBO()),
        ("loss", TraceMeanField_ELBO(num_particles=10)),
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


@pytest.mark.parametrize("first", [None, TraceMeanField_ELBO()])
def test_a_loss_is_compared_by_value(tmp_path: Path, first: Any) -> None:
    """The default is what it stands for, and a loss that has been used is what it was."""
    stopped_at(7, pair(), checkpoint=tmp_path, loss=first, **LONG)
    whole, both, again = pair(), pair(), TraceMeanField_ELBO(vectorize_particles=True)
    ph.meta_train(*whole, TASKS, **LONG)
    for other in (TraceMeanField_ELBO(retain_graph=True), again):
        with pytest.raises(ValueError, match="loss = .*, as in the training to be resumed"):
            ph.meta_train(*both, TASKS, checkpoint=tmp_path, resume=True, loss=other, **LONG)
    ph.meta_train(
        *both, TASKS, checkpoint=tmp_path, resume=True, loss=TraceMeanField_ELBO(), **LONG
    )
    assert same(state(*whole), state(*both))


def test_a_loss_that_learned_its_nesting_is_still_the_same(tmp_path: Path) -> None:
    loss = TraceMeanField_ELBO(num_particles=2, vectorize_particles=True)
    stopped_at(7, pair(), checkpoint=tmp_path, loss=loss, **LONG)
    assert math.isfinite(loss.max_plate_nesting)
    whole, both = pair(), pair()
    ph.meta_train(
        *whole, TASKS, loss=TraceMeanField_ELBO(num_particles=2, vectorize_particles=True), **LONG
    )
    ph.meta_train(*both, TASKS, checkpoint=tmp_path, resume=True, loss=loss, **LONG)
    assert same(state(*whole), state(*both))


class Twin(Line):
    """Another program whose parameters have the same names and shapes."""


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model", lambda: pair(ph.GaussNewton(1), model=Twin)),
        ("evidence", lambda: pair(ph.GaussNewton(2))),
        ("evidence", lambda: pair(ph.GaussNewton(1, segments=(2,)))),
    ],
)
def test_another_program_and_other_evidence_are_noticed(
    tmp_path: Path, name: str, other: Callable[[], Any]
) -> None:
    stopped_at(7, pair(ph.GaussNewton(1)), checkpoint=tmp_path, **LONG)
    both = other()
    before = state(*both)
    with pytest.raises(ValueError, match=f"{name} = .*, as in the training to be resumed; got"):
        ph.meta_train(*both, TASKS, checkpoint=tmp_path, resume=True, **LONG)
    assert same(state(*both), before)


@pytest.mark.parametrize(
    ("weights", "is_the_same"),
    [
        ({"projection": ph.Ramp(30.0, 2)}, True),
        ({"projection": ph.Ramp(final=30.0, power=2.0), "nonlinearity": 0.1}, True),
        ({"projection": ph.Ramp(30.0)}, False),
        ({"projection": 30.0}, False),
        ({"projection": ph.Ramp(30.0, 2), "nonlinearity": 0.2}, False),
        (None, False),
    ],
)
def test_penalty_weights_are_compared_by_value(
    recipe: Recipe, tmp_path: Path, weights: Any, is_the_same: bool
) -> None:
    def interrupt(step: int, fit: ph.Fit) -> None:
        if step == 3:
            raise Stop

    options = {"checkpoint": tmp_path, "num_steps": 5}
    begun = {"projection": ph.Ramp(30.0, power=2)}
    with pytest.raises(Stop):
        recipe.run(callback=interrupt, penalty_weights=begun, **options)
    if is_the_same:
        _, fit = recipe.run(resume=True, penalty_weights=weights, **options)
        assert len(fit.loss) == 5
    else:
        with pytest.raises(
            ValueError, match="penalty_weights = .*, as in the training to be resum"
        ):
            recipe.run(resume=True, penalty_weights=weights, **options)


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
        match="step-00000010 with model.safetensors as .* Go back to an earlier checkpoint: remove",
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
    (tmp_path / f"{ASIDE}step-00000003" / STATE).write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    ph.meta_train(*pair(), TASKS, checkpoint=tmp_path, **SHORT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-00000006"]


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    fit = ph.meta_train(
        *pair(),
        TASKS,
        checkpoint=tmp_path,
        keep_last=3,
        **{
            **LONG,
            "eval_every": 2,
            "held_out": TASKS,
            "learning_rate": 1.0,
            "curriculum": {0.0: None},
        },
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
    assert about["settings"]["num_steps"] == 24 and about["settings"]["curriculum"] == [
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
import signal, socket, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {tests!r})
from test_checkpoint import LONG, TASKS, pair, ph
arrivals, sender = socket.socketpair()
arrivals.settimeout(600)  # guards against a hang alone
sender.setblocking(False)
signal.set_wakeup_fd(sender.fileno())  # a byte arrives with every signal
def wait(step, fit):
    if step == 7:
        print("ready", flush=True)
        arrivals.recv(1)
ph.meta_train(*pair(), TASKS, checkpoint={folder!r}, callback=wait, **{{**LONG, "progress": True}})
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
        if line.strip() == "ready":
            run.send_signal(number)
            break
    _, said = run.communicate(timeout=600)  # guards against a hang alone
    assert run.returncode == ends_with, said
    assert steps(folder) == [5, 8] and not (folder / LOCK).exists()
    assert f"Stopped after step 8 of 24, which is saved in {folder}." in said
    assert "The same call with resume=True goes on" in said
    whole, both = pair(), pair()
    ph.meta_train(*whole, TASKS, **LONG)
    ph.meta_train(*both, TASKS, checkpoint=folder, resume=True, **LONG)
    assert same(state(*whole), state(*both))


@pytest.mark.usefixtures("heeded")
def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    reached = []

    def twice(step: int, fit: ph.Fit) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            reached.append("after the first")
            signal.raise_signal(signal.SIGINT)
            reached.append("after the second")

    with pytest.raises(KeyboardInterrupt):
        ph.meta_train(*pair(), TASKS, checkpoint=tmp_path, callback=twice, **LONG)
    assert reached == ["after the first"] and list(tmp_path.iterdir()) == []


def test_a_training_whose_signal_handler_returns_does_not_pass_for_finished(tmp_path: Path) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with pytest.raises(
            ph.TrainingError, match="expected 24 steps; got 4 of them before SIGTERM"
        ):
            ph.meta_train(
                *pair(),
                TASKS,
                checkpoint=tmp_path,
                callback=lambda step, fit: step == 3 and signal.raise_signal(signal.SIGTERM),
                **LONG,
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] and steps(tmp_path) == [4]


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
    assert len(fit.loss) == LONG["num_steps"] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


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


# ---- files from a stranger, with every seal right ------------------------------------------------

Edit = Callable[[Path], None]


def edit_manifest(**changes: Any) -> Edit:
    """Change fields of the manifest; ``...`` removes one."""

    def edit(folder: Path) -> None:
        about = json.loads((folder / MANIFEST).read_bytes()) | changes
        manifest(folder, {name: value for name, value in about.items() if value is not ...})

    return edit


def edit_state(*path: str, value: Any) -> Edit:
    """Change one value of the state, by the keys that lead to it; ``...`` removes it."""

    def edit(folder: Path) -> None:
        stored = json.loads((folder / STATE).read_bytes())
        inner = stored
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        if value is ...:
            del inner[path[-1]]
        forged(folder, state=json.dumps(stored, indent=2, sort_keys=True).encode())

    return edit


def edit_training(change: Callable[[dict[str, Tensor]], object]) -> Edit:
    """Change the tensors that a resumed training needs."""

    def edit(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / TRAINING)
        change(tensors)
        forged(folder, training=safetensors.torch.save(tensors))

    return edit


MOMENT = "optimizer/model.prior.network.head.1.weight/exp_avg"


def set_to(name: str, value: Callable[[Tensor], Tensor]) -> Edit:
    return edit_training(lambda tensors: tensors.update({name: value(tensors[name])}))


SEALED: dict[str, tuple[Edit, str]] = {
    "no step": (edit_manifest(step=...), "step to be of type int; got None"),
    "a step in words": (edit_manifest(step="x"), "step to be of type int; got 'x'"),
    "a step that is a fraction": (edit_manifest(step=5.5), "step to be of type int; got 5.5"),
    "a step that is NaN": (edit_manifest(step=math.nan), "a manifest in manifest.json"),
    "a negative step": (edit_manifest(step=-1), "the step of its name, of 24 steps; got step -1"),
    "another step": (edit_manifest(step=6), "the step of its name, of 24 steps; got step 6"),
    "a step beyond": (edit_manifest(step=10**30), "the step of its name, of 24 steps; got step 10"),
    "no finished": (edit_manifest(finished=...), "finished to be of type bool; got None"),
    "a finished that is a number": (
        edit_manifest(finished=1),
        "finished to be of type bool; got 1",
    ),
    "finished, without being": (edit_manifest(finished=True), "all of its 24 steps; got 5 of them"),
    "no settings": (edit_manifest(settings=...), "settings, a JSON object; got None"),
    "settings in a list": (edit_manifest(settings=[]), r"settings, a JSON object; got \[\]"),
    "empty settings": (
        edit_manifest(settings={}),
        "num_steps = None, as in the training to be res",
    ),
    "held_out in words": (edit_manifest(held_out="low"), "held_out to be a number; got 'low'"),
    "no fit": (edit_state("fit", value=...), "fit to be a JSON object; got None"),
    "a fit in a list": (edit_state("fit", value=[]), r"fit to be a JSON object; got \[\]"),
    "a fit without losses": (edit_state("fit", "loss", value=...), "fit with the fields loss, log"),
    "a loss in words": (edit_state("fit", "loss", value=["a"]), r"fit.loss\[0\] to be a number; g"),
    "a shorter history": (
        edit_state("fit", "loss", value=[0.5]),
        "histories of equal lengths; got",
    ),
    "a look without its value": (
        edit_state("fit", "held_out", value=[[3]]),
        r"fit.held_out\[0\] with 2 values; got \[3\]",
    ),
    "a task in words": (
        edit_state("fit", "skipped_tasks", value={"first": 1}),
        "fit.skipped_tasks with whole numbers as keys; got 'first'",
    ),
    "no counters": (edit_state("counters", value=...), "counters to be a JSON object; got None"),
    "counters without names": (
        edit_state("counters", value=[0.0, 0, 0, 0, 0.0, ""]),
        "counters to be a JSON object; got",
    ),
    "one counter more": (edit_state("counters", "more", value=1), "counters with the fields step,"),
    "another counter of steps": (
        edit_state("counters", "step", value=6),
        "a history of 6 steps; got",
    ),
    "a negative counter": (
        edit_state("counters", "num_averaged", value=-1),
        "counters of 0 or more; got",
    ),
    "a norm that is NaN": (
        edit_state("counters", "gradient_norm", value="nan"),
        "counters of 0 or more; got",
    ),
    "no training": (
        edit_training(lambda tensors: tensors.clear()),
        "a last good state with the tensors of this model; got one that has no model",
    ),
    "a tensor of nothing known": (
        edit_training(lambda tensors: tensors.update({"more/a": torch.ones(1)})),
        "tensors of optimizer, last_good, best, average, tasks; got more/a",
    ),
    "a moment that is too short": (
        set_to(MOMENT, lambda value: value.flatten()[:1].clone()),
        r"an optimizer's state with model.prior.network.head.1.weight/exp_avg of shape \(6, 8\)",
    ),
    "a moment of the same size": (
        set_to(MOMENT, lambda value: value.t().contiguous()),
        r"exp_avg of shape \(6, 8\) in torch.float32, as this model's; got shape \(8, 6\)",
    ),
    "a moment in another precision": (
        set_to(MOMENT, lambda value: value.double()),
        r"in torch.float32, as this model's; got shape \(6, 8\) in torch.float64",
    ),
    "a moment that is missing": (
        edit_training(lambda tensors: tensors.pop(MOMENT)),
        "got one that has no model.prior.network.head.1.weight/exp_avg",
    ),
    "a moment of a parameter that isn't there": (
        edit_training(lambda tensors: tensors.update({"optimizer/model.a/step": torch.ones(())})),
        "got one that has model.a/step, too",
    ),
    "a moment that is NaN": (
        set_to(MOMENT, lambda value: value * math.nan),
        "finite moments of the optimizer; got others in model.prior.network.head.1.weight/exp_avg",
    ),
    "a negative second moment": (
        set_to(f"{MOMENT}_sq", lambda value: value - 1.0),
        "finite moments of the optimizer; got others in model.prior.network.head.1.weight/exp_avg_sq",
    ),
    "a step of the optimizer with a shape": (
        set_to("optimizer/model.prior.raw/step", lambda value: value.expand(3).clone()),
        r"raw/step of shape \(\) in torch.float32, as this model's; got shape \(3,\)",
    ),
    "visits of fewer tasks": (
        set_to("tasks/visits", lambda value: value[:-1].clone()),
        r"visits of tasks with visits of shape \(20,\)",
    ),
    "a last good state of another shape": (
        set_to("last_good/model.prior.raw", lambda value: value[:-1].clone()),
        "a last good state with model.prior.raw of shape",
    ),
    "an average before its time": (
        edit_training(lambda tensors: tensors.update({"average/model.prior.raw": torch.ones(6)})),
        "an average with the tensors of this model; got one that has model.prior.raw, too",
    ),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that was stopped after its checkpoint at step 5."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    stopped_at(7, pair(), checkpoint=folder, **LONG)
    return folder


@pytest.mark.parametrize("kind", SEALED)
def test_a_sealed_checkpoint_with_wrong_content_is_refused_and_changes_nothing(
    begun: Path, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    edit, words = SEALED[kind]
    edit(folder / "step-00000005")
    both = pair(seed=3)
    before = state(*both)
    with pytest.raises((ph.CheckpointError, ValueError), match=words):
        ph.meta_train(*both, TASKS, checkpoint=folder, resume=True, **LONG)
    assert same(state(*both), before) and not (folder / LOCK).exists()


@pytest.mark.parametrize(
    "edit",
    [
        edit_state("fit", value=...),
        edit_state("fit", "loss", value=["a"]),
        edit_state("fit", "seconds", value=True),
        edit_state("fit", "skipped_tasks", value=[1]),
        edit_manifest(format="2"),
    ],
)
def test_a_sealed_model_with_wrong_content_is_not_loaded_and_changes_nothing(
    tmp_path: Path, edit: Edit
) -> None:
    ph.Fit([1.0], [2.0], [3.0]).save(tmp_path / "saved", *pair())
    edit(tmp_path / "saved")
    others = pair(seed=1)
    before = state(*others)
    with pytest.raises(ph.CheckpointError, match="^expected .*; got .*"):
        ph.load(tmp_path / "saved", *others)
    assert same(before, state(*others))


def test_nothing_but_safetensors_and_json_is_written(begun: Path, tmp_path: Path) -> None:
    both = pair()
    ph.meta_train(*both, TASKS, **SHORT).save(tmp_path / "saved", *both)
    files = [*begun.rglob("*"), *tmp_path.rglob("*")]
    kinds = {path.suffix for path in files if path.is_file()}
    assert kinds == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_bytes(), parse_constant=pytest.fail)
        elif path.suffix == ".safetensors":
            assert safetensors.torch.load_file(path)


# ---- a name that is taken ------------------------------------------------------------------------


def test_a_finished_training_is_not_lost_to_a_name_that_is_taken(tmp_path: Path) -> None:
    both, others = pair(), pair(seed=1)
    fit = ph.meta_train(*both, TASKS, **SHORT)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved-1").write_text("taken, too")
    with pytest.raises(
        ph.CheckpointError,
        match="a folder that doesn't exist yet; got .*saved, which is there already. This training is "
        "saved in .*saved-2 instead: rename that folder, or pass overwrite=True",
    ):
        fit.save(tmp_path / "saved", *both)
    assert ph.load(tmp_path / "saved-2", *others) == fit and same(state(*both), state(*others))
    assert list((tmp_path / "saved").iterdir()) == []


def test_a_saved_training_is_overwritten_on_demand_and_other_folders_never(tmp_path: Path) -> None:
    first, second = pair(), pair(seed=1)
    ph.Fit().save(tmp_path / "saved", *first)
    ph.Fit([1.0], [1.0], [1.0]).save(tmp_path / "saved", *second, overwrite=True)
    others = pair(seed=2)
    assert ph.load(tmp_path / "saved", *others).loss == [1.0]
    assert same(state(*second), state(*others))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ph.CheckpointError, match="or a saved training to overwrite; got .*notes"):
        ph.Fit().save(tmp_path / "notes", *first, overwrite=True)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


def test_a_folder_that_can_not_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")

    def never(step: int, fit: ph.Fit) -> None:
        raise Stop

    both = pair()
    before = state(*both)
    with pytest.raises(
        ph.CheckpointError, match="a folder to write checkpoints into at .*file/run; got an error"
    ):
        ph.meta_train(*both, TASKS, checkpoint=tmp_path / "file" / "run", callback=never, **LONG)
    assert same(before, state(*both))


# ---- one training in a folder --------------------------------------------------------------------


def holder(**changes: Any) -> dict[str, Any]:
    """The content of a lock, by default of the process that runs the tests."""
    here = {"process": os.getpid(), "host": platform.node(), "started": "", "token": "a"}
    return here | changes


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(timeout=600)
    return child.pid


LOCKED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a living process": (
        lambda: holder(process=os.getppid()),
        f"got a lock of process {os.getppid()} on {platform.node()}",
    ),
    "this process": (holder, "got a lock of this very process"),
    "another machine": (
        lambda: holder(process=dead_process(), host="elsewhere"),
        r"got a lock of process \d+ on elsewhere",
    ),
    "nonsense": (lambda: {"process": "x"}, "got a lock of a process that can't be told"),
}


@pytest.mark.parametrize("kind", LOCKED)
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_is_locked_is_left_alone(tmp_path: Path, kind: str, resume: bool) -> None:
    make, words = LOCKED[kind]
    lock = json.dumps(make())
    (tmp_path / LOCK).write_text(lock)
    (tmp_path / f"{ASIDE}step-00000005").mkdir()  # which the other training is writing
    with pytest.raises(
        ph.CheckpointError,
        match=f"no other training writes into; .* is locked; {words}. Wait until it ends, or choose "
        f"another folder. If it is dead, remove {tmp_path / LOCK}",
    ):
        ph.meta_train(*pair(), TASKS, checkpoint=tmp_path, resume=resume, **LONG)
    assert (tmp_path / LOCK).read_text() == lock and (tmp_path / f"{ASIDE}step-00000005").exists()


@pytest.mark.parametrize("kind", ["dead", "reused"])
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path, kind: str) -> None:
    stopped_at(7, pair(), checkpoint=tmp_path, **LONG)
    reused = holder(process=os.getppid(), started="before it was started")
    left = reused if kind == "reused" else holder(process=dead_process())
    (tmp_path / LOCK).write_text(json.dumps(left))
    (tmp_path / f"{ASIDE}step-00000010").mkdir()
    whole, both = pair(), pair()
    ph.meta_train(*whole, TASKS, **LONG)
    held: list[Any] = []
    ph.meta_train(
        *both,
        TASKS,
        checkpoint=tmp_path,
        resume=True,
        callback=lambda step, fit: held.append(json.loads((tmp_path / LOCK).read_bytes())),
        **LONG,
    )
    assert same(state(*whole), state(*both))
    assert {one["process"] for one in held} == {os.getpid()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000024"]


def test_of_several_that_take_a_lock_over_one_does(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps(holder(process=dead_process())))
    (tmp_path / f"{LOCK}.turn").write_text(json.dumps(holder(process=os.getppid())))
    with pytest.raises(ph.CheckpointError, match=f"a lock of process {os.getppid()} .*{LOCK}.turn"):
        ph.meta_train(*pair(), TASKS, checkpoint=tmp_path, **LONG)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, f"{LOCK}.turn"]


def test_a_training_inside_another_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    words: list[str] = []

    def inside(step: int, fit: ph.Fit) -> None:
        if step == 7:
            with pytest.raises(ph.CheckpointError) as caught:
                ph.meta_train(*pair(), TASKS, checkpoint=tmp_path, resume=True, **LONG)
            words.append(str(caught.value))

    both, whole = pair(), pair()
    ph.meta_train(*both, TASKS, checkpoint=tmp_path, callback=inside, **LONG)
    ph.meta_train(*whole, TASKS, **LONG)
    assert len(words) == 1 and "a lock of this very process" in words[0]
    assert same(state(*both), state(*whole))


OTHER = """
import sys
sys.path.insert(0, {tests!r})
from test_checkpoint import LONG, TASKS, pair, ph
def wait(step, fit):
    if step == 7:
        print("ready", flush=True)
        sys.stdin.readline()
ph.meta_train(*pair(), TASKS, checkpoint={folder!r}, resume=True, callback=wait, **LONG)
print("done", flush=True)
"""


def test_a_second_job_in_the_folder_is_refused_and_the_first_one_ends_well(tmp_path: Path) -> None:
    script = OTHER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    first = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdin is not None and first.stdout is not None
    assert first.stdout.readline() == "ready\n"
    live = tmp_path / f"{ASIDE}step-00000010-{first.pid}-ab"  # as if it were being written
    live.mkdir()
    with pytest.raises(ph.CheckpointError, match=f"a lock of process {first.pid} on "):
        ph.meta_train(*pair(), TASKS, checkpoint=tmp_path, resume=True, **LONG)
    assert live.exists()
    out, _ = first.communicate("\n", timeout=600)  # guards against a hang alone
    assert first.returncode == 0 and out == "done\n"
    whole, both = pair(), pair()
    ph.meta_train(*whole, TASKS, **LONG)
    ph.meta_train(*both, TASKS, checkpoint=tmp_path, resume=True, **LONG)  # finished: it is loaded
    assert same(state(*whole), state(*both))
