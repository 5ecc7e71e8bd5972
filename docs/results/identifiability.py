"""The figures of docs/identifiability.md, and identifiability.json with the numbers behind them.

    python docs/results/identifiability.py           # twenty minutes
    python docs/results/identifiability.py --table   # certificates.md alone, from the certificate.json of the examples

Two programs for the same springs (examples/unidentifiable.py) are trained and certified; each check is drawn for both.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import pyro_hybrid as ph
from pyro_hybrid.identifiability import plots
from pyro_hybrid.identifiability.learning_curves import how_many, shots_curve, tasks_curve
from pyro_hybrid.scores.separability import judge_separability, separable

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import unidentifiable as example  # noqa: E402

UNCHECKED = {"status": "not checked", "value": None}
SEED, SIZES = 0, (5, 20, 100, 300, 1000)


def pair(name: str, certificates: list[ph.Certificate], out: Path) -> None:
    """One check of both programs, side by side."""
    condition, key, draw = next(panel for panel in plots.PANELS if panel[0] == name)
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    titles = "their ratio", "mass and stiffness"
    for axis, made, title in zip(figure.subplots(1, 2), certificates, titles, strict=True):
        numbers = next(
            (value for label, value in made.numbers.items() if label.startswith(key)), None
        )
        plots.plot_panel(axis, made[condition], numbers, draw)
        axis.set_title(f"{title}: {made[condition].status}", fontsize=10)
    figure.savefig(out / f"identify_{key}_{name.split()[-1].strip('()')}.png", dpi=100)


def curves(
    tasks: ph.Tasks,
    held_out: ph.Tasks,
    model: ph.HybridModel,
    sizes: tuple[int, ...],
    steps: int,
    out: Path,
) -> dict[str, object]:
    """What is recovered against the number of springs, and of shots of each."""
    by_tasks = tasks_curve(
        lambda few: example.train(False, few, steps, SEED)[0].eval(), tasks, held_out, sizes
    )
    by_shots = shots_curve(model, held_out)
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axis, found in zip(figure.subplots(1, 2), (by_tasks, by_shots), strict=True):
        plots.plot_learning_curve(axis, found)
    figure.savefig(out / "identify_samples.png", dpi=100)
    return {
        f"{found.of}_curve": {
            "sizes": found.sizes,
            "names": found.names,
            "threshold": found.threshold,
            "linear_r": found.linear_r.round(4).tolist(),
            "enough_for_0.99": how_many(found, 0.99),
        }
        for found in (by_tasks, by_shots)
    }


def rotations(out: Path) -> dict[str, object]:
    """ICA on mixed uniform sources, and on Gaussian ones."""
    generator = torch.Generator().manual_seed(SEED)
    mixing = torch.randn(3, 3, generator=generator)
    figure, numbers = Figure(figsize=(9, 2.9), layout="constrained"), {}
    for axis, (name, sources) in zip(
        figure.subplots(1, 2),
        {
            "uniform": torch.rand(500, 3, generator=generator),
            "Gaussian": torch.randn(500, 3, generator=generator),
        }.items(),
        strict=True,
    ):
        found = separable(sources @ mixing)
        check = judge_separability(found)
        plots.plot_separability(axis, found)
        axis.set_title(f"{name} sources: {check.status}", fontsize=10)
        numbers[name] = {
            "status": check.status,
            "why": check.why,
            "strong_mixed": ph.mcc(sources @ mixing, sources).strong,
            "strong_after": ph.mcc(ph.disentangle(sources @ mixing), sources).strong,
        }
    figure.savefig(out / "identify_sources.png", dpi=100)
    return numbers


def table(folder: Path) -> str:
    """The certificates of the examples' runs, a line each."""
    head = [
        "system",
        "seed",
        "verdict",
        "fit",
        "local (ii)",
        "global (ii)",
        "means (iv)",
        "nats (iv)",
        "against the truth",
        "separability",
        "efficiency",
    ]
    rows = [head, ["---"] * len(head)]
    for path in sorted(folder.glob("*.json")):
        system, _, seed = path.stem.rpartition("_")
        found = json.loads(path.read_text())
        checks = {check["condition"]: check for check in found["conditions"] + found["further"]}
        cells = [
            _cell(checks.get(name, UNCHECKED))
            for name in (
                "fit",
                "injectivity, local (ii)",
                "injectivity, global (ii)",
                "variability of means (iv)",
                "variability (iv)",
                "ambiguity against the truth",
                "separability",
                "efficiency",
            )
        ]
        rows.append([system.replace("_", " "), seed, found["verdict"], *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def _cell(check: dict[str, object]) -> str:
    if check["value"] is None:
        return str(check["status"])
    low, high = (f"{x:.2g}" for x in check["interval"])
    return f"{check['value']:.3g} ({low} to {high})" + (
        "" if check["status"] == "holds" else f", {check['status']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="tiny trainings, for a test of the way")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs", help="writes images/ and results/ there"
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help="write certificates.md from certificates/*.json, no more",
    )
    parser.add_argument(
        "--keep-curves", action="store_true", help="leave the learning curves as they are"
    )
    choice = parser.parse_args()
    if choice.table:
        (choice.out / "results" / "certificates.md").write_text(
            table(choice.out / "results" / "certificates")
        )
        return
    images, results = choice.out / "images", choice.out / "results"
    images.mkdir(parents=True, exist_ok=True), results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    systems, steps, sizes = (40, 6, (10, 30)) if choice.fast else (1000, 2000, SIZES)
    tasks, held_out = example.springs(systems + 100).split(100)
    trained = {
        redundant: example.train(redundant, tasks, steps, SEED) for redundant in (False, True)
    }
    made = [
        ph.certify(*trained[redundant], example.asked_for(tasks, redundant))
        for redundant in (False, True)
    ]
    for name, _, _ in plots.PANELS:
        pair(name, made, images)
    numbers = {
        "ratio": made[0].to_dict(),
        "mass_and_stiffness": made[1].to_dict(),
        "prediction_error_in_noises": [
            round(example.prediction_error(trained[r][0], held_out), 3) for r in (False, True)
        ],
        "separability": rotations(images),
    }
    if choice.keep_curves:
        kept = json.loads((results / "identifiability.json").read_text())
        numbers |= {name: kept[name] for name in ("tasks_curve", "shots_curve")}
    else:
        ratio, unseen = (example.asked_for(some, False) for some in (tasks, held_out))
        numbers |= curves(ratio, unseen, trained[False][0], sizes, steps, images)
    for made_of, name in zip(made, ("certified", "refused"), strict=True):
        (results / f"{name}.txt").write_text(f"{made_of}\n")
    (results / "identifiability.json").write_text(json.dumps(_plain(numbers), indent=2) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(inside) for name, inside in value.items()}
    return round(float(value), 4) if isinstance(value, float | np.floating) else value


if __name__ == "__main__":
    main()
