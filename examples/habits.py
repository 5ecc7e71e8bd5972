"""What the examples have in common: options, the report on held-out tasks, and its figures."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import arviz
import matplotlib
import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

import pyro_hybrid as ph

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROB = 0.9
BLUE, ORANGE, GREY = "#2a6fbb", "#d9702b", "#8a8a8a"


def options(
    description: str, name: str, tasks: int, steps: int, data: str | None = None, **flags: str
) -> argparse.Namespace:
    """The options that every example understands, a folder of data where there are some, and flags with their help."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=tasks, help="systems to train on")
    parser.add_argument("--held-out", type=int, default=300, help="systems to judge on")
    parser.add_argument(
        "--shots", type=int, default=8, help="trajectories of each system, half of them support"
    )
    parser.add_argument("--steps", type=int, default=steps, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="of data, initial weights and training")
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, ...")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--out", type=Path, default=Path("out") / name, help="folder for figures and numbers"
    )
    parser.add_argument(
        "--fast", action="store_true", help="a tiny run that shows the way, not the result"
    )
    if data:
        parser.add_argument("--data", type=Path, metavar="DIR", help=data)
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    choice = parser.parse_args()
    if choice.fast:
        choice.tasks, choice.held_out, choice.steps, choice.shots = (
            min(choice.tasks, 60),
            40,
            min(choice.steps, 12),
            4,
        )
    choice.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(choice.seed)
    torch.set_num_threads(choice.threads)
    return choice


def growing_correction(
    model: ph.models.MetaHybridVAE, weight: float, steps: int
) -> Callable[[int, ph.Fit], None]:
    """A callback: first learn what is unknown, then credit the physics with all that it can explain."""

    def grow(step: int, fit: ph.Fit) -> None:
        model.correction = weight * ((step + 1) / steps) ** 2

    return grow


@dataclass
class Recovered:
    """Latents recovered from the support alone: one row a task, one column a latent."""

    names: list[str]
    truth: Tensor
    mean: Tensor
    draws: Tensor  # (draw, task, latent)
    known: int  # so many columns are physics latents, which have names; the others are neural

    @property
    def physics(self) -> list[int]:
        """Columns of the physics latents."""
        return list(range(self.known))

    @property
    def neural(self) -> list[int]:
        """Columns of the neural latents."""
        return list(range(self.known, self.mean.shape[1]))


@torch.no_grad()
def recover(
    model: ph.models.MetaHybridVAE, guide: ph.AmortizedGuide, tasks: ph.Tasks, samples: int = 400
) -> Recovered:
    """Read the tasks' support shots, a hundred tasks at a time: with the prior, or the guide where the prior can't."""
    assert tasks.true_latents is not None
    sites, pieces = list(model.system.physics) + ["unknown"], []
    for start in tqdm(
        range(0, len(tasks), 100), desc="reading supports", unit="batch", leave=False
    ):
        support = tasks[start : start + 100].episode().support
        if isinstance(model.prior, ph.UnconditionalPrior):
            found = ph.draws(model, guide, ph.Episode(None, support), samples)
        else:
            found = {name: fn.sample((samples,)) for name, fn in model.prior(support).items()}
        pieces.append(torch.cat([found[name] for name in sites], -1).cpu())
    draws = torch.cat(pieces, 1)
    names = [*model.system.physics, *model.system.unknown]
    truth = torch.cat([tasks.true_latents[name] for name in sites], -1)
    return Recovered(names, truth, draws.mean(0), draws, len(model.system.physics))


@dataclass
class Report:
    """Numbers and aligned latents of the held-out tasks."""

    numbers: dict[str, object]
    held_out: Recovered
    aligned: Tensor  # draws after the linear map, (draw, task, latent)
    certificate: ph.Certificate
    lines: list[str] = field(default_factory=list)


