"""Training without labels: the theorem asks which trajectories are of one system, and here that is recovered.

In a heap, trajectories of a fraction of a thousand pendulums are labelled and the others are not. Each unlabelled one
is first a task by itself, with latents that must not depend on its initial state. Then latents are inferred from every
trajectory, and trajectories that are most probably of one system become one task (clustering in λ: evidence adds up). A
second model is trained on pairs of these and refined on pairs and on whole groups, and regroups them after each stage.
A last one is trained afresh on the recovered tasks, as ``identify`` does on the true ones.

In long recordings, a single one of each pendulum is cut into pieces with a clock; some are the support and others the
query.

Models are judged like all others, on 300 unseen pendulums from four support trajectories. The unmixing of the neural
latents is estimated on the recovered tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import pair_confusion_matrix
from torch import Tensor

from experiments.identify import true_latents
from experiments.long_recordings import Clocked, cut, with_clock
from experiments.relabelling import Unpaired, groups_in, pairs, sets
from experiments.run import Choice, Result, Run, slug
from experiments.settings import CASES, OURS
from experiments.tables import grouped, markdown, spread
from experiments.trained import (
    SHOTS,
    Program,
    Trained,
    fit_model,
    load_or_train,
    refine,
    simulate_tasks,
    train,
)
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.fitting.posterior import Posterior
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.models import MetaHybridVAE
from pyro_hybrid.scores.ica import disentangle
from pyro_hybrid.scores.mcc import mcc
from pyro_hybrid.systems import Pendulum
from pyro_hybrid.training.refinement import Refinement

__all__ = ["figure", "grouping_scores", "runs", "scores", "table"]

FRACTIONS = (1.0, 0.5, 0.25, 0.0)
CASE = CASES["pendulum"]
# A pair has one shot to explain and not four.
PAIRED = CASE.ours._replace(batch_size=192, refinement=None)
# Shots of different systems cost more than three times the usual, and are excluded.
BETTER = Refinement(
    num_steps=4,
    batch_size=128,
    prior_sd=0.05,
    evidence=GaussNewton(2, segments=(2, 2, 7)),
    outlier_factor=3.0,
)
CAREFUL = CASE._replace(
    ours=CASE.ours._replace(
        refinement=(CASE.ours.refinement or BETTER)._replace(outlier_factor=3.0)
    )
)
READING = GaussNewton(3, segments=(2, 2, 2, 7))
FAST_READING = GaussNewton(1)
INDEPENDENCE = 30.0
PIECES = 2


def runs(choice: Choice) -> list[Run]:
    """List, for each seed, a run for each fraction of labels, and one of long trajectories."""
    heaps = [
        Run(slug("labels", fraction, "seed", seed), partial(_run_heap, fraction, seed, choice))
        for seed in choice.seeds
        for fraction in FRACTIONS
    ]
    longs = [
        Run(slug("long", "seed", seed), partial(_run_long, seed, choice)) for seed in choice.seeds
    ]
    return heaps + longs


def _run_heap(fraction: float, seed: int, choice: Choice) -> Result:
    """Recover the tasks, and train on them as ``identify`` does; with all labels that is ``identify``'s model."""
    tasks, held_out = simulate_tasks("pendulum", seed, choice)
    num_shots = tasks.values.shape[1]
    truth = torch.arange(len(tasks)).repeat_interleave(num_shots)
    num_known = round(fraction * len(tasks)) * num_shots
    history: list[Result] = []
    if num_known == len(truth):
        trained = load_or_train("pendulum", OURS, seed, choice)
    else:
        heap = separate_shots(tasks)
        labels, history = _recover_labels(heap, truth, num_known, seed, choice.fast)
        tasks = sets(heap, labels, num_shots)
        trained = fit_model(CAREFUL, OURS, tasks, seed, choice.fast)
    return {
        "case": "heap",
        "labelled": fraction,
        "seed": seed,
        "shots": num_shots,
        "tasks": len(tasks),
        "grouping": history,
        **scores(trained, tasks, held_out),
    }


