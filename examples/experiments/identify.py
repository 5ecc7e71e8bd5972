"""Recovery of latents: three systems, six models, unseen systems read from four support trajectories each.

Linear R is the theorem's promise: how well a linear map of all recovered latents gives each true one. Strong MCC
compares the neural latents themselves, before and after ``disentangle``; weak MCC compares them after CCA. Errors of
physics latents are divided by the smallest that an unbiased method can reach, those of trajectories by the noise: one
noise variance can't be predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.run import Choice, Result, Run, digits, slug
from experiments.settings import CASES, MODELS, OURS, UNCONDITIONAL
from experiments.tables import grouped, markdown, panels, spread
from experiments.trained import (
    HELD_OUT_SEED,
    Trained,
    load_or_train,
    simulate_exactly,
    simulate_tasks,
)
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import fail
from pyro_hybrid.scores.ica import disentangle
from pyro_hybrid.scores.mcc import mcc

__all__ = ["errors", "figure", "known_latents", "runs", "scores", "table", "true_latents"]

RIVALS = tuple(model for model in MODELS if model not in (OURS, UNCONDITIONAL))
COMPUTED = "read_by_the_program"
MCC_SCORES = ("strong_mcc_neural", "strong_mcc_neural_disentangled", "weak_mcc_neural")
PHYSICS_SCORES = ("mse_physics", "mse_over_cramer_rao")
TRAJECTORY_SCORES = ("reconstruction", "prediction", "prediction_median")


def runs(choice: Choice) -> list[Run]:
    """List a run for each seed, system and model."""
    return [
        Run(slug(system, model, seed), partial(_run, system, model, seed, choice))
        for seed in choice.seeds
        for system in CASES
        for model in MODELS
    ]


def _run(system: str, model: str, seed: int, choice: Choice) -> Result:
    case = CASES[system]
    training_tasks, held_out = simulate_tasks(system, seed, choice)
    num_shots = held_out.values.shape[1]
    clear = simulate_exactly(case.system(), len(held_out), num_shots, HELD_OUT_SEED + seed)
    trained = load_or_train(system, model, seed, choice)
    result: Result = {
        "system": system,
        "model": model,
        "seed": seed,
        "tasks": len(training_tasks),
        "steps": len(trained.fit.loss),
        "skipped_steps": trained.fit.skipped,
        "training_processor_seconds": trained.processor_seconds,
        "as_read": scores(trained, training_tasks[:300], held_out, clear),
    }
    if model in RIVALS:
        # Score the same trained model with computed evidence that goes on from its encoder's.
        computed = replace(trained, reading=case.final)
        result[COMPUTED] = scores(computed, training_tasks[:300], held_out, clear)
    return result


def scores(trained: Trained, training_tasks: Tasks, held_out: Tasks, clear: Tasks) -> Result:
    """Score latents and trajectories of held-out tasks; the unmixing is estimated on training tasks.

    Arguments:
        trained: the model.
        training_tasks: tasks that it was trained on.
        held_out: tasks to judge on.
        clear: the same tasks without noise.
    """
    system = trained.system
    num_physics = len(system.physics)
    num_unknown = len(system.unknown)  # the rivals' models of the pendulum have one latent more
    training_neural = trained.latent_means(training_tasks)[:, num_physics:]
    estimates = trained.latent_means(held_out)
    neural = estimates[:, num_physics:]
    truth = true_latents(trained, held_out)
    true_neural = truth[:, num_physics:]
    unmixed = disentangle(neural, components=num_unknown, fit=training_neural)
    raw = mcc(neural, true_neural)
    return {
        "latents": [*system.physics, *system.unknown],
        "linear_r": [round(float(r), 4) for r in mcc(estimates, truth).linear_r],
        "strong_mcc_neural": round(raw.strong, 4),
        "strong_mcc_neural_disentangled": round(mcc(unmixed, true_neural).strong, 4),
        "weak_mcc_neural": round(raw.weak, 4),
        **_physics_scores(trained, estimates[:, :num_physics], truth[:, :num_physics], held_out),
        **errors(trained, held_out[:100], clear[:100]),
    }


def _physics_scores(trained: Trained, estimates: Tensor, truth: Tensor, held_out: Tasks) -> Result:
    """Score physics latents (task, latent), and compare their errors with the Cramér-Rao bound."""
    support = held_out.episode().support
    bounds = trained.system.cramer_rao(support, known_latents(held_out)).mean(0)
    errors_of_physics = (estimates - truth).square().mean(0)
    correlations = []
    for pair in torch.stack([estimates, truth], -1).unbind(1):
        correlations.append(round(float(torch.corrcoef(pair.T)[0, 1]), 4))
    ratios = errors_of_physics / bounds[: truth.shape[1]]
    return {
        "correlation_physics": correlations,
        "mse_physics": [float(f"{x:.4g}") for x in errors_of_physics],
        "mse_over_cramer_rao": [float(f"{float(x):.4g}") for x in ratios],
    }


def known_latents(tasks: Tasks) -> Mapping[str, Tensor]:
    """Return the true latents of simulated tasks by name."""
    if tasks.true_latents is None:
        fail("tasks with true latents", "none", "Simulate them.")
    return tasks.true_latents


def true_latents(trained: Trained, tasks: Tasks) -> Tensor:
    """Stack the true latents in the order of :meth:`Trained.latent_means`."""
    names = (*trained.system.physics, "unknown")
    return torch.cat([known_latents(tasks)[name] for name in names], -1)


def errors(trained: Trained, tasks: Tasks, clear: Tasks) -> Result:
    """Compute mean squared errors of query trajectories in noise variances: the mean over systems, and the median.

    Predictions begin in new initial states that are known exactly. A column of its own has predictions from measured
    initial states, for which the true latents are a reference.
    """
    episode = tasks.episode()
    query = episode.query
    exact_initial = clear.episode().query.initial
    measured = query.measured_initial
    start = measured if trained.system.grid else measured.unbind(-1)
    means = {
        "reconstruction": trained.reconstruct(episode),
        "prediction": trained.predict(episode, exact_initial),
        "prediction_from_measured": trained.predict(episode),
        "truth_from_measured": trained.system.trajectories(
            known_latents(tasks), start, query.times
        ),
    }
    result: Result = {}
    for name, mean in means.items():
        shots = query if mean.shape[1] == query.shape[1] else trained.shots_read(query)
        residuals = (mean - torch.as_tensor(shots.values)) / mean.new_tensor(trained.system.noise)
        squares = residuals.square().where(shots.scored, 0.0)
        by_task = squares.sum((1, 2, 3)) / shots.scored.sum((1, 2, 3))
        result[name] = digits(by_task.mean())
        result[f"{name}_median"] = digits(by_task.nan_to_num(torch.inf).median())
    return result


def table(results: Sequence[Result]) -> str:
    """Tabulate a row for each system and model: mean ± standard deviation over seeds."""
    rows = []
    for (system, model), runs_of_model in grouped(results, "system", "model").items():
        by_encoder = [run["as_read"] for run in runs_of_model]
        computed = [run[COMPUTED] for run in runs_of_model if COMPUTED in run]
        minutes = [run["training_processor_seconds"] / 60.0 for run in runs_of_model]
        rows.append(
            [
                system,
                model,
                str(len(runs_of_model)),
                spread([_mean(run["linear_r"]) for run in by_encoder], 3),
                f"{min(min(run['linear_r']) for run in by_encoder):.3f}",
                spread([_mean(run["linear_r"]) for run in computed], 3) if computed else "",
                *(spread([run[score] for run in by_encoder], 3) for score in MCC_SCORES),
                *(spread([_mean(run[score]) for run in by_encoder]) for score in PHYSICS_SCORES),
                *(spread([run[score] for run in by_encoder]) for score in TRAJECTORY_SCORES),
                spread(minutes, 1),
            ]
        )
    return markdown(
        [
            "system",
            "model",
            "seeds",
            "linear R, mean",
            "worst latent and seed",
            "linear R, read by the program",
            "strong MCC of z_N",
            "after disentangle",
            "weak MCC",
            "MSE of z_P",
            "MSE / Cramér-Rao",
            "reconstruction",
            "prediction",
            "its median",
            "minutes",
        ],
        rows,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def figure(results: Sequence[Result]) -> Figure:
    """Plot linear R of every latent, by system and model: a dot for each seed."""
    systems = [system for (system,) in grouped(results, "system")]
    figure, axes = panels(systems, MODELS, "linear R")
    for run in results:
        axis = axes[run["system"]]
        index = MODELS.index(run["model"])
        scores_of_run = run["as_read"]
        names = scores_of_run["latents"]
        places = [k + 0.11 * (index - 2.5) for k in range(len(names))]
        axis.plot(places, scores_of_run["linear_r"], "o", ms=4, alpha=0.8, color=f"C{index}")
        axis.set(ylim=(0.0, 1.03))
        axis.set_xticks(range(len(names)), names, fontsize=8)
    return figure
