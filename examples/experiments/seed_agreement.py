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
from experiments.trained import trained
from pyro_hybrid.scores.mcc import mcc
from pyro_hybrid.scores.separability import disentangle

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
    tasks = CASES[system].system().simulate(*(48, 4) if choice.fast else (400, 8), 40_000)
    one, other = (trained(system, model, seed, choice).latents(tasks) for seed in pair)
    known, number = len(CASES[system].system().physics), len(CASES[system].system().unknown)
    return {
        "system": system,
        "model": model,
        "pair": pair,
        **agreement(one[:, known:], other[:, known:], number),
    }


def agreement(one: Tensor, other: Tensor, number: int | None = None) -> Result:
    """Score two trainings' neural latents against each other on the second half of the systems.

    The unmixing is estimated on the first half; ``number`` is how many latents the system has.
    """
    half = len(one) // 2
    there, back = mcc(one[half:], other[half:]), mcc(other[half:], one[half:])
    alone = mcc(*(disentangle(z[half:], components=number, fit=z[:half]) for z in (one, other)))
    return {
        "linear_r": round(0.5 * float(there.linear_r.mean() + back.linear_r.mean()), 4),
        "weak": round(there.weak, 4),
        "strong": round(there.strong, 4),
        "strong_disentangled": round(alone.strong, 4),
    }


SCORES = {
    "linear_r": "linear R",
    "weak": "weak MCC",
    "strong": "strong MCC",
    "strong_disentangled": "after disentangle",
}


def table(results: Sequence[Result]) -> str:
    """Tabulate a row for each system and model: mean ± standard deviation over pairs of seeds."""
    rows = [
        [
            system,
            model,
            str(len(found)),
            *(spread([one[score] for one in found], 3) for score in SCORES),
        ]
        for (system, model), found in grouped(results, "system", "model").items()
    ]
    return markdown(["system", "model", "pairs", *SCORES.values()], rows)


def figure(results: Sequence[Result]) -> Figure:
    """Plot linear R between runs: a dot for each pair."""
    drawn, axes = panels(
        [system for (system,) in grouped(results, "system")], MODELS, "linear R, run against run"
    )
    for one in results:
        at = MODELS.index(one["model"])
        axes[one["system"]].plot(at, one["linear_r"], "o", ms=5, alpha=0.8, color=f"C{at}")
        axes[one["system"]].set(ylim=(0.0, 1.03), xticks=[])
    return drawn
