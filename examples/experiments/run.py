"""Runs of an experiment: each writes one JSON file, and is not repeated once that exists."""

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
    """Choices made on the command line.

    Attributes:
        seeds: Seeds of data, initial weights and training; each is a run of its own.
        fast: Do tiny runs that test the code and whose numbers mean nothing.
        folder: Folder for results and trained models.
        data: Folder with the real double pendulum's recordings, or None.
    """

    seeds: Sequence[int] = (0, 1, 2)
    fast: bool = False
    folder: Path = Path("out/experiments")
    data: Path | None = None


class Run(NamedTuple):
    """One piece of an experiment: the name of its file, and the function that computes its numbers."""

    name: str
    compute: Callable[[], Result]


def slug(*words: object) -> str:
    """Join words into the name of a run and its file.

    >>> slug("double pendulum", "APHYNITY, sets", 0)
    'double-pendulum_APHYNITY-sets_0'
    """
    return "_".join(map(str, words)).replace(",", "").replace(" ", "-")


def digits(value: Tensor) -> float | None:
    """Round a number to four significant digits for the JSON; return None if it isn't finite."""
    return float(f"{float(value):.4g}") if bool(value.isfinite()) else None


@runtime_checkable
class Experiment(Protocol):
    """A module of this package: its runs, and a table and a figure made from their results alone."""

    __name__: str
    __doc__: str | None

    def runs(self, choice: Choice) -> list[Run]:
        """List the runs in the order in which to do them."""

    def table(self, results: Sequence[Result]) -> str:
        """Tabulate the results in Markdown."""

    def figure(self, results: Sequence[Result]) -> Figure:
        """Draw the results."""


def carry_out(experiment: Experiment, choice: Choice) -> list[Result]:
    """Do the runs that have no result yet, and return all results."""
    folder = _folder(experiment, choice)
    missing = [run for run in experiment.runs(choice) if not (folder / f"{run.name}.json").exists()]
    for run in tqdm(missing, desc=folder.name, unit="run", disable=not missing):
        start = time.perf_counter()
        processor_start = time.process_time()
        numbers = run.compute()
        _write(
            folder / f"{run.name}.json",
            {
                "run": run.name,
                **numbers,
                "fast": choice.fast,
                "seconds": round(time.perf_counter() - start, 1),
                "processor_seconds": round(time.process_time() - processor_start, 1),
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
    """Read the results of finished runs, in the order of the experiment's runs."""
    paths = [_folder(experiment, choice) / f"{run.name}.json" for run in experiment.runs(choice)]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def _folder(experiment: Experiment, choice: Choice) -> Path:
    return choice.folder / experiment.__name__.rpartition(".")[2]


def _write(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
