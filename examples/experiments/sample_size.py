"""Sample size: linear R and strong MCC of unseen double pendulums, by the number of training systems and of shots.

The threshold is the theorem's n·k + 1, the smallest number of support sets, each of another system.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from matplotlib.figure import Figure

from experiments.identify import true_latents
from experiments.run import Choice, Result, Run, slug
from experiments.settings import CASES, OURS
from experiments.tables import grouped, markdown, spread
from experiments.trained import Trained, data, trained
from pyro_hybrid.scores.mcc import mcc

__all__ = ["figure", "runs", "table"]

SYSTEM = "double pendulum"
TASKS = (2, 5, 9, 20, 50, 200, 1000, 2000)
SHOTS = (1, 2, 3, 4, 6)


def runs(choice: Choice) -> list[Run]:
    """List a run for each seed and number of systems, and one for each seed with all numbers of shots."""
    return [
        *(
            Run(slug("tasks", tasks, seed), partial(_tasks, tasks, seed, choice))
            for seed in choice.seeds
            for tasks in (TASKS[-1:] if choice.fast else TASKS)
        ),
        *(Run(slug("shots", seed), partial(_shots, seed, choice)) for seed in choice.seeds),
    ]


def _tasks(tasks: int, seed: int, choice: Choice) -> Result:
    usual = tasks == CASES[SYSTEM].tasks
    found = trained(SYSTEM, OURS, seed, choice, None if usual else tasks)
    latents = sum(family.n * family.k for family in found.model.prior.sites.values())
    return {
        "of": "tasks",
        "size": tasks,
        "seed": seed,
        "threshold": latents + 1,
        **_scores(found, seed, choice),
    }


def _shots(seed: int, choice: Choice) -> Result:
    found = trained(SYSTEM, OURS, seed, choice)
    sizes = SHOTS[:2] if choice.fast else SHOTS
    return {
        "of": "shots",
        "seed": seed,
        "sizes": sizes,
        "scores": [_scores(found, seed, choice, k) for k in sizes],
    }


def _scores(found: Trained, seed: int, choice: Choice, shots: int | None = None) -> Result:
    judge = data(SYSTEM, seed, choice)[1]
    judge = judge if shots is None else replace(judge, num_support=shots)
    score = mcc(found.latents(judge), true_latents(found, judge))
    return {
        "linear_r": [round(float(r), 4) for r in score.linear_r],
        "strong_mcc": round(score.strong, 4),
    }


def _points(results: Sequence[Result], of: str) -> dict[int, list[Result]]:
    """Group scores by size."""
    flat = [{"size": one["size"], **one} for one in results if one["of"] == of == "tasks"]
    flat += [
        {"size": size, **score}
        for one in results
        if one["of"] == of == "shots"
        for size, score in zip(one["sizes"], one["scores"], strict=True)
    ]
    return {
        int(size): found
        for (size,), found in grouped(sorted(flat, key=lambda one: one["size"]), "size").items()
    }


def table(results: Sequence[Result]) -> str:
    """Tabulate a row for each number of systems, and of shots."""
    rows = [
        [
            str(size) if of == "tasks" else "1000",
            str(size) if of == "shots" else "4",
            str(len(found)),
            spread([sum(one["linear_r"]) / len(one["linear_r"]) for one in found], 3),
            f"{min(min(one['linear_r']) for one in found):.3f}",
            spread([one["strong_mcc"] for one in found], 3),
        ]
        for of in ("tasks", "shots")
        for size, found in _points(results, of).items()
    ]
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
    """Plot linear R, of all latents and of the worst, against the number of systems and of shots."""
    drawn = Figure(figsize=(8.0, 2.8), layout="constrained")
    axes = drawn.subplots(1, 2, sharey=True)
    shown = {
        "linear R, mean over latents": lambda one: sum(one["linear_r"]) / len(one["linear_r"]),
        "linear R, worst latent": lambda one: min(one["linear_r"]),
        "strong MCC": lambda one: one["strong_mcc"],
    }
    for axis, of in zip(axes, ("tasks", "shots"), strict=True):
        for at, (label, value) in enumerate(shown.items()):
            points = [
                (size, value(one)) for size, found in _points(results, of).items() for one in found
            ]
            axis.plot(
                *zip(*points, strict=True), "o^s"[at], ms=5, alpha=0.7, color=f"C{at}", label=label
            )
        axis.set(
            ylim=(-0.03, 1.03), xlabel="systems trained on" if of == "tasks" else "support shots"
        )
    axes[0].set(xscale="log")
    for one in results[:1]:
        if one["of"] == "tasks":
            axes[0].axvline(one["threshold"], color="grey", ls=":", lw=1)
            axes[0].annotate(" n·k + 1", (one["threshold"], 0.03), fontsize=8, color="grey")
    axes[1].legend(fontsize=8, frameon=False, loc="center right")
    return drawn
