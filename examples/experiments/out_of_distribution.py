"""Predictions out of distribution: initial states, or latents, beyond the ranges of the training.

Every initial component is drawn from above its range, by up to half of that range's radius; every latent from above
its range, by up to a quarter of it. Errors are relative, as in ``long_horizon``, and medians over systems. R is that of
the linear map to the truth, which is estimated within the ranges and applied beyond them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.identify import true_latents
from experiments.long_horizon import relative
from experiments.run import Choice, Result, Run, digits, slug
from experiments.settings import CASES, MODELS
from experiments.tables import grouped, markdown, panels, spread
from experiments.trained import Trained, load_or_train, simulate_exactly
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.systems import System

__all__ = ["figure", "runs", "table", "widen_ranges"]

WHERE = ("within", "initial states beyond", "latents beyond")


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
    num_tasks = 24 if choice.fast else 200
    seed_of_tasks = 30_000 + seed
    systems = [widen_ranges(CASES[system].system(), where) for where in WHERE]
    noisy = [one.simulate(num_tasks, 8, seed_of_tasks) for one in systems]
    clear = [simulate_exactly(one, num_tasks, 8, seed_of_tasks) for one in systems]
    errors = []
    for tasks, exact in zip(noisy, clear, strict=True):
        errors.append(digits(_error(trained, tasks[:100], exact[:100])))
    return {
        "system": system,
        "model": model,
        "seed": seed,
        "where": WHERE,
        "error": errors,
        "r": [round(value, 4) for value in _linear_r(trained, noisy)],
    }


def widen_ranges(system: System, where: str) -> System:
    """Move the ranges of a system's latents or initial states beyond those of training, in place."""
    latents = {*system.physics, *system.unknown}
    ranges = dict(system.ranges)
    for name, (low, high) in system.ranges.items():
        beyond = (high, high + 0.25 * (high - low))
        if where == "initial states beyond" and name not in latents:
            ranges[name] = beyond
        if where == "latents beyond" and name in latents:
            ranges[name] = beyond
    system.ranges = ranges  # type: ignore[misc]  # of this instance alone
    return system


def _error(trained: Trained, tasks: Tasks, clear: Tasks) -> Tensor:
    truth = clear.episode().query
    means = trained.predict(tasks.episode(), truth.initial)
    return relative(means, torch.as_tensor(truth.values))


def _linear_r(trained: Trained, sets: Sequence[Tasks]) -> list[float]:
    """Compute the mean R over latents in each set, by a linear map that is fitted within the ranges.

    Half of the first set fits the map, and the other half scores it.
    """
    estimates = []
    truths = []
    for tasks in sets:
        means = trained.latent_means(tasks)
        estimates.append(torch.cat([means, torch.ones(len(means), 1)], -1))
        truths.append(true_latents(trained, tasks))
    half = len(estimates[0]) // 2
    matrix = torch.linalg.lstsq(estimates[0][:half], truths[0][:half]).solution
    variance = truths[0].var(0)
    scores = []
    for index, (estimate, truth) in enumerate(zip(estimates, truths, strict=True)):
        first = half if index == 0 else 0
        squares = (estimate @ matrix - truth)[first:].square().mean(0)
        explained = (1.0 - squares / variance).clamp(min=0.0)
        scores.append(float(explained.sqrt().mean()))
    return scores


def table(results: Sequence[Result]) -> str:
    """Tabulate a row for each system and model: errors, and R, within and beyond."""
    rows = []
    for (system, model), runs_of_model in grouped(results, "system", "model").items():
        errors = [spread([run["error"][k] for run in runs_of_model]) for k in range(3)]
        scores = [spread([run["r"][k] for run in runs_of_model], 3) for k in range(3)]
        rows.append([system, model, str(len(runs_of_model)), *errors, *scores])
    header = [f"{score}, {where}" for score in ("error", "R") for where in WHERE]
    return markdown(["system", "model", "seeds", *header], rows)


def figure(results: Sequence[Result]) -> Figure:
    """Plot errors within and beyond the ranges: a dot for each seed."""
    systems = [system for (system,) in grouped(results, "system")]
    figure, axes = panels(systems, MODELS, "median error, in sd")
    labels = ("within", "initial states\nbeyond", "latents\nbeyond")
    for run in results:
        axis = axes[run["system"]]
        index = MODELS.index(run["model"])
        places = [k + 0.11 * (index - 2.5) for k in range(3)]
        axis.semilogy(places, run["error"], "o", ms=4, alpha=0.8, color=f"C{index}")
        axis.set_xticks(range(3), labels, fontsize=8)
        axis.set_xlim(-0.45, 2.45)
    return figure
