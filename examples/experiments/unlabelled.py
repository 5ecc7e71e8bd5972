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
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import pair_confusion_matrix
from torch import Tensor

from experiments.identify import true_latents
from experiments.long_recordings import Clocked, cut, with_clock
from experiments.relabelling import Unpaired, groups_in, pairs, sets
from experiments.run import Choice, Result, Run, slug
from experiments.settings import CASES, OURS, Sharpening
from experiments.tables import grouped, markdown, spread
from experiments.trained import SHOTS, Trained, data, learnt, sharpened, taught, trained
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.models import MetaHybridVAE
from pyro_hybrid.scores.mcc import mcc
from pyro_hybrid.scores.separability import disentangle
from pyro_hybrid.systems import Pendulum

__all__ = ["figure", "grouping_scores", "runs", "scores", "table"]

FRACTIONS = (1.0, 0.5, 0.25, 0.0)
CASE = CASES["pendulum"]
PAIRED = CASE.ours._replace(
    batch_size=192, sharpening=None
)  # of two trajectories: one shot to explain, not four
# What isn't of one system costs more than three times what others do, and teaches nothing.
BETTER = Sharpening(4, 128, 0.05, GaussNewton(2, segments=(2, 2, 7)), misread=3.0)
CAREFUL = CASE._replace(
    ours=CASE.ours._replace(sharpening=(CASE.ours.sharpening or BETTER)._replace(misread=3.0))
)
READING = GaussNewton(3, segments=(2, 2, 2, 7))
TINY = GaussNewton(1)
INDEPENDENCE = 30.0
PIECES = 2


def runs(choice: Choice) -> list[Run]:
    """List a run for each seed and fraction of labels, and one of long recordings for each seed."""
    heaps = [
        Run(slug("labels", fraction, "seed", seed), partial(_heap, fraction, seed, choice))
        for seed in choice.seeds
        for fraction in FRACTIONS
    ]
    return heaps + [
        Run(slug("long", "seed", seed), partial(_long, seed, choice)) for seed in choice.seeds
    ]


def _heap(fraction: float, seed: int, choice: Choice) -> Result:
    """Recover the tasks, and train on them as ``identify`` does; with all labels, take ``identify``'s model."""
    learn, judge = data("pendulum", seed, choice)
    shots = learn.values.shape[1]
    truth = torch.arange(len(learn)).repeat_interleave(shots)
    known = round(fraction * len(learn)) * shots
    history: list[Result] = []
    if known == len(truth):
        found = trained("pendulum", OURS, seed, choice)
    else:
        heap = scattered(learn)
        labels, history = _recovered(heap, truth, known, seed, choice.fast)
        learn = sets(heap, labels, shots)
        found = learnt(CAREFUL, OURS, learn, seed, choice.fast)
    return {
        "case": "heap",
        "labelled": fraction,
        "seed": seed,
        "shots": shots,
        "tasks": len(learn),
        "grouping": history,
        **scores(found, learn, judge),
    }


def scattered(tasks: Tasks) -> Tasks:
    """Make a task of every trajectory."""

    def apart(part: Tensor) -> Tensor:
        return part.flatten(0, 1).unsqueeze(1)

    assert tasks.initial is not None and tasks.states is not None
    return Tasks(
        tasks.times,
        apart(tasks.values),
        observed=apart(tasks.observed),
        scored=apart(tasks.scored),
        num_support=1,
        initial=apart(tasks.initial),
        states=apart(tasks.states),
    )


def _recovered(
    heap: Tasks, truth: Tensor, known: int, seed: int, fast: bool
) -> tuple[Tensor, list[Result]]:
    """Label all trajectories, the first ``known`` of which are given, and score the other labels after each round.

    Rounds after the first train on grouped trajectories only, with a second model: the latents of the first are those
    that a single trajectory determines, and further training doesn't change that.
    """
    torch.manual_seed(seed)
    labels, history = (
        torch.cat([truth[:known], len(truth) + torch.arange(len(truth) - known)]),
        list[Result](),
    )

    def regrouped() -> Tensor:
        model.prior.evidence = TINY if fast else READING  # the program itself, from here on
        found = groups_in(model, heap[known:])
        history.append(grouping_scores(found, truth[known:]))
        return torch.cat([truth[:known], len(truth) + found])

    model: MetaHybridVAE = Unpaired(Pendulum(), INDEPENDENCE, **PAIRED.options)
    taught(model, model.guide(), pairs(heap, labels), PAIRED, seed, fast)
    labels = regrouped()
    model = MetaHybridVAE(Pendulum(), **PAIRED.options)
    guide = model.guide()
    taught(model, guide, pairs(heap, labels, loners=False), PAIRED, seed + 1, fast)
    labels = regrouped()
    sharpened(model, guide, pairs(heap, labels, loners=False), BETTER, seed + 2, fast)
    labels = regrouped()
    sharpened(
        model, guide, sets(heap, labels, SHOTS), BETTER._replace(batch_size=48), seed + 3, fast
    )
    return regrouped(), history