def judge(
    model: ph.models.MetaHybridVAE, guide: ph.AmortizedGuide, train: ph.Tasks, held_out: ph.Tasks
) -> Report:
    """Everything that can be said about the held-out tasks, where their truth is known.

    The linear map and the unmixing come from training tasks; the held-out ones only get them applied.
    """
    seen, new = recover(model, guide, train[:500]), recover(model, guide, held_out)
    plain = ph.mcc(new.mean, new.truth)
    unmixed = ph.disentangle(new.mean, fit=seen.mean)
    alone = ph.disentangle(new.mean[:, new.neural], fit=seen.mean[:, seen.neural])
    bound = model.system.cramer_rao(held_out.episode().support, held_out.true_latents).mean(0)
    after = torch.cat([new.mean[:, new.physics], alone], -1)
    disentangled = ph.mcc(after, new.truth)
    neural = ph.mcc(alone, new.truth[:, new.known :])
    aligned = _aligned(seen, new)
    error = (new.mean[:, new.physics] - new.truth[:, new.physics]).square().mean(0)
    numbers: dict[str, object] = {
        "latents": new.names,
        "linear_r": plain.linear_r.round(4).tolist(),
        "linear_r_mean": round(float(plain.linear_r.mean()), 4),
        "strong": plain.matched.round(4).tolist(),
        "strong_mcc": round(plain.strong, 4),
        "after_disentangle": disentangled.matched.round(4).tolist(),
        "strong_mcc_after_disentangle": round(disentangled.strong, 4),
        "strong_mcc_neural_after_disentangle": round(neural.strong, 4),
        "strong_mcc_after_disentangling_all_together": round(ph.mcc(unmixed, new.truth).strong, 4),
        "weak_mcc": round(plain.weak, 4),
        "mse_physics": [float(f"{x:.4g}") for x in error],
        "cramer_rao": [float(f"{x:.4g}") for x in bound],
        "mse_over_cramer_rao": [round(float(a / b), 2) for a, b in zip(error, bound, strict=False)],
        "coverage_90": _coverage(aligned, new.truth),
        "coverage_90_physics_as_is": _coverage(
            new.draws[..., new.physics], new.truth[:, new.physics]
        ),
        **trajectory_errors(model, guide, held_out),
    }
    certificate = ph.certify(
        model, guide, train if len(train) > 100 else train[:20]
    )  # few in a tiny run
    return Report(numbers, new, aligned, certificate, _table(numbers, new))


def _aligned(seen: Recovered, new: Recovered) -> Tensor:
    """Draws of the held-out tasks after the linear map that training tasks say leads to the truth."""

    def affine(x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones(*x.shape[:-1], 1)], -1)

    return affine(new.draws) @ torch.linalg.lstsq(affine(seen.mean), seen.truth).solution


def _coverage(draws: Tensor, truth: Tensor) -> list[float]:
    low, high = draws.quantile((1 - PROB) / 2, 0), draws.quantile((1 + PROB) / 2, 0)
    return [round(float(x), 3) for x in ((truth >= low) & (truth <= high)).float().mean(0)]


@torch.no_grad()
def trajectory_errors(
    model: ph.models.MetaHybridVAE, guide: ph.AmortizedGuide, tasks: ph.Tasks
) -> dict[str, float]:
    """Mean squared errors of held-out query shots, in units of the noise variance."""
    episode = tasks[:100].episode()
    noise = torch.tensor(model.system.noise)
    counts, values = episode.query.scored, episode.query.values

    def error(draws: Tensor) -> float:
        return round(float(((draws.mean(0) - values) / noise).square()[counts].mean()), 3)

    posterior = ph.draws(model, guide, episode, 20)
    conditioned = pyro.poutine.condition(model, posterior)
    return {
        "reconstruction_error_in_noise_variances": error(ph.predict(conditioned, episode, 20)["x"]),
        "prediction_error_in_noise_variances": error(ph.predict(model, episode, 20)["x"]),
    }


