"""Long predictions: new initial states, latents from the support alone, up to eight times the training's horizon.

Errors are root mean squares over an interval of time, in standard deviations of the observations. The median over
systems counts a chaotic trajectory that diverged as wrong, without letting it hide the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.run import Choice, Result, Run, digits, slug
from experiments.settings import CASES, MODELS
from experiments.tables import grouped, markdown, panels, spread
from experiments.trained import exactly, trained
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.data.tasks import Tasks

__all__ = ["figure", "long_query", "relative", "runs", "table"]

TIMES = (1, 2, 4, 8)


def runs(choice: Choice) -> list[Run]:
    """List a run for each seed, system and model."""
    return [
        Run(slug(system, model, seed), partial(_run, system, model, seed, choice))
        for seed in choice.seeds
        for system in CASES
        for model in MODELS
    ]


def _run(system: str, model: str, seed: int, choice: Choice) -> Result:
    found = trained(system, model, seed, choice)
    episode, seen = long_query(system, 12 if choice.fast else 100, seed)
    means = found.predicted(episode, episode.query.initial)
    return {
        "system": system,
        "model": model,
        "seed": seed,
        "times": TIMES,
        "error": [digits(value) for value in by_stretch(means, seen)],
        "diverged": round(float((~means.isfinite()).flatten(1).any(1).float().mean()), 3),
    }


def long_query(system: str, tasks: int, seed: int) -> tuple[Episode, Tensor]:
    """Simulate supports of the training's length, and long query shots without noise."""
    made, most = CASES[system].system(), TIMES[-1]
    made.points = most * (made.points - 1) + 1
    whole, clear = made.simulate(tasks, 8, 20_000 + seed), exactly(made, tasks, 8, 20_000 + seed)
    points = (len(whole.times) - 1) // most + 1
    values = whole.values[:, :, :points].contiguous()
    short = Tasks.from_trajectories(
        whole.times[:points], values, initial=made.measured(values), num_support=4
    )
    query = clear.episode().query
    start = Shots.from_tensors(whole.times, None, query.initial)
    return Episode(short.episode().support, start), torch.as_tensor(query.values)


def by_stretch(means: Tensor, seen: Tensor) -> list[Tensor]:
    """Compute the median relative error up to the horizon, from there to its double, and so on."""
    ends = [round(times / TIMES[-1] * (seen.shape[2] - 1)) + 1 for times in TIMES]
    scale = seen.std((0, 1, 2))
    return [
        relative(means[:, :, a:b], seen[:, :, a:b], scale)
        for a, b in zip((1, *ends[:-1]), ends, strict=True)
    ]


def relative(means: Tensor, seen: Tensor, scale: Tensor | None = None) -> Tensor:
    """Compute each system's root mean square error, in standard deviations of each sensor; return the median.

    Constant sensors, such as the ends of a rod that are held at zero, don't count.
    """
    scale = seen.std((0, 1, 2)) if scale is None else scale
    square = ((means - seen) / scale)[..., scale > 1e-6 * scale.max()].square()
    return square.nan_to_num(torch.inf, torch.inf).mean((1, 2, 3)).sqrt().median()


def table(results: Sequence[Result]) -> str:
    """Tabulate a row for each system and model, and a column for each interval of time."""
    rows = [
        [
            system,
            model,
            str(len(found)),
            *(spread([one["error"][k] for one in found]) for k in range(len(TIMES))),
        ]
        for (system, model), found in grouped(results, "system", "model").items()
    ]
    return markdown(["system", "model", "seeds", "to 1×", "1× to 2×", "2× to 4×", "4× to 8×"], rows)


def figure(results: Sequence[Result]) -> Figure:
    """Plot errors against time: a line for each model, the mean over seeds."""
    drawn, axes = panels(
        [system for (system,) in grouped(results, "system")], MODELS, "median error, in sd"
    )
    for (system, model), found in grouped(results, "system", "model").items():
        errors = torch.tensor(
            [[float("nan") if x is None else x for x in one["error"]] for one in found]
        ).mean(0)
        axes[system].loglog(TIMES, errors, "o-", ms=4, color=f"C{MODELS.index(model)}")
        axes[system].set(
            xlabel="horizon, in that of training",
            xticks=TIMES,
            xticklabels=[f"{x}×" for x in TIMES],
        )
        axes[system].minorticks_off()
    return drawn
