"""Run one experiment or all of them: ``python examples/experiments identify --seeds 3``.

Each run writes its numbers to a JSON file, and a run whose file exists is not repeated: stop at any time and give the
same command again. The table and the figure are made from these files alone.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import torch

from experiments.run import Choice, carry_out, results

__all__ = ["NAMES", "experiment", "main", "parse_arguments"]

NAMES = (
    "identify",
    "literature",
    "long_horizon",
    "out_of_distribution",
    "sample_size",
    "seed_agreement",
    "real_pendulum",
    "unlabelled",
)


def experiment(name: str) -> Any:
    """Import the module of an experiment."""
    return importlib.import_module(f"experiments.{name}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    titles = "\n".join(
        f"  {name:<21}{(experiment(name).__doc__ or '').splitlines()[0]}" for name in NAMES
    )
    parser = argparse.ArgumentParser(
        "python examples/experiments",
        description=f"{__doc__}\n{titles}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", choices=(*NAMES, "all"), metavar="NAME", help="an experiment, or all"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of seeds, counted from 0 (default: 3)"
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="tiny runs that test the code; their numbers mean nothing",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for results and trained models (default: out/experiments, "
        "with --fast out/experiments-fast)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with the real double pendulum's recordings (default: "
        "PYRO_HYBRID_DATA, or a download)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--report",
        action="store_true",
        help="run nothing; write the table and the figure of the existing results",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the experiments, write NAME.md and NAME.png beside their results, and print the tables."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    folder = options.out or Path("out/experiments-fast" if options.fast else "out/experiments")
    choice = Choice(range(options.seeds), options.fast, folder, options.data)
    for name in NAMES if options.name == "all" else (options.name,):
        module = experiment(name)
        finished = results(module, choice) if options.report else carry_out(module, choice)
        if not finished:
            print(f"{name}: no results in {folder / name} yet")
            continue
        text = module.table(finished)
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        module.figure(finished).savefig(folder / f"{name}.png", dpi=130)
        print(f"\n{text}\n\n{name}.md and {name}.png are in {folder}/")
