"""Write the page of the experiments: ``python docs/results/experiments.py [--results out/experiments]``.

With ``--results``, the results that ``python examples/experiments all`` wrote there are first gathered into
``docs/results/experiments/``, one file an experiment; runs that aren't there stay as they were. The tables of
``docs/experiments.md``, each between two markers, and the figures in ``docs/images`` are made from these files alone.
The results on APHYNITY's own pendulum are those of ``docs/results/aphynity.json``.
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
    """Gather the runs of an experiment; committed runs fill in for missing ones, and tiny ones are refused."""
    choice = Choice(range(seeds), folder=folder)
    finished = results(experiment(name), choice)
    if any(run["fast"] for run in finished):
        raise SystemExit(
            f"expected full runs in {folder / name}; got some with --fast. Run them without."
        )
    by_name = {run["run"]: run for run in (*kept(name), *finished)}
    ordered = [
        by_name.pop(run.name) for run in experiment(name).runs(choice) if run.name in by_name
    ]
    return ordered + list(by_name.values())


def kept(name: str) -> list[Result]:
    """Read the committed results of an experiment."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def filled(page: str) -> str:
    """Put every table into its place on the page."""
    tables = {name: experiment(name).table(kept(name)) for name in NAMES if kept(name)}
    for name, table in {**tables, "aphynity": aphynity()}.items():
        begin = f"<!-- {name} -->"
        end = f"<!-- /{name} -->"
        before, _, after = page.partition(begin)
        page = f"{before}{begin}\n\n{table}\n\n{end}{after.partition(end)[2]}"
    return page


def aphynity() -> str:
    """Tabulate APHYNITY on the pendulum of its own paper beside published numbers: logarithms of both bases."""
    ours = json.loads((FOLDER.parent / "aphynity.json").read_text(encoding="utf-8"))
    rows = []
    for name, physics, mse, error in PUBLISHED:
        numbers = ours[physics]
        errors = [numbers["error_percent_of_omega_squared"]]
        if "friction" in numbers["error_percent"]:
            errors.append(numbers["error_percent"]["friction"])
        percent = statistics.mean(abs(value) for value in errors)
        rows.append(
            [
                name,
                f"{numbers['log10_mse'] * math.log(10.0):.1f}",
                f"{numbers['log10_mse']:.1f}",
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
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name in NAMES:
        finished = gathered(name, options.results, options.seeds) if options.results else []
        if finished:
            text = json.dumps(finished, indent=1) + "\n"
            (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
        committed = kept(name)
        if committed:
            figure = experiment(name).figure(committed)
            figure.savefig(IMAGES / f"experiments_{name}.png", dpi=110)
            print(f"{name}: {len(committed)} runs")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
