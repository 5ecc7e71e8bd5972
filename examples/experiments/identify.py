"""Recovery of latents: three systems, six models, unseen systems read from four support trajectories each.

Linear R is the theorem's promise: how well a linear map of all recovered latents gives each true one. Strong MCC
compares the neural latents themselves, before and after ``disentangle``; weak MCC compares them after CCA. Errors of
physics latents are divided by the smallest that an unbiased method can reach, those of trajectories by the noise: one
noise variance can't be predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.run import Choice, Result, Run, digits, slug
from experiments.settings import CASES, DEAF, MODELS, OURS
from experiments.tables import grouped, markdown, panels, spread
from experiments.trained import HELD_OUT_SEED, Trained, data, exactly, trained
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.scores.mcc import mcc
from pyro_hybrid.scores.separability import disentangle

__all__ = ["figure", "runs", "scores", "table"]


def runs(choice: Choice) -> list[Run]:
    """List a run for each seed, system and model."""
    return [
        Run(slug(system, model, seed), partial(_run, system, model, seed, choice))
        for seed in choice.seeds
        for system in CASES
        for model in MODELS
    ]


def _run(system: str, model: str, seed: int, choice: Choice) -> Result:
    learn, judge = data(system, seed, choice)
    clear = exactly(CASES[system].system(), len(judge), judge.values.shape[1], HELD_OUT_SEED + seed)
    found = trained(system, model, seed, choice)
    out: Result = {
        "system": system,
        "model": model,
        "seed": seed,
        "tasks": len(learn),
        "steps": len(found.fit.loss),
        "skipped_steps": found.fit.skipped,
        "training_processor_seconds": found.processor_seconds,
        "as_read": scores(found, learn[:300], judge, clear),
    }
    if model not in (
        OURS,
        DEAF,
    ):  # score the same trained model with computed evidence in place of its encoder's
        found.reading = CASES[system].final
        out["read_by_the_program"] = scores(found, learn[:300], judge, clear)
    return out


def scores(found: Trained, learn: Tasks, judge: Tasks, clear: Tasks) -> Result:
    """Score latents and trajectories; the unmixing is estimated on training systems."""
    known, names = len(found.system.physics), [*found.system.physics, *found.system.unknown]
    seen, new, truth = found.latents(learn), found.latents(judge), true_latents(found, judge)
    neural = [z[:, known:] for z in (seen, new, truth)]
    everything, raw = mcc(new, truth), mcc(neural[1], neural[2])
    number = len(found.system.unknown)  # the rivals' models of the pendulum have one latent more
    alone = mcc(disentangle(neural[1], components=number, fit=neural[0]), neural[2])
    error = (new[:, :known] - truth[:, :known]).square().mean(0)
    support = judge.episode().support
    assert support is not None and judge.true_latents is not None
    bound = found.system.cramer_rao(support, judge.true_latents).mean(0)[:known]
    return {
        "latents": names,
        "linear_r": [round(float(r), 4) for r in everything.linear_r],
        "strong_mcc_neural": round(raw.strong, 4),
        "strong_mcc_neural_disentangled": round(alone.strong, 4),
        "weak_mcc_neural": round(raw.weak, 4),
        "correlation_physics": [
            round(float(torch.corrcoef(pair.T)[0, 1]), 4)
            for pair in torch.stack([new[:, :known], truth[:, :known]], -1).unbind(1)
        ],
        "mse_physics": [float(f"{x:.4g}") for x in error],
        "mse_over_cramer_rao": [
            float(f"{float(a / b):.4g}") for a, b in zip(error, bound, strict=True)
        ],
        **errors(found, judge[:100], clear[:100]),
    }


def true_latents(found: Trained, tasks: Tasks) -> Tensor:
    """Stack the true latents in the order of :meth:`Trained.latents`."""
    assert tasks.true_latents is not None
    return torch.cat([tasks.true_latents[name] for name in (*found.system.physics, "unknown")], -1)


def errors(found: Trained, tasks: Tasks, clear: Tasks) -> Result:
    """Compute mean squared errors of query trajectories in noise variances: the mean over systems, and the median.

    Predictions begin in new initial states that are known exactly. A column of its own has predictions from measured
    initial states, for which the true latents are a reference.
    """
    episode, exact = tasks.episode(), clear.episode().query.initial
    measured = episode.query.measured_initial
    start = measured if found.system.grid else measured.unbind(-1)
    with_truth = found.system.trajectories(tasks.true_latents or {}, start, episode.query.times)
    means = {
        "reconstruction": found.reconstructed(episode),
        "prediction": found.predicted(episode, exact),
        "prediction_from_measured": found.predicted(episode),
        "truth_from_measured": with_truth,
    }
    out: Result = {}
    for name, mean in means.items():
        whole = episode.query
        shots = whole if mean.shape[1] == whole.shape[1] else found.given(whole)
        counts = shots.scored
        error = (mean - torch.as_tensor(shots.values)) / mean.new_tensor(found.system.noise)
        square = error.square().where(counts, 0.0)
        by_task = square.sum((1, 2, 3)) / counts.sum((1, 2, 3))
        out[name] = digits(by_task.mean())
        out[f"{name}_median"] = digits(by_task.nan_to_num(torch.inf).median())
    return out


def table(results: Sequence[Result]) -> str:
    """Tabulate a row for each system and model: mean ± standard deviation over seeds."""
    rows = []
    for (system, model), found in grouped(results, "system", "model").items():
        read = [one["as_read"] for one in found]
        deeper = [one["read_by_the_program"] for one in found if "read_by_the_program" in one]
        rows.append(
            [
                system,
                model,
                str(len(found)),
                spread([sum(one["linear_r"]) / len(one["linear_r"]) for one in read], 3),
                f"{min(min(one['linear_r']) for one in read):.3f}",
                spread([sum(one["linear_r"]) / len(one["linear_r"]) for one in deeper], 3)
                if deeper
                else "",
                *(
                    spread([one[f"{kind}_mcc_neural{after}"] for one in read], 3)
                    for kind, after in (("strong", ""), ("strong", "_disentangled"), ("weak", ""))
                ),
                *(
                    spread([sum(one[name]) / len(one[name]) for one in read])
                    for name in ("mse_physics", "mse_over_cramer_rao")
                ),
                *(
                    spread([one[name] for one in read])
                    for name in ("reconstruction", "prediction", "prediction_median")
                ),
                spread([one["training_processor_seconds"] / 60.0 for one in found], 1),
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


def figure(results: Sequence[Result]) -> Figure:
    """Plot linear R of every latent, by system and model: a dot for each seed."""
    drawn, axes = panels([system for (system,) in grouped(results, "system")], MODELS, "linear R")
    for one in results:
        at, found = MODELS.index(one["model"]), one["as_read"]
        places = [k + 0.11 * (at - 2.5) for k in range(len(found["latents"]))]
        axes[one["system"]].plot(places, found["linear_r"], "o", ms=4, alpha=0.8, color=f"C{at}")
        axes[one["system"]].set(ylim=(0.0, 1.03))
        axes[one["system"]].set_xticks(range(len(places)), found["latents"], fontsize=8)
    return drawn
