"""Agreement of two trainings from different seeds, whose models infer the latents of the same unseen systems.

Where the theorem holds, neural latents of two trainings are linear maps of each other: linear R, both ways, and weak
MCC measure that; strong MCC before and after ``disentangle`` measures whether the map is a permutation with scalings.
Agreement doesn't prove truth: two trainings can agree on something else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

from matplotlib.figure import Figure
from torch import Tensor

from experiments.run import Choice, Result, Run, slug
from experiments.settings import CASES, MODELS
from experiments.tables import grouped, markdown, panels, spread
from experiments.trained import load_or_train
from pyro_hybrid.scores.ica import disentangle
from pyro_hybrid.scores.mcc import mcc

__all__ = ["agreement", "figure", "runs", "table"]


def runs(choice: Choice) -> list[Run]:
    """List a run for each system, model and pair of seeds."""
    return [
        Run(slug(system, model, *pair), partial(_run, system, model, pair, choice))
        for pair in itertools.combinations(choice.seeds, 2)
        for system in CASES
        for model in MODELS
    ]


def _run(system: str, model: str, pair: tuple[int, int], choice: Choice) -> Result:
    simulator = CASES[system].system()
    num_tasks, num_shots = (48, 4) if choice.fast else (400, 8)
    tasks = simulator.simulate(num_tasks, num_shots, 40_000)
    num_physics = len(simulator.physics)
    neural = []
    for seed in pair:
        latents = load_or_train(system, model, seed, choice).latent_means(tasks)
        neural.append(latents[:, num_physics:])
    return {
        "system": system,
        "model": model,
        "pair": pair,
        **agreement(*neural, len(simulator.unknown)),
    }


def agreement(one: Tensor, other: Tensor, num_components: int | None = None) -> Result:
    """Score the agreement of two trainings' neural latents, (task, latent) each.

    Arguments:
        one, other: the latents. The first half of the tasks fits the unmixing, and the second half is scored.
        num_components: the number of latents that there should be.
    """
    half = len(one) // 2
    there = mcc(one[half:], other[half:])
    back = mcc(other[half:], one[half:])
    unmixed = [
        disentangle(latents[half:], components=num_components, fit=latents[:half])
        for latents in (one, other)
    ]
    return {
        "linear_r": round(0.5 * float(there.linear_r.mean() + back.linear_r.mean()), 4),
        "weak": round(there.weak, 4),
        "strong": round(there.strong, 4),
        "strong_disentangled": round(mcc(*unmixed).strong, 4),
    }


SCORES = {
    "linear_r": "linear R",
    "weak": "weak MCC",
    "strong": "strong MCC",
    "strong_disentangled": "after disentangle",
}


def table(results: Sequence[Result]) -> str:
    """Tabulate a row for each system and model: mean ± standard deviation over pairs of seeds."""
    rows = []
    for (system, model), pairs in grouped(results, "system", "model").items():
        scores = [spread([pair[score] for pair in pairs], 3) for score in SCORES]
        rows.append([system, model, str(len(pairs)), *scores])
    return markdown(["system", "model", "pairs", *SCORES.values()], rows)


def figure(results: Sequence[Result]) -> Figure:
    """Plot linear R between trainings: a dot for each pair of seeds."""
    systems = [system for (system,) in grouped(results, "system")]
    figure, axes = panels(systems, MODELS, "linear R, run against run")
    for run in results:
        axis = axes[run["system"]]
        index = MODELS.index(run["model"])
        axis.plot(index, run["linear_r"], "o", ms=5, alpha=0.8, color=f"C{index}")
        axis.set(ylim=(0.0, 1.03), xticks=[])
    return figure
