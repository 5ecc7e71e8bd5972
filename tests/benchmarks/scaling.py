"""How time and memory of one training step grow with the work: tasks, time points, grid points, latents.

    python tests/benchmarks/scaling.py [--compile] [--sweeps tasks ...] [--out FILE] [--figure FILE] [--draw-only]

The hybrid pendulum of ``rivals.py`` and the rod of ``grid_rivals.py``, a step of rk4 for each observation, one thread.
Every point is measured in a process of its own, whose peak of resident memory is therefore its own; what it held before
the first step of full size (imports, data, weights) is subtracted. Times are medians.

    tasks     a batch of 64 to 4096 pendulums, 50 time points
    points    50 to 800 time points, the step being constant; 1024 pendulums
    grid      a rod of 20 to 320 points, their distance being constant; 64 tasks. On a finer grid, explicit steps would
              have to be shorter by its square, which is another cost than that of more points.
    latents   4 to 64 latents, one of them of the known equation; 256 pendulums
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grid_rivals
import pyro
import rivals
import torch
from elbo_step import machine, one_thread
from elbo_step import ours as pendulums
from grid_step import ours as rods
from tqdm import tqdm

import pyro_hybrid as ph

SWEEPS = {
    "tasks": (64, 256, 1024, 4096),
    "points": (50, 100, 200, 400, 800),
    "grid": (20, 40, 80, 160, 320),
    "latents": (4, 8, 16, 32, 64),
}
LABELS = {
    "tasks": "tasks in the batch",
    "points": "time points",
    "grid": "grid points",
    "latents": "latents",
}
TASKS = {"points": 1024, "grid": 64, "latents": 256}
MIB = 1024.0


def episode(sweep: str, size: int) -> ph.Episode:
    """The data of a point; at most 64 tasks are simulated, and repeated: simulation must not be what needs memory."""
    tasks = size if sweep == "tasks" else TASKS[sweep]
    if sweep == "grid":
        few = grid_rivals.queries(64, size=size)
    else:
        full = rivals.data(64, size if sweep == "points" else rivals.POINTS).episode()
        few = part(full, torch.arange(64))
    return part(few, torch.arange(tasks) % 64)


def part(of: ph.Episode, index: torch.Tensor) -> ph.Episode:
    """The first query shot of some tasks."""
    query = of.query
    shots = ph.Shots.from_tensors(query.times, query.values[index, :1], query.initial[index, :1])
    return ph.Episode(None, shots)


def training(sweep: str, size: int, compile: bool) -> ph.SVI:
    """Model, guide and optimiser of a point."""
    torch.manual_seed(0)
    if sweep == "grid":
        return rods(grid_rivals.residual(), grid_rivals.encoder(size), size=size, compile=compile)
    if sweep == "latents":
        rivals.LATENTS = size - 1  # in a process of its own
    points = size if sweep == "points" else rivals.POINTS
    return pendulums(rivals.residual(), rivals.Encoder(points, rivals.LATENTS), compile=compile)


def memory(peak: bool) -> float:
    """Resident memory of this process in MiB, now or at its peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            MIB**2 if sys.platform == "darwin" else MIB
        )
    found = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return (
        float(found["VmHWM" if peak else "VmRSS"].split()[0]) / MIB
    )  # ru_maxrss would include the parent's