def _table(numbers: dict[str, object], new: Recovered) -> list[str]:
    rows = [
        f"{'latent':<12}{'kind':<9}{'strong':>8}{'after ICA':>11}{'linear R':>10}{'coverage':>10}{'MSE / CRB':>11}"
    ]
    for i, name in enumerate(new.names):
        ratio = numbers["mse_over_cramer_rao"][i] if i < new.known else "-"  # type: ignore[index]
        rows.append(
            f"{name:<12}{'physics' if i < new.known else 'neural':<9}{numbers['strong'][i]:>8.3f}"  # type: ignore[index]
            f"{numbers['after_disentangle'][i]:>11.3f}{numbers['linear_r'][i]:>10.3f}"  # type: ignore[index]
            f"{numbers['coverage_90'][i]:>10.2f}{ratio:>11}"
        )  # type: ignore[index]
    rows.append(
        f"{'mean':<21}{numbers['strong_mcc']:>8.3f}{numbers['strong_mcc_after_disentangle']:>11.3f}"
        f"{numbers['linear_r_mean']:>10.3f}"
    )
    rebuilt, ahead = (
        numbers[f"{name}_error_in_noise_variances"] for name in ("reconstruction", "prediction")
    )
    rows.append(
        f"error of trajectories, in noise variances: reconstruction {rebuilt}, "
        f"prediction from the support alone {ahead}"
    )
    return rows


