"""The page of the experiments, from their results: ``python docs/results/experiments.py [--results out/experiments]``.

With ``--results``, what ``python examples/experiments all`` wrote there is first gathered into
``docs/results/experiments/``, one file an experiment; runs that aren't there stay as they were. From these files, and
nothing else, come the tables of ``docs/experiments.md``, each between two markers, and the figures in ``docs/images``.
APHYNITY's own pendulum is that of ``docs/results/aphynity.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from experiments.command import NAMES, experiment
from experiments.run import Choice, Result, results
from experiments.tables import markdown

FOLDER = Path(__file__).parent / "experiments"
PUBLISHED = (
    ("pendulum without friction", "undamped", "-7.86 ± 0.60", "4.0%"),
    ("damped pendulum", "damped", "-8.31 ± 0.30", "0.39%"),
)
PAGE, IMAGES = (FOLDER.parents[1] / name for name in ("experiments.md", "images"))


def gathered(name: str, folder: Path, seeds: int) -> list[Result]:
    """What the runs of an experiment wrote, and in their places those that were kept; tiny ones are refused."""
    choice = Choice(range(seeds), folder=folder)
    found = results(experiment(name), choice)
    if any(one["fast"] for one in found):
        raise SystemExit(
            f"expected full runs in {folder / name}; got some with --fast. Run them without."
        )
    by_name = {one["run"]: one for one in (*kept(name), *found)}
    ordered = [
        by_name.pop(run.name) for run in experiment(name).runs(choice) if run.name in by_name
    ]
    return ordered + list(by_name.values())


def kept(name: str) -> list[Result]:
    """The committed results of an experiment."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def filled(page: str) -> str:
    """The page with every table in its place."""
    tables = {name: experiment(name).table(found) for name in NAMES if (found := kept(name))}
    for name, table in {**tables, "aphynity": aphynity()}.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, after = page.partition(begin)
        page = f"{before}{begin}\n\n{table}\n\n{end}{after.partition(end)[2]}"
    return page


def aphynity() -> str:
    """APHYNITY on the pendulum of its own paper, beside what was published: logarithms of both bases."""
    ours, rows = json.loads((FOLDER.parent / "aphynity.json").read_text(encoding="utf-8")), []
    for name, physics, mse, error in PUBLISHED:
        found = ours[physics]
        errors = [found["error_percent_of_omega_squared"], found["error_percent"].get("friction")]
        percent = statistics.mean(abs(e) for e in errors if e is not None)
        rows.append(
            [
                name,
                f"{found['log10_mse'] * math.log(10.0):.1f}",
                f"{found['log10_mse']:.1f}",
                mse,
                f"{percent:.2g}%",
                error,
            ]
        )
    return markdown(
        [
            "known physics",
            "ours, ln MSE",
            "ours, log10 MSE",
            "published, log MSE",
            "ours, error of parameters",
            "published",
        ],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, help="gather first what the runs wrote into this folder"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of seeds to gather (default: 3)"
    )
    said = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name in NAMES:
        if said.results and (found := gathered(name, said.results, said.seeds)):
            (FOLDER / f"{name}.json").write_text(
                json.dumps(found, indent=1) + "\n", encoding="utf-8"
            )
        if found := kept(name):
            experiment(name).figure(found).savefig(IMAGES / f"experiments_{name}.png", dpi=110)
            print(f"{name}: {len(found)} runs")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
