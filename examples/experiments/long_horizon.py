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
from experiments.trained import load_or_train, simulate_exactly
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
    trained = load_or_train(system, model, seed, choice)
    episode, truth = long_query(system, 12 if choice.fast else 100, seed)
    means = trained.predict(episode, episode.query.initial)
    has_diverged = (~means.isfinite()).flatten(1).any(1)
    return {
        "system": system,
        "model": model,
        "seed": seed,
        "times": TIMES,
        "error": [digits(value) for value in errors_by_stretch(means, truth)],
        "diverged": round(float(has_diverged.float().mean()), 3),
    }


def long_query(name: str, num_tasks: int, seed: int) -> tuple[Episode, Tensor]:
    """Simulate supports of the trained length, and long trajectories of other shots without noise.

    Returns:
        An episode whose query has initial states and times alone, and the true values of the query.
    """
    system = CASES[name].system()
    longest = TIMES[-1]
    system.points = longest * (system.points - 1) + 1
    seed = 20_000 + seed
    noisy = system.simulate(num_tasks, 8, seed)
    clear = simulate_exactly(system, num_tasks, 8, seed)
    num_times = (len(noisy.times) - 1) // longest + 1
    values = noisy.values[:, :, :num_times].contiguous()
    short = Tasks.from_trajectories(
        noisy.times[:num_times], values, initial=system.measured(values), num_support=4
    )
    query = clear.episode().query
    initial_only = Shots.from_tensors(noisy.times, None, query.initial)
    return Episode(short.episode().support, initial_only), torch.as_tensor(query.values)


def errors_by_stretch(means: Tensor, truth: Tensor) -> list[Tensor]:
    """Compute the median relative error up to the horizon, between it and its double, and so on."""
    last = truth.shape[2] - 1
    ends = [round(times / TIMES[-1] * last) + 1 for times in TIMES]
    starts = (1, *ends[:-1])
    scale = truth.std((0, 1, 2))
    errors = []
    for start, end in zip(starts, ends, strict=True):
        errors.append(relative(means[:, :, start:end], truth[:, :, start:end], scale))
    return errors


def relative(means: Tensor, truth: Tensor, scale: Tensor | None = None) -> Tensor:
    """Compute the root mean square error of each system in standard deviations of each sensor; the median over systems.

    Sensors that hardly vary, such as the ends of a rod that are held at zero, don't count.
    """
    if scale is None:
        scale = truth.std((0, 1, 2))
    squares = ((means - truth) / scale)[..., scale > 1e-6 * scale.max()].square()
    return squares.nan_to_num(torch.inf, torch.inf).mean((1, 2, 3)).sqrt().median()


def table(results: Sequence[Result]) -> str:
    """Tabulate a row for each system and model, a column for each stretch of time."""
    rows = []
    for (system, model), runs_of_model in grouped(results, "system", "model").items():
        errors = [spread([run["error"][k] for run in runs_of_model]) for k in range(len(TIMES))]
        rows.append([system, model, str(len(runs_of_model)), *errors])
    return markdown(["system", "model", "seeds", "to 1×", "1× to 2×", "2× to 4×", "4× to 8×"], rows)


def figure(results: Sequence[Result]) -> Figure:
    """Plot errors against time: a line for each model, the mean over seeds."""
    systems = [system for (system,) in grouped(results, "system")]
    figure, axes = panels(systems, MODELS, "median error, in sd")
    for (system, model), runs_of_model in grouped(results, "system", "model").items():
        axis = axes[system]
        errors = torch.tensor([_with_nan(run["error"]) for run in runs_of_model]).mean(0)
        axis.loglog(TIMES, errors, "o-", ms=4, color=f"C{MODELS.index(model)}")
        labels = [f"{times}×" for times in TIMES]
        axis.set(xlabel="horizon, in that of training", xticks=TIMES, xticklabels=labels)
        axis.minorticks_off()
    return figure


def _with_nan(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
