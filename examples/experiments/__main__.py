"""Run an experiment, or all of them: ``python examples/experiments identify --seeds 3``.

What has been done is not done again: stop it at any time, and say the same once more. Each run writes its numbers to
a JSON file, and the table and the figure are made from these files alone.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import torch

from experiments.run import Choice, carry_out, results

NAMES = (
    "identify",
    "literature",
    "longer",
    "beyond",
    "enough",
    "two_runs",
    "real_pendulum",
    "without_pairs",
)


def experiment(name: str) -> Any:
    """The module of an experiment."""
    return importlib.import_module(f"{__package__}.{name}")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    titles = "\n".join(
        f"  {name:<15}{(experiment(name).__doc__ or '').splitlines()[0]}" for name in NAMES
    )
    parser = argparse.ArgumentParser(
        "python examples/experiments",
        description=f"{__doc__}\n{titles}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", choices=(*NAMES, "all"), metavar="NAME", help="which of them, or all"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of seeds, from 0 on (default: 3)"
    )
    parser.add_argument(
        "--fast", action="store_true", help="tiny runs that show the way, not the result"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of results and trained models (default: out/experiments, "
        "with --fast out/experiments-fast)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of the real double pendulum's recordings (default: that of "
        "PYRO_HYBRID_DATA, or a download)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--report", action="store_true", help="run nothing: table and figure of what there is"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run, then write NAME.md and NAME.png beside the results, and print the table."""
    said = parsed(arguments)
    torch.set_num_threads(said.threads)
    folder = said.out or Path("out/experiments-fast" if said.fast else "out/experiments")
    choice = Choice(range(said.seeds), said.fast, folder, said.data)
    for name in NAMES if said.name == "all" else (said.name,):
        module = experiment(name)
        found = results(module, choice) if said.report else carry_out(module, choice)
        if not found:
            print(f"{name}: no results in {folder / name} yet")
            continue
        text = module.table(found)
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        module.figure(found).savefig(folder / f"{name}.png", dpi=130)
        print(f"\n{text}\n\n{name}.md and {name}.png are in {folder}/")


if __name__ == "__main__":
    main()
