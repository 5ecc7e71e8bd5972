"""Sample size: linear R and strong MCC of unseen double pendulums, by the number of training systems and of shots.

The threshold is the theorem's n·k + 1, the smallest number of support sets, each of another system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.identify import true_latents
from experiments.run import Choice, Result, Run, slug
from experiments.settings import CASES, OURS
from experiments.tables import grouped, markdown, spread
from experiments.trained import Trained, load_or_train, simulate_tasks
from pyro_hybrid.scores.mcc import mcc

__all__ = ["figure", "runs", "table"]

SYSTEM = "double pendulum"
TASKS = (2, 5, 9, 20, 50, 200, 1000, 2000)
SHOTS = (1, 2, 3, 4, 6)


def runs(choice: Choice) -> list[Run]:
    """List a run for each seed and number of systems, and one for each seed with all numbers of shots."""
    sizes = TASKS[-1:] if choice.fast else TASKS
    by_tasks = [
        Run(slug("tasks", num_tasks, seed), partial(_score_by_tasks, num_tasks, seed, choice))
        for seed in choice.seeds
        for num_tasks in sizes
    ]
    by_shots = [
        Run(slug("shots", seed), partial(_score_by_shots, seed, choice)) for seed in choice.seeds
    ]
    return by_tasks + by_shots


def _score_by_tasks(num_tasks: int, seed: int, choice: Choice) -> Result:
    is_usual = num_tasks == CASES[SYSTEM].tasks
    trained = load_or_train(SYSTEM, OURS, seed, choice, None if is_usual else num_tasks)
    num_statistics = sum(family.n * family.k for family in trained.prior.families.values())
    return {
        "of": "tasks",
        "size": num_tasks,
        "seed": seed,
        "threshold": num_statistics + 1,
        **_scores(trained, seed, choice),
    }


def _score_by_shots(seed: int, choice: Choice) -> Result:
    trained = load_or_train(SYSTEM, OURS, seed, choice)
    sizes = SHOTS[:2] if choice.fast else SHOTS
    return {
        "of": "shots",
        "seed": seed,
        "sizes": sizes,
        "scores": [_scores(trained, seed, choice, num_support) for num_support in sizes],
    }


def _scores(trained: Trained, seed: int, choice: Choice, num_support: int | None = None) -> Result:
    _, held_out = simulate_tasks(SYSTEM, seed, choice)
    if num_support is not None:
        held_out = replace(held_out, num_support=num_support)
    score = mcc(trained.latent_means(held_out), true_latents(trained, held_out))
    return {
        "linear_r": [round(float(r), 4) for r in score.linear_r],
        "strong_mcc": round(score.strong, 4),
    }


def _scores_by_size(results: Sequence[Result], of: str) -> dict[int, list[Result]]:
    """Group the scores of one kind of size by size, "tasks" or "shots"."""
    scores = []
    for run in results:
        if run["of"] != of:
            continue
        if of == "tasks":
            scores.append(run)
        else:
            pairs = zip(run["sizes"], run["scores"], strict=True)
            scores.extend({"size": size, **score} for size, score in pairs)
    scores.sort(key=lambda score: score["size"])
    return {int(size): same_size for (size,), same_size in grouped(scores, "size").items()}


def _mean_r(score: Result) -> float:
    return sum(score["linear_r"]) / len(score["linear_r"])


def _worst_r(score: Result) -> float:
    return min(score["linear_r"])


def _strong_mcc(score: Result) -> float:
    return score["strong_mcc"]


def table(results: Sequence[Result]) -> str:
    """Tabulate a row for each number of systems, and for each number of shots."""
    rows = []
    for of in ("tasks", "shots"):
        for size, scores in _scores_by_size(results, of).items():
            rows.append(
                [
                    str(size) if of == "tasks" else "1000",
                    str(size) if of == "shots" else "4",
                    str(len(scores)),
                    spread([_mean_r(score) for score in scores], 3),
                    f"{min(_worst_r(score) for score in scores):.3f}",
                    spread([_strong_mcc(score) for score in scores], 3),
                ]
            )
    return markdown(
        [
            "systems",
            "support shots",
            "seeds",
            "linear R, mean",
            "worst latent and seed",
            "strong MCC",
        ],
        rows,
    )


def figure(results: Sequence[Result]) -> Figure:
    """Plot linear R and strong MCC against the number of systems, with the threshold, and against that of shots."""
    figure = Figure(figsize=(8.0, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _plot_scores(left, _scores_by_size(results, "tasks"))
    _plot_scores(right, _scores_by_size(results, "shots"))
    left.set(xscale="log", xlabel="systems trained on")
    right.set(xlabel="support shots")
    if results and results[0]["of"] == "tasks":
        threshold = results[0]["threshold"]
        left.axvline(threshold, color="grey", ls=":", lw=1)
        left.annotate(" n·k + 1", (threshold, 0.03), fontsize=8, color="grey")
    right.legend(fontsize=8, frameon=False, loc="center right")
    return figure


def _plot_scores(axis: Axes, scores_by_size: Mapping[int, Sequence[Result]]) -> None:
    curves: dict[str, Callable[[Result], float]] = {
        "linear R, mean over latents": _mean_r,
        "linear R, worst latent": _worst_r,
        "strong MCC": _strong_mcc,
    }
    for index, (label, value) in enumerate(curves.items()):
        sizes = []
        values = []
        for size, scores in scores_by_size.items():
            sizes.extend([size] * len(scores))
            values.extend(value(score) for score in scores)
        marker = "o^s"[index]
        axis.plot(sizes, values, marker, ms=5, alpha=0.7, color=f"C{index}", label=label)
    axis.set(ylim=(-0.03, 1.03))
