"""Print the README's table of results from the JSON files beside this script: ``python docs/results/table.py``.

``double_pendulum_0.json`` is the ``metrics.json`` that ``python examples/double_pendulum.py --seed 0`` wrote, and so
on. Between two markers of the README stands what this prints, and nothing else; the tests compare.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

SYSTEMS = ("double_pendulum", "pendulum", "advection_diffusion")
COLUMNS = (
    "system",
    "seeds",
    "linear R, worst seed",
    "linear R, mean",
    "strong MCC, all / z_N",
    "MSE / Cramér-Rao of z_P",
    "coverage of 90%",
    "seconds",
)


def runs(folder: Path, system: str) -> list[dict[str, Any]]:
    """The metrics of every seed, in order; refuses a tiny run, and a file that belongs to another seed."""
    found = {int(path.stem.rpartition("_")[2]): path for path in folder.glob(f"{system}_*.json")}
    if not found:
        raise SystemExit(
            f"expected {system}_0.json and so on in {folder}; got none. "
            f"Run examples/{system}.py --seed 0 and copy its metrics.json there."
        )
    metrics = {
        seed: json.loads(path.read_text(encoding="utf-8")) for seed, path in sorted(found.items())
    }
    for seed, numbers in metrics.items():
        settings = numbers["settings"]
        if settings["seed"] != seed or settings["fast"]:
            raise SystemExit(
                f"expected a full run of seed {seed} in {found[seed]}; got seed {settings['seed']}"
                f"{' and --fast' if settings['fast'] else ''}. Copy the metrics.json of that run."
            )
    return list(metrics.values())


def each(values: list[list[float]], over_seeds: Any, digits: int) -> list[str]:
    """One text for every latent, of its values at all seeds."""
    return [f"{over_seeds(of_latent):.{digits}f}" for of_latent in zip(*values, strict=True)]


def row(folder: Path, system: str) -> list[str]:
    """The cells of one system; latents always in the order in which the third one names them."""
    metrics = runs(folder, system)

    def of(key: str) -> list[Any]:
        return [numbers[key] for numbers in metrics]

    names, worst = metrics[0]["latents"], each(of("linear_r"), min, 3)
    strong = [
        statistics.fmean(of(f"strong_mcc{part}_after_disentangle")) for part in ("", "_neural")
    ]
    return [
        system.replace("_", " "),
        ", ".join(str(numbers["settings"]["seed"]) for numbers in metrics),
        ", ".join(f"{name} {value}" for name, value in zip(names, worst, strict=True)),
        f"{statistics.fmean(of('linear_r_mean')):.3f}",
        " / ".join(f"{value:.3f}" for value in strong),
        ", ".join(each(of("mse_over_cramer_rao"), statistics.fmean, 1)),
        ", ".join(each(of("coverage_90"), statistics.fmean, 2)),
        f"{statistics.fmean(of('seconds')):.0f}",
    ]


def table(folder: Path) -> str:
    """The whole table, in Markdown."""
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *(row(folder, system) for system in SYSTEMS)]
    deaf = folder / "unconditional"  # what the same example reaches with --unconditional
    if deaf.is_dir():
        rows.append(["pendulum, prior deaf to the support", *row(deaf, "pendulum")[1:]])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent))
