"""What the examples have in common: their options, and what they write at the end."""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import arviz
import matplotlib
import pyro
import torch
from matplotlib.figure import Figure

import pyro_hybrid as ph

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def options(
    description: str, name: str, tasks: int, steps: int | None = None, **flags: str
) -> argparse.Namespace:
    """Read the options that examples understand, and flags with their help texts.

    Without ``steps`` the example leaves the training to ``ph.identify``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=tasks, help="systems to train on")
    parser.add_argument("--held-out", type=int, default=300, help="systems to judge on")
    parser.add_argument(
        "--shots", type=int, default=8, help="trajectories of each system, half of them support"
    )
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help="training steps")
        parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, ...")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of data, initial weights and training"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--out", type=Path, default=Path("out") / name, help="folder for figures and numbers"
    )
    parser.add_argument(
        "--fast", action="store_true", help="a tiny run that shows the way, not the result"
    )
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    choice = parser.parse_args()
    if choice.fast:
        choice.tasks = min(choice.tasks, 60)
        choice.held_out = 40
        choice.shots = 4
        if steps is not None:
            choice.steps = min(choice.steps, 12)
    choice.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(choice.seed)
    torch.set_num_threads(choice.threads)
    return choice


def simulate(choice: argparse.Namespace, system: ph.systems.System) -> tuple[ph.Tasks, ph.Tasks]:
    """Simulate the systems to train on and to judge on; a tiny run has short trajectories."""
    if choice.fast:
        system.points = 15
    number = choice.tasks + choice.held_out
    return system.simulate(number, choice.shots, choice.seed).split(choice.held_out)


def export(
    choice: argparse.Namespace,
    posterior: ph.Posterior,
    train: ph.Tasks,
    held_out: ph.Tasks,
    fit: ph.Fit | None = None,
    *,
    started: float,
) -> None:
    """Report on held-out tasks; write posterior, ArviZ data, figures, certificate.json and metrics.json."""
    system = posterior.model.system
    numbers = posterior.stages[0].numbers if fit is None else {}
    support = held_out.episode().support
    report = posterior.report(
        train[:12] if choice.fast else train,
        held_out,
        names=[*system.physics, *system.unknown],
        bound=system.cramer_rao(support, held_out.true_latents),
        noise=system.noise,
    )
    data = posterior.to_arviz(
        held_out[:10],
        50 if choice.fast else 300,
        names={"x": system.names},
        certificate=report.certificate,
    )
    ph.save_arviz(data, choice.out / "posterior.nc")
    metrics = {
        **report.numbers,
        "settings": {k: v for k, v in vars(choice).items() if k != "out"},
        "training_seconds": round(numbers["seconds"] if fit is None else fit.seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "skipped_steps": numbers["num_rejected"] if fit is None else fit.skipped,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "arviz": arviz.__version__,
            "pyro_hybrid": ph.__version__,
        },
    }
    certificate = report.certificate.to_dict()
    (choice.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (choice.out / "certificate.json").write_text(json.dumps(certificate, indent=2) + "\n")
    report.certificate.plot().savefig(choice.out / "certificate.png", dpi=110)
    loss = _cost_figure(numbers["cost"]) if fit is None else fit.plot()
    _figures(choice.out, posterior, report, held_out, loss)
    print(
        f"{report}\n\n{metrics['seconds']:.0f} s in all; figures and numbers are in {choice.out}/"
    )


def _cost_figure(costs: list[float]) -> Figure:
    """Plot how badly each batch was explained before its step; the noise shrinks meanwhile, so that 1 is the end."""
    figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
    axis.semilogy(costs, marker=".", lw=0.8)
    axis.axhline(1.0, lw=0.8, color="0.6")
    axis.set(xlabel="batch", ylabel="squared residual,\nnoise variances")
    return figure


def _figures(
    out: Path, posterior: ph.Posterior, report: ph.Report, held_out: ph.Tasks, loss: Figure
) -> None:
    system = posterior.model.system
    sensors = [5, 10, 15] if system.grid else list(range(system.sensors))
    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "figure.dpi": 130,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figures = {
            "latents": report.plot(),
            "loss": loss,
            "trajectories": posterior.plot(held_out, names=system.names, sensors=sensors),
            "prior_posterior": posterior.plot_latents(held_out),
        }
        for name, figure in figures.items():
            figure.savefig(out / f"{name}.png", bbox_inches="tight")
            plt.close(figure)
