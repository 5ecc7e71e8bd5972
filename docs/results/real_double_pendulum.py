"""How well the classical models predict the real double pendulum: real_double_pendulum.json.

    python docs/results/real_double_pendulum.py --data DIR           # half a minute

Windows of one second are cut from all parts of a run; none shares a frame with another. Fitted parameters are judged on
other windows of the same runs, and on those of runs held out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from experiments.real_pendulum import split_runs

import pyro_hybrid as ph
from pyro_hybrid.systems.compound_pendulum import (
    HORIZONS,
    compound,
    fitted,
    median_errors,
    open_loop,
    point_mass,
)


def windows(
    recordings: ph.systems.Recordings, number: int, seed: int, seconds: float, step: float
) -> ph.Tasks:
    """One task of the pendulum as it is."""
    return recordings.tasks(
        1, number, seed, step=step, points=round(seconds / step) + 1, scale=(1.0, 1.0)
    )


def judged(
    learn: ph.systems.Recordings, judge: ph.systems.Recordings, number: int
) -> dict[str, object]:
    """Both models, fitted to the one and run open loop on the other."""
    near, far = windows(learn, number, 0, 0.2, 0.005), windows(judge, number, 1, 1.0, 0.0025)
    out: dict[str, object] = {
        "fitted to runs": learn.runs,
        "judged on runs": judge.runs,
        "windows": number,
    }
    for model in (compound, point_mass):
        parameters = fitted(model, near)
        errors = median_errors(*open_loop(model, parameters, far), far.times)
        out[model.__name__] = {
            "parameters": [float(f"{p:.4g}") for p in parameters],
            "errors": [float(f"{e:.3g}") for e in errors],
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="folder of the runs, by default that of PYRO_HYBRID_DATA"
    )
    recordings, start = (
        ph.systems.ibm_double_pendulum(parser.parse_args().data),
        time.perf_counter(),
    )
    learn, judge = split_runs(recordings)
    results = {
        "horizons": HORIZONS,
        "in-sample": judged(recordings, recordings, 400),
        "held out": judged(learn, judge, 120),
        "torch": torch.__version__,
        "duration_s": round(time.perf_counter() - start, 1),
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
