"""Make the figures of docs/identifiability.md, and identifiability.json with the numbers behind them.

    python docs/results/identifiability.py                # train, certify, and measure learning curves: 20 minutes
    python docs/results/identifiability.py --keep-curves  # the same without the learning curves: a few minutes
    python docs/results/identifiability.py --table        # certificates.md alone, from certificates/*.json

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
from pyro_hybrid.identifiability.learning_curves import (
    LearningCurve,
    required_size,
    shots_curve,
    tasks_curve,
)
from pyro_hybrid.scores.separability import judge_separability, measure_separability

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import unidentifiable as example  # noqa: E402

SEED = 0
SIZES = (5, 20, 100, 300, 1000)
TITLES = ("their ratio", "mass and stiffness")
UNCHECKED = {"status": "not checked", "value": None}
COLUMNS = {
    "fit": "fit",
    "local (ii)": "injectivity, local (ii)",
    "global (ii)": "injectivity, global (ii)",
    "means (iv)": "variability of means (iv)",
    "nats (iv)": "variability (iv)",
    "against the truth": "ambiguity against the truth",
    "separability": "separability",
    "efficiency": "efficiency",
}


def draw_check(panel: plots.Panel, certificates: list[ph.Certificate], images: Path) -> None:
    """Draw one check of both programs, side by side."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    for axis, certificate, title in zip(figure.subplots(1, 2), certificates, TITLES, strict=True):
        check = certificate[panel.condition]
        items = certificate.numbers.items()
        numbers = [value for name, value in items if name.startswith(panel.key)]
        plots.plot_panel(axis, check, numbers[0] if numbers else None, panel.draw)
        axis.set_title(f"{title}: {check.status}", fontsize=10)
    key = panel.key.replace(" ", "_")
    part = panel.condition.split()[-1].strip("()")
    figure.savefig(images / f"identify_{key}_{part}.png", dpi=100)


def measure_curves(
    tasks: ph.Tasks,
    held_out: ph.Tasks,
    model: ph.HybridModel,
    sizes: tuple[int, ...],
    num_steps: int,
    images: Path,
) -> dict[str, object]:
    """Measure recovery against the number of springs, and of shots of each."""

    def train(few: ph.Tasks) -> ph.HybridModel:
        return example.train(False, few, num_steps, SEED)[0].eval()

    by_tasks = tasks_curve(train, tasks, held_out, sizes)
    by_shots = shots_curve(model, held_out)
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axis, curve in zip(figure.subplots(1, 2), (by_tasks, by_shots), strict=True):
        plots.plot_learning_curve(axis, curve)
    figure.savefig(images / "identify_samples.png", dpi=100)
    return {f"{curve.of}_curve": describe_curve(curve) for curve in (by_tasks, by_shots)}


def describe_curve(curve: LearningCurve) -> dict[str, object]:
    return {
        "sizes": curve.sizes,
        "names": curve.names,
        "threshold": curve.threshold,
        "linear_r": curve.linear_r.round(4).tolist(),
        "enough_for_0.99": required_size(curve, 0.99),
    }


def separate_sources(images: Path) -> dict[str, object]:
    """Disentangle mixed uniform sources, and Gaussian ones."""
    generator = torch.Generator().manual_seed(SEED)
    mixing = torch.randn(3, 3, generator=generator)
    all_sources = {
        "uniform": torch.rand(500, 3, generator=generator),
        "Gaussian": torch.randn(500, 3, generator=generator),
    }
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    numbers = {}
    for axis, (name, sources) in zip(figure.subplots(1, 2), all_sources.items(), strict=True):
        mixed = sources @ mixing
        separability = measure_separability(mixed)
        check = judge_separability(separability)
        plots.plot_separability(axis, separability)
        axis.set_title(f"{name} sources: {check.status}", fontsize=10)
        numbers[name] = {
            "status": check.status,
            "why": check.why,
            "strong_mixed": ph.mcc(mixed, sources).strong,
            "strong_after": ph.mcc(ph.disentangle(mixed), sources).strong,
        }
    figure.savefig(images / "identify_sources.png", dpi=100)
    return numbers


def table(folder: Path) -> str:
    """Tabulate the certificates of the examples' runs, one line each."""
    head = ["system", "seed", "verdict", *COLUMNS]
    rows = [head, ["---"] * len(head)]
    for path in sorted(folder.glob("*.json")):
        system, _, seed = path.stem.rpartition("_")
        certificate = json.loads(path.read_text())
        checks = {
            check["condition"]: check
            for check in certificate["conditions"] + certificate["further"]
        }
        cells = [_cell(checks.get(name, UNCHECKED)) for name in COLUMNS.values()]
        rows.append([system.replace("_", " "), seed, certificate["verdict"], *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def _cell(check: dict[str, object]) -> str:
    if check["value"] is None:
        return str(check["status"])
    low, high = (f"{x:.2g}" for x in check["interval"])
    cell = f"{check['value']:.3g} ({low} to {high})"
    return cell if check["status"] == "holds" else f"{cell}, {check['status']}"


def main() -> None:
    choice = parse_arguments()
    images = choice.out / "images"
    results = choice.out / "results"
    if choice.table:
        (results / "certificates.md").write_text(table(results / "certificates"))
        return
    images.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    num_systems, num_steps, sizes = (40, 6, (10, 30)) if choice.fast else (1000, 2000, SIZES)
    tasks, held_out = example.springs(num_systems + 100).split(100)
    trained = [example.train(redundant, tasks, num_steps, SEED) for redundant in (False, True)]
    certificates = [
        ph.certify(*trained[redundant], example.asked_for(tasks, redundant))
        for redundant in (False, True)
    ]
    for panel in plots.PANELS:
        draw_check(panel, certificates, images)
    numbers = {
        "ratio": certificates[0].to_dict(),
        "mass_and_stiffness": certificates[1].to_dict(),
        "prediction_error_in_noises": [
            round(example.prediction_error(model, held_out), 3) for model, _ in trained
        ],
        "separability": separate_sources(images),
    }
    if choice.keep_curves:
        kept = json.loads((results / "identifiability.json").read_text())
        numbers |= {name: kept[name] for name in ("tasks_curve", "shots_curve")}
    else:
        ratio, unseen = (example.asked_for(part, False) for part in (tasks, held_out))
        numbers |= measure_curves(ratio, unseen, trained[False][0], sizes, num_steps, images)
    for certificate, name in zip(certificates, ("certified", "refused"), strict=True):
        (results / f"{name}.txt").write_text(f"{certificate}\n")
    (results / "identifiability.json").write_text(json.dumps(_plain(numbers), indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="train briefly, to test the script")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs", help="folder of images/ and results/"
    )
    parser.add_argument(
        "--table", action="store_true", help="write certificates.md from certificates/*.json only"
    )
    parser.add_argument(
        "--keep-curves", action="store_true", help="leave the learning curves as they are"
    )
    return parser.parse_args()


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return round(float(value), 4) if isinstance(value, float | np.floating) else value


if __name__ == "__main__":
    main()