def export(
    choice: argparse.Namespace,
    model: ph.models.MetaHybridVAE,
    guide: ph.AmortizedGuide,
    held_out: ph.Tasks,
    report: Report,
    fit: ph.Fit,
    started: float,
) -> None:
    """Write posterior.nc, the figures and metrics.json."""
    few = held_out[:10].episode()
    data = ph.to_arviz(
        model,
        guide,
        few,
        50 if choice.fast else 300,
        names={"x": model.system.names},
        certificate=report.certificate,
    )
    ph.save_arviz(data, choice.out / "posterior.nc")
    _figures(choice.out, model, guide, held_out, report, fit)
    metrics = {
        **report.numbers,
        "settings": {k: v for k, v in vars(choice).items() if k not in ("out", "data")},
        "training_seconds": round(fit.seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "skipped_steps": fit.skipped,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "arviz": arviz.__version__,
            "pyro_hybrid": ph.__version__,
        },
    }
    (choice.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (choice.out / "certificate.json").write_text(
        json.dumps(report.certificate.to_dict(), indent=2) + "\n"
    )
    report.certificate.plot().savefig(choice.out / "certificate.png", dpi=110)
    print("\n".join(report.lines))
    print(f"\n{report.certificate}\n")
    print(
        f"{metrics['seconds']:.0f} s in all; figures, posterior.nc, certificate.json and metrics.json are in "
        f"{choice.out}/"
    )


def _figures(
    out: Path,
    model: ph.models.MetaHybridVAE,
    guide: ph.AmortizedGuide,
    held_out: ph.Tasks,
    report: Report,
    fit: ph.Fit,
) -> None:
    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "figure.dpi": 130,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        for name, figure in (
            ("latents", latents_figure(report)),
            ("loss", loss_figure(fit)),
            ("trajectories", trajectories_figure(model, guide, held_out)),
            ("prior_posterior", prior_posterior_figure(model, guide, held_out)),
        ):
            figure.savefig(out / f"{name}.png", bbox_inches="tight")
            plt.close(figure)


def latents_figure(report: Report) -> plt.Figure:
    """True against recovered latents, with 90% intervals, after the linear map that the theory leaves open."""
    new, draws = report.held_out, report.aligned
    low, mid, high = draws.quantile(0.05, 0), draws.mean(0), draws.quantile(0.95, 0)
    figure, axes = plt.subplots(
        1, len(new.names), figsize=(2.7 * len(new.names), 2.8), squeeze=False, layout="constrained"
    )
    for i, (name, axis) in enumerate(zip(new.names, axes[0], strict=True)):
        x, y = new.truth[:, i], mid[:, i]
        bars = torch.stack([y - low[:, i], high[:, i] - y]).clamp(min=0)
        axis.errorbar(
            x, y, bars, fmt="o", ms=2.5, lw=0.7, color=BLUE if i < new.known else ORANGE, alpha=0.6
        )
        axis.plot([x.min(), x.max()], [x.min(), x.max()], color=GREY, lw=0.8, zorder=0)
        axis.set(title=f"{name}   R = {report.numbers['linear_r'][i]:.3f}", xlabel="true")  # type: ignore[index]
    axes[0, 0].set_ylabel("recovered from the support alone")
    return figure


def loss_figure(fit: ph.Fit) -> plt.Figure:
    """Loss of every step; it changes its scale where the curriculum lengthens the segments."""
    figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
    loss = np.array(fit.loss)
    axis.plot(loss, lw=0.4, color=GREY)
    width = max(1, len(loss) // 50)
    axis.plot(
        np.arange(width - 1, len(loss)),
        np.convolve(loss, np.ones(width) / width, "valid"),
        color=BLUE,
    )
    axis.set(
        xlabel="step",
        ylabel="loss per task",
        ylim=(np.nanmin(loss) - 50, np.nanquantile(loss, 0.97)),
    )
    return figure


@torch.no_grad()
def trajectories_figure(
    model: ph.models.MetaHybridVAE, guide: ph.AmortizedGuide, held_out: ph.Tasks
) -> plt.Figure:
    """Query shots of three held-out tasks: observed, reconstructed, and predicted from the support alone."""
    episode = held_out[:3].episode()
    posterior = ph.draws(model, guide, episode, 100)
    rebuilt = ph.predict(pyro.poutine.condition(model, posterior), episode, 100)["x"][:, :, 0]
    ahead = ph.predict(model, episode, 100)["x"][:, :, 0]
    sensors = list(range(model.system.sensors)) if not model.system.grid else [5, 10, 15]
    figure, axes = plt.subplots(
        len(sensors),
        3,
        figsize=(9, 1.7 * len(sensors)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for column in range(3):
        for axis, s in zip(axes[:, column], sensors, strict=True):
            low, high = (
                ahead[:, column, :, s].quantile(0.05, 0),
                ahead[:, column, :, s].quantile(0.95, 0),
            )
            axis.fill_between(
                episode.query.times,
                low,
                high,
                color=ORANGE,
                alpha=0.3,
                lw=0,
                label="prediction, 90%",
            )
            axis.plot(
                episode.query.times,
                rebuilt[:, column, :, s].mean(0),
                color=BLUE,
                lw=1.2,
                label="reconstruction",
            )
            axis.plot(
                episode.query.times,
                episode.query.values[column, 0, :, s],
                ".",
                color="black",
                ms=2.5,
                label="observed",
            )
            axis.set_ylabel(model.system.names[s] if column == 0 else "")
        axes[0, column].set_title(f"held-out task {column}")
        axes[-1, column].set_xlabel("time")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@torch.no_grad()
def prior_posterior_figure(
    model: ph.models.MetaHybridVAE, guide: ph.AmortizedGuide, held_out: ph.Tasks
) -> plt.Figure:
    """Latents of one held-out task: from the support alone, and after the query was seen too."""
    episode = held_out[:1].episode()
    before, after = ph.predict(model, episode, 2000), ph.draws(model, guide, episode, 2000)
    sites = [
        (name, i)
        for name in [*model.system.physics, "unknown"]
        for i in range(before[name].shape[-1])
    ]
    figure, axes = plt.subplots(
        1, len(sites), figsize=(2.7 * len(sites), 2.2), squeeze=False, layout="constrained"
    )
    for axis, (name, i) in zip(axes[0], sites, strict=True):
        for values, colour, label in (
            (before, ORANGE, "support"),
            (after, BLUE, "support and query"),
        ):
            axis.hist(
                values[name][:, 0, i].numpy(),
                50,
                density=True,
                color=colour,
                alpha=0.5,
                label=label,
            )
        if name in model.system.physics:
            axis.axvline(
                float(held_out.true_latents[name][0, i]), color="black", lw=1, label="truth"
            )
        axis.set(title=name if before[name].shape[-1] == 1 else f"{name}[{i}]", yticks=[])
    axes[0, 0].legend(fontsize=7)
    return figure