def forget_peak() -> None:
    """Let the peak begin anew; the kernel may refuse, and then imports count."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def timed(step: Callable[[], object], at_least: int, seconds: float) -> list[float]:
    """Milliseconds of each step."""
    times: list[float] = []
    while len(times) < at_least or sum(times) < 1e3 * seconds and len(times) < 50:
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def point(sweep: str, size: int, compile: bool) -> dict[str, float]:
    """Time and memory of one point, in this process."""
    one_thread()
    svi, full = training(sweep, size, compile), episode(sweep, size)
    for few in (
        2,
        3,
        5,
    ):  # what is imported, compiled or allocated once; two sizes, so that all others fit too
        svi.step(part(full, torch.arange(few)))
    forget_peak()
    before = memory(peak=False)
    with pyro.validation_enabled(False):
        svi.step(full)
        times = timed(lambda: svi.step(full), at_least=3, seconds=2.0)
    return {
        "size": size,
        "median_ms": round(statistics.median(times), 2),
        "fastest_ms": round(min(times), 2),
        "steps": len(times),
        "peak_mib": round(memory(peak=True) - before, 1),
        "before_mib": round(before, 1),
    }


def isolated(sweep: str, size: int, compile: bool) -> dict[str, float]:
    """The same in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--point",
        sweep,
        str(size),
        *(["--compile"] if compile else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{sweep} = {size} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(sweeps: dict[str, list[dict[str, float]]]) -> str:
    """What was measured, to read in a terminal."""
    lines = []
    for sweep, found in sweeps.items():
        lines.append(
            f"{LABELS[sweep]:<24}{'ms':>10}{'ms / first':>12}{'MiB':>10}{'MiB / first':>13}"
        )
        for row in found:
            ratios = (row[key] / max(found[0][key], 1e-9) for key in ("median_ms", "peak_mib"))
            cells = [
                f"{row['median_ms']:>10.1f}",
                f"{next(ratios):>12.2f}",
                f"{row['peak_mib']:>10.1f}",
                f"{next(ratios):>13.2f}",
            ]
            lines.append(f"{row['size']:>24}" + "".join(cells))
    return "\n".join(lines)


def draw(sweeps: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Time and memory over each sweep; dotted: growth in proportion."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, panels = plt.subplots(
        2, len(sweeps), figsize=(2.9 * len(sweeps), 4.8), squeeze=False, sharex="col"
    )
    for row, (key, label) in enumerate(
        (("median_ms", "time of a step, ms"), ("peak_mib", "peak memory, MiB"))
    ):
        for panel, (sweep, found) in zip(panels[row], sweeps.items(), strict=True):
            sizes, values = [point["size"] for point in found], [point[key] for point in found]
            panel.loglog(sizes, values, color=f"C{row}", marker="o")
            panel.loglog(sizes, [values[-1] * n / sizes[-1] for n in sizes], "k:", linewidth=1)
            panel.set_xticks(sizes, [str(n) for n in sizes])
            panel.xaxis.set_minor_locator(ticker.NullLocator())
            panel.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            panel.yaxis.set_minor_formatter(ticker.NullFormatter())
            panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.set_ylim(min(values) / 2, 2 * max(values))
            panel.set_xlabel(LABELS[sweep] if row else "")
        panels[row, 0].set_ylabel(label)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)
    print(f"drawn to {file}")


def measure(options: argparse.Namespace) -> None:
    """All points, to a file that grows with them."""
    jobs, sweeps = [(sweep, size) for sweep in options.sweeps for size in SWEEPS[sweep]], {}
    one_thread()
    settings = machine() | {
        "compile": options.compile,
        "width": rivals.WIDTH,
        "tasks": TASKS,
        "substeps": 1,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for sweep, size in (bar := tqdm(jobs)):
        bar.set_description(f"{sweep} = {size}")
        sweeps.setdefault(sweep, []).append(isolated(sweep, size, options.compile))
        options.out.write_text(
            json.dumps({"settings": settings, "sweeps": sweeps}, indent=2) + "\n"
        )
    print(table(sweeps), f"written to {options.out}", sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/scaling.json"))
    parser.add_argument("--figure", type=Path, help="draw what is in --out")
    parser.add_argument("--draw-only", action="store_true", help="measure nothing")
    parser.add_argument(
        "--point", nargs=2, metavar=("SWEEP", "SIZE"), help="one point, in this process"
    )
    options = parser.parse_args()
    if options.point:
        print(json.dumps(point(options.point[0], int(options.point[1]), options.compile)))
        return
    if not options.draw_only:
        measure(options)
    if options.figure:
        draw(json.loads(options.out.read_text())["sweeps"], options.figure)


if __name__ == "__main__":
    main()
