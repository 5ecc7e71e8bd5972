"""identify: from a program and its data to a posterior, in one call."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from pyro_hybrid.data.tasks import Tasks, require_tasks
from pyro_hybrid.errors import fail, require, require_seed
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.fitting.identify_stages import STAGES, Given, StageFunction
from pyro_hybrid.fitting.posterior import Posterior
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.programs.module import HybridModel, one_thread
from pyro_hybrid.training.storage import CheckpointError, is_stored

__all__ = ["identify"]

HELD_OUT = 0.1  # share of the tasks that stages judge themselves on
MOST_HELD_OUT = 40


def identify(
    model: HybridModel,
    tasks: Tasks,
    *,
    seed: int = 0,
    progress: bool = True,
    stages: Mapping[str, StageFunction | None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Posterior:
    """Fit a program to data, and say how far its answer can be trusted, in one call.

    Runs these stages, each of which takes a posterior and returns a new one:

    1. ``"fit"``: bring the weights of the neural terms, the noise and the population to their optimum by Gauss-Newton
       over many systems, from random weights, until steps stop lowering the costs;
    2. ``"gauge"``: credit the physics with all that it explains, if the model owns a :class:`~pyro_hybrid.Gauge`;
    3. ``"read"``: choose as many iterations and restarts for the reading of a system as help;
    4. ``"intervals"``: scale intervals so that halves of a system's shots agree as often as they should;
    5. ``"judge"``: look for signs that the fit failed, and name what to do about each;
    6. ``"certify"``: check which latents the data identify.

    A tenth of the tasks (up to 40) is held out from the first stage, and stages judge themselves on it. The model that
    is passed in stays as it was; the posterior's has the precision of the tasks. ``print(posterior)`` says what each stage did.

    Arguments:
        model: the program. Its prior may read supports with ``ph.GaussNewton()``; encoders aren't needed.
        tasks: the data.
        seed: seed of everything random. The same seed gives the same posterior.
        progress: show progress bars, and a line at the end of each stage.
        stages: changes to the stages above, by name: None leaves one out, and a function
            ``(posterior, given) -> posterior`` takes its place.
        checkpoint: a folder in which each finished stage is saved.
        resume: go on after the last stage in that folder; the posterior is the same bit for bit.

    Returns:
        The posterior.
    """
    _check(model, tasks, seed)
    steps = _chosen(stages)
    store = None if checkpoint is None else _Store(Path(checkpoint), _fingerprint(tasks, seed))
    require(
        store is not None or not resume,
        "a folder to resume from",
        "none",
        "Pass checkpoint=folder.",
    )
    posterior = Posterior(model, AmortizedGuide(model, GaussNewton(2))).copy()
    posterior.model.to(tasks.values.dtype)
    num_done = 0
    if store is not None:
        posterior, num_done = store.last(posterior, list(steps), resume)
    train, held_out = _split(tasks)
    given = Given(train, held_out, seed, progress)
    with one_thread():
        for number, (name, step) in enumerate(steps.items()):
            if number < num_done:
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                posterior = step(posterior, given)
            if store is not None:
                store.save(posterior, number, name)
            if progress and posterior.stages:
                tqdm.write(f"{name}: {posterior.stages[-1].summary}", file=sys.stderr)
    return posterior


def _check(model: object, tasks: object, seed: object) -> None:
    require(
        isinstance(model, HybridModel),
        "a HybridModel",
        type(model).__name__,
        "Derive the model from ph.HybridModel.",
        TypeError,
    )
    require_tasks(tasks)
    require_seed(seed)


def _chosen(changes: Mapping[str, StageFunction | None] | None) -> dict[str, StageFunction]:
    """Return the stages with the changes applied, in order."""
    changes = dict(changes or {})
    unknown = sorted(set(changes) - set(STAGES))
    require(
        not unknown,
        f"stages among {', '.join(STAGES)}",
        ", ".join(unknown),
        "Run stages of your own on the posterior afterwards.",
    )
    merged = {name: changes.get(name, step) for name, step in STAGES.items()}
    return {name: step for name, step in merged.items() if step is not None}


def _split(tasks: Tasks) -> tuple[Tasks, Tasks]:
    """Hold out a tenth of the tasks; of fewer than ten, nothing is held out, and stages judge what was trained on."""
    number = min(int(HELD_OUT * len(tasks)), MOST_HELD_OUT)
    return tasks.split(number) if number else (tasks, tasks)


def _fingerprint(tasks: Tasks, seed: int) -> str:
    """Identify data and seed, which a resumed call must share."""
    content = hashlib.sha256(tasks.values.contiguous().cpu().numpy().tobytes())
    content.update(tasks.times.contiguous().cpu().numpy().tobytes())
    return f"{content.hexdigest()[:16]}-{seed}"


class _Store(NamedTuple):
    """A folder with a posterior for each finished stage."""

    folder: Path
    fingerprint: str

    def path(self, number: int, name: str) -> Path:
        """Return the place of a stage."""
        return self.folder / f"{number:02d}-{name}-{self.fingerprint}"

    def save(self, posterior: Posterior, number: int, name: str) -> None:
        """Save the posterior after a stage."""
        self.folder.mkdir(parents=True, exist_ok=True)
        posterior.save(self.path(number, name))

    def last(self, posterior: Posterior, names: list[str], resume: bool) -> tuple[Posterior, int]:
        """Return the posterior after the last finished stage, and the number of those stages."""
        found = sorted(self.folder.glob("[0-9][0-9]-*")) if self.folder.is_dir() else []
        require(
            resume or not found,
            "a folder without finished stages, or resume=True to go on after them",
            f"{len(found)} of them in {self.folder}",
            "Pass resume=True, or choose another folder.",
            CheckpointError,
        )
        strange = [path.name for path in found if not path.name.endswith(self.fingerprint)]
        if strange:
            fail(
                "the data and the seed of the call to be resumed",
                f"stages of others in {self.folder}: {strange[0]}",
                "Pass the same tasks and seed, or choose another folder.",
                CheckpointError,
            )
        for number in reversed(range(len(names))):
            path = self.path(number, names[number])
            if is_stored(path):
                return Posterior.load(path, posterior.model, posterior.guide), number + 1
        return posterior, 0
