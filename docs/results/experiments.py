"""The page of the experiments, from their results: ``python docs/results/experiments.py [--results out/experiments]``.

With ``--results``, what ``python -m pyro_hybrid.experiments all`` wrote there is first gathered into
``docs/results/experiments/``, one file an experiment. From these files, and nothing else, come the tables of
``docs/experiments.md``, each between two markers, and the figures in ``docs/images``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pyro_hybrid.experiments.__main__ import NAMES, experiment
from pyro_hybrid.experiments.run import Choice, Result, results

FOLDER = Path(__file__).parent / "experiments"
PAGE, IMAGES = (FOLDER.parents[1] / name for name in ("experiments.md", "images"))


def gathered(name: str, folder: Path, seeds: int) -> list[Result]:
    """What the runs of an experiment wrote; tiny ones are refused."""
    found = results(experiment(name), Choice(range(seeds), folder=folder))
    if any(one["fast"] for one in found):
        raise SystemExit(f"expected full runs in {folder / name}; got some with --fast. Run them without.")
    return found


def kept(name: str) -> list[Result]:
    """The committed results of an experiment."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def filled(page: str) -> str:
    """The page with every table in its place."""
    for name in NAMES:
        if found := kept(name):
            begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            before, _, after = page.partition(begin)
            page = f"{before}{begin}\n\n{experiment(name).table(found)}\n\n{end}{after.partition(end)[2]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="gather first what the runs wrote into this folder")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds to gather (default: 3)")
    said = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name in NAMES:
        if said.results and (found := gathered(name, said.results, said.seeds)):
            (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if found := kept(name):
            experiment(name).figure(found).savefig(IMAGES / f"experiments_{name}.png", dpi=110)
            print(f"{name}: {len(found)} runs")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
