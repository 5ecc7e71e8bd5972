"""What every experiment has: runs that write one JSON file each, and are never done twice."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

__all__ = ["Choice", "Experiment", "Result", "Run", "carry_out", "digits", "results", "slug"]

Result = dict[str, Any]


class Choice(NamedTuple):
    """What a user of the command line decides.

    Attributes:
        seeds: Of data, initial weights and training; each is a run of its own.
        fast: Tiny runs that show the way, not the result.
        folder: Where results and trained models are kept.
        data: The folder of the real double pendulum's recordings, or None.
    """

    seeds: Sequence[int] = (0, 1, 2)
    fast: bool = False
    folder: Path = Path("out/experiments")
    data: Path | None = None


class Run(NamedTuple):
    """One piece of an experiment: a name that becomes its file's, and what computes its numbers."""

    name: str
    compute: Callable[[], Result]


def slug(*words: object) -> str:
    """A run's name, that of its file.

    >>> slug("double pendulum", "APHYNITY, sets", 0)
    'double-pendulum_APHYNITY-sets_0'
    """
    return "_".join(map(str, words)).replace(",", "").replace(" ", "-")


def digits(value: Tensor) -> float | None:
    """A number for the JSON: four significant digits, and nothing where it isn't finite."""
    return float(f"{float(value):.4g}") if bool(value.isfinite()) else None


@runtime_checkable
class Experiment(Protocol):
    """A module of this package: the runs it consists of, and a table and a figure made from their results alone."""

    __name__: str
    __doc__: str | None

    def runs(self, choice: Choice) -> list[Run]:
        """Every run, in the order in which they should be done."""

    def table(self, results: Sequence[Result]) -> str:
        """The results as a table in Markdown."""

    def figure(self, results: Sequence[Result]) -> Figure:
        """The results as a picture."""


def carry_out(experiment: Experiment, choice: Choice) -> list[Result]:
    """Do what has not been done yet, and return all results."""
    folder = _folder(experiment, choice)
    todo = [run for run in experiment.runs(choice) if not (folder / f"{run.name}.json").exists()]
    for run in tqdm(todo, desc=folder.name, unit="run", disable=not todo):
        began, processor = time.perf_counter(), time.process_time()
        numbers = run.compute()
        _write(
            folder / f"{run.name}.json",
            {
                "run": run.name,
                **numbers,
                "fast": choice.fast,
                "seconds": round(time.perf_counter() - began, 1),
                "processor_seconds": round(time.process_time() - processor, 1),
                "threads": torch.get_num_threads(),
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "pyro": pyro.__version__,
                },
            },
        )
    return results(experiment, choice)


def results(experiment: Experiment, choice: Choice) -> list[Result]:
    """What earlier runs wrote, in the order of the experiment's runs; those still to be done are left out."""
    paths = [_folder(experiment, choice) / f"{run.name}.json" for run in experiment.runs(choice)]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def _folder(experiment: Experiment, choice: Choice) -> Path:
    return choice.folder / experiment.__name__.rpartition(".")[2]


def _write(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)