def separate_shots(tasks: Tasks) -> Tasks:
    """Make a task of every trajectory."""

    def separate(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.flatten(0, 1).unsqueeze(1)

    return replace(
        tasks,
        values=tasks.values.flatten(0, 1).unsqueeze(1),
        observed=tasks.observed.flatten(0, 1).unsqueeze(1),
        scored=tasks.scored.flatten(0, 1).unsqueeze(1),
        num_support=1,
        initial=separate(tasks.initial),
        states=separate(tasks.states),
        inputs=separate(tasks.inputs),
        true_latents=None,
    )


def _recover_labels(
    heap: Tasks, truth: Tensor, num_known: int, seed: int, fast: bool
) -> tuple[Tensor, list[Result]]:
    """Recover the groups of a heap whose first trajectories have labels.

    Rounds after the first train on recovered groups alone, with a new model. The first model's latents are those that a
    single trajectory determines, and further training would not change them.

    Returns:
        Labels of all trajectories, and after each round the scores of those that had none.
    """
    torch.manual_seed(seed)
    reading = FAST_READING if fast else READING
    known = truth[:num_known]
    alone = len(truth) + torch.arange(len(truth) - num_known)
    labels = torch.cat([known, alone])
    history: list[Result] = []

    def relabel(posterior: Posterior) -> Tensor:
        groups = groups_in(posterior.model, heap[num_known:])
        history.append(grouping_scores(groups, truth[num_known:]))
        return torch.cat([known, len(truth) + groups])

    single = Unpaired(Pendulum(), INDEPENDENCE, **PAIRED.options)
    posterior = _train(single, single.guide(), pairs(heap, labels), reading, seed, fast)
    labels = relabel(posterior)
    model = MetaHybridVAE(Pendulum(), **PAIRED.options)
    guide = model.guide()
    paired = pairs(heap, labels, loners=False)
    posterior = _train(model, guide, paired, reading, seed + 1, fast)
    labels = relabel(posterior)
    paired = pairs(heap, labels, loners=False)
    posterior = refine(posterior, paired, BETTER, seed + 2, fast)
    labels = relabel(posterior)
    grouped_tasks = sets(heap, labels, SHOTS)
    posterior = refine(posterior, grouped_tasks, BETTER._replace(batch_size=48), seed + 3, fast)
    return relabel(posterior), history


def _train(
    model: MetaHybridVAE,
    guide: AmortizedGuide,
    tasks: Tasks,
    reading: GaussNewton,
    seed: int,
    fast: bool,
) -> Posterior:
    """Train encoders alone, and compute the evidence of supports from where their encoder points."""
    trained, _ = train(Program(model, guide), tasks, PAIRED, seed, fast)
    posterior = Posterior(trained.model, trained.guide).copy()
    prior = posterior.model.prior
    prior.evidence = prior.evidence.then(reading)
    return posterior


def _run_long(seed: int, choice: Choice) -> Result:
    """Train on pieces of one long trajectory of each system."""
    short_tasks, held_out = simulate_tasks("pendulum", seed, choice)
    system = Pendulum()
    system.points *= PIECES
    tasks = cut(system.simulate(len(short_tasks), 2, seed + 20_000), PIECES)
    long_held_out = cut(system.simulate(len(held_out), 2, seed + 30_000), PIECES)
    trained = fit_model(CAREFUL._replace(system=Clocked), OURS, tasks, seed, choice.fast)
    return {
        "case": "long",
        "labelled": None,
        "seed": seed,
        "systems": len(tasks),
        "pieces": PIECES,
        "grouping": [],
        **scores(trained, tasks, with_clock(held_out)),
        "long": scores(trained, tasks, long_held_out),
    }


def grouping_scores(labels: Tensor, truth: Tensor) -> Result:
    """Compute the adjusted Rand index, the share of correct pairs, and the share of true pairs that were found."""
    confusion = pair_confusion_matrix(truth.numpy(), labels.numpy()).tolist()
    (_, wrong), (missed, right) = confusion
    return {
        "adjusted_rand": round(float(adjusted_rand_score(truth.numpy(), labels.numpy())), 4),
        "right_of_found": round(right / max(right + wrong, 1), 4),
        "found_of_right": round(right / max(right + missed, 1), 4),
        "groups": len(labels.unique()),
    }


def scores(trained: Trained, tasks: Tasks, held_out: Tasks) -> Result:
    """Score the latents of unseen systems, given their support; the unmixing is estimated on training systems."""
    order = np.random.default_rng(0).permutation(len(tasks))
    rows = torch.from_numpy(order[:500])
    training_latents = trained.latent_means(tasks[rows])
    latents = trained.latent_means(held_out)
    truth = true_latents(trained, held_out)
    system = trained.system
    num_physics = len(system.physics)
    unmixed = disentangle(
        latents[:, num_physics:],
        components=len(system.unknown),
        fit=training_latents[:, num_physics:],
    )
    neural = mcc(unmixed, truth[:, num_physics:])
    linear_r = mcc(latents, truth).linear_r
    return {
        "latents": [*system.physics, *system.unknown],
        "strong_neural": round(neural.strong, 4),
        "strong": neural.matched.round(4).tolist(),
        "linear_r_mean": round(float(linear_r.mean()), 4),
        "linear_r": linear_r.round(4).tolist(),
        "held_out": len(held_out),
    }


SCORES = {"strong_neural": "strong MCC of z_N", "linear_r_mean": "linear R"}
GROUPING = {
    "adjusted_rand": "adjusted Rand index",
    "right_of_found": "pairs that are right",
    "found_of_right": "right pairs found",
}


def table(results: Sequence[Result]) -> str:
    """Tabulate a row for each fraction of labels, and one for long trajectories: mean ± standard deviation over seeds."""
    rows = []
    for (case, labelled), same_case in grouped(results, "case", "labelled").items():
        name = "one long trajectory each"
        if case == "heap":
            name = f"heap, {float(labelled):.0%} of the systems labelled"
        grouping = [_grouping_cell(same_case, key) for key in GROUPING]
        rows.append([name, *_score_cells(same_case), *grouping])
        if case == "long":
            long = _score_cells([run["long"] for run in same_case])
            rows.append(["the same, judged on long ones", *long, *["-"] * 3])
    return markdown(["what is known", *SCORES.values(), *GROUPING.values()], rows)


def _score_cells(results: Sequence[Result]) -> list[str]:
    return [spread([run[score] for run in results], 3) for score in SCORES]


def _grouping_cell(results: Sequence[Result], key: str) -> str:
    last = [run["grouping"][-1][key] if run["grouping"] else None for run in results]
    return spread(last, 3)


def figure(results: Sequence[Result]) -> Figure:
    """Plot scores against the fraction of labels, with those of long trajectories as lines across."""
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    heaps = [run for run in results if run["case"] == "heap"]
    longs = [run for run in results if run["case"] == "long"]
    for axis, (score, name) in zip((left, middle), SCORES.items(), strict=True):
        _plot_score(axis, heaps, longs, score)
        axis.set(xlabel="fraction of systems labelled", ylabel=name, ylim=(0.0, 1.03))
    left.legend(fontsize=8)
    _plot_grouping(right, heaps)
    return figure


def _plot_score(axis: Axes, heaps: Sequence[Result], longs: Sequence[Result], score: str) -> None:
    fractions = [run["labelled"] for run in heaps]
    axis.plot(fractions, [run[score] for run in heaps], "o", label="heap")
    for run in longs:
        label = "one long trajectory each" if run is longs[0] else None
        axis.axhline(run[score], color="C1", lw=1, label=label)


def _plot_grouping(axis: Axes, heaps: Sequence[Result]) -> None:
    for run in heaps:
        if not run["grouping"]:
            continue
        indices = [score["adjusted_rand"] for score in run["grouping"]]
        rounds = range(1, 1 + len(indices))
        is_first = run["seed"] == heaps[0]["seed"]
        label = f"{run['labelled']:.0%} labelled" if is_first else None
        color = f"C{FRACTIONS.index(run['labelled'])}"
        axis.plot(rounds, indices, "o-", ms=3, color=color, label=label)
    if axis.lines:
        axis.legend(fontsize=8)
    axis.set(xlabel="round of grouping", ylabel="adjusted Rand index", ylim=(0.0, 1.03))