def _long(seed: int, choice: Choice) -> Result:
    system = Pendulum()
    learn, judge = data("pendulum", seed, choice)
    system.points *= PIECES
    tasks, other = (
        cut(system.simulate(len(some), 2, seed + start), PIECES)
        for start, some in ((20_000, learn), (30_000, judge))
    )
    found = learnt(CAREFUL._replace(system=Clocked), OURS, tasks, seed, choice.fast)
    return {
        "case": "long",
        "labelled": None,
        "seed": seed,
        "systems": len(tasks),
        "pieces": PIECES,
        "grouping": [],
        **scores(found, tasks, with_clock(judge)),
        "long": scores(found, tasks, other),
    }


def grouping_scores(found: Tensor, truth: Tensor) -> Result:
    """Compute the adjusted Rand index, and precision and recall of pairs."""
    (_, wrong), (missed, right) = pair_confusion_matrix(truth.numpy(), found.numpy()).tolist()
    return {
        "adjusted_rand": round(float(adjusted_rand_score(truth.numpy(), found.numpy())), 4),
        "right_of_found": round(right / max(right + wrong, 1), 4),
        "found_of_right": round(right / max(right + missed, 1), 4),
        "groups": len(found.unique()),
    }


def scores(found: Trained, learn: Tasks, judge: Tasks) -> Result:
    """Score latents of unseen systems given their support; the unmixing is estimated on training systems."""
    some = torch.from_numpy(np.random.default_rng(0).permutation(len(learn))[:500])
    seen, new, truth = found.latents(learn[some]), found.latents(judge), true_latents(found, judge)
    system = found.system
    known = len(system.physics)
    unmixed = disentangle(new[:, known:], components=len(system.unknown), fit=seen[:, known:])
    everything, neural = mcc(new, truth), mcc(unmixed, truth[:, known:])
    return {
        "latents": [*system.physics, *system.unknown],
        "strong_neural": round(neural.strong, 4),
        "strong": neural.matched.round(4).tolist(),
        "linear_r_mean": round(float(everything.linear_r.mean()), 4),
        "linear_r": everything.linear_r.round(4).tolist(),
        "held_out": len(judge),
    }


def table(results: Sequence[Result]) -> str:
    """Tabulate a row for each fraction of labels, and one for long recordings: mean ± standard deviation over seeds."""
    rows = []
    for (case, labelled), found in grouped(results, "case", "labelled").items():
        name = (
            f"heap, {float(labelled):.0%} of the systems labelled"
            if case == "heap"
            else "one long trajectory each"
        )
        rows.append([name, *_cells(found), *(_grouping(found, key) for key in GROUPING)])
        if case == "long":
            rows.append(
                [
                    "the same, judged on long ones",
                    *_cells([one["long"] for one in found]),
                    *["-"] * 3,
                ]
            )
    return markdown(["what is known", *SCORES.values(), *GROUPING.values()], rows)


SCORES = {"strong_neural": "strong MCC of z_N", "linear_r_mean": "linear R"}
GROUPING = {
    "adjusted_rand": "adjusted Rand index",
    "right_of_found": "pairs that are right",
    "found_of_right": "right pairs found",
}


def _cells(found: Sequence[Result]) -> list[str]:
    return [spread([one[score] for one in found], 3) for score in SCORES]


def _grouping(found: Sequence[Result], key: str) -> str:
    return spread([one["grouping"][-1][key] if one["grouping"] else None for one in found], 3)


def figure(results: Sequence[Result]) -> Figure:
    """Plot scores against the fraction of labels, with those of long recordings as horizontal lines."""
    drawn = Figure(figsize=(8.0, 3.2), layout="constrained")
    axes = drawn.subplots(1, 3)
    heaps, longs = ([one for one in results if one["case"] == case] for case in ("heap", "long"))
    for axis, (score, name) in zip(axes, SCORES.items(), strict=False):
        axis.plot(
            [one["labelled"] for one in heaps], [one[score] for one in heaps], "o", label="heap"
        )
        for one in longs:
            axis.axhline(
                one[score],
                color="C1",
                lw=1,
                label="one long trajectory each" if one is longs[0] else None,
            )
        axis.set(xlabel="fraction of systems labelled", ylabel=name, ylim=(0.0, 1.03))
    axes[0].legend(fontsize=8)
    for one in (one for one in heaps if one["grouping"]):
        history = [step["adjusted_rand"] for step in one["grouping"]]
        first = one["seed"] == heaps[0]["seed"]
        axes[2].plot(
            range(1, 1 + len(history)),
            history,
            "o-",
            ms=3,
            color=f"C{FRACTIONS.index(one['labelled'])}",
            label=f"{one['labelled']:.0%} labelled" if first else None,
        )
    if axes[2].lines:
        axes[2].legend(fontsize=8)
    axes[2].set(xlabel="round of grouping", ylabel="adjusted Rand index", ylim=(0.0, 1.03))
    return drawn
