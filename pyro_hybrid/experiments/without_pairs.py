"""Must one know which trajectories are of one system? The paper's theorem asks for it; these are ways to do without.

A heap: of a fraction of a thousand pendulums the trajectories are labelled, those of the others lie in one heap. Each
of these is at first a task by itself, of latents that must not know where it began. Then the program reads every
trajectory, those that are most probably of one system become one task (clustering in λ: evidence adds up), and a model
that never saw a trajectory alone is trained on these and groups them better, several times over. A long trajectory: a
single recording of each pendulum, cut into pieces that know what time it is; some are the support and others the query.

Judged like all others: on 300 pendulums never seen, from four support trajectories; what unmixes the neural latents is
read in the tasks as they were recovered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import pair_confusion_matrix
from torch import Tensor

from ..checkpoint import Fit
from ..guide import AmortizedGuide
from ..identifiability.mcc import mcc
from ..identifiability.separability import disentangle
from ..linearise import Linearised
from ..models import MetaHybridVAE
from ..systems import Pendulum
from ..tasks import Tasks
from ..training import meta_train
from .clocked import Clocked, cut, with_clock
from .recovering import Unpaired, groups_in, pairs, sets
from .run import Choice, Result, Run, slug
from .tables import grouped, markdown, spread
from .trained import data

__all__ = ["figure", "grouping_scores", "runs", "scores", "table"]

FRACTIONS = (1.0, 0.5, 0.25, 0.0)
OPTIONS: dict[str, Any] = {"linear": False, "straightness": 0.3, "noise": 10.0}
READING, FINAL = Linearised(3, segments=(2, 2, 2, 7)), Linearised(3, segments=(2, 2, 2, 7), restarts=4)
TINY = Linearised(1)
CORRECTION, INDEPENDENCE = 30.0, 30.0
SPARE = 4  # latents, as in the example; of single trajectories, what is superfluous would learn where they began
PIECES = 2


class Steps(NamedTuple):
    """Training steps: ``alone``, of single trajectories; ``afresh``, of pairs, and ``rounds`` times ``grouped`` more of
    better ones; ``last``, on sets.
    """

    alone: int = 1000
    afresh: int = 1500
    grouped: int = 600
    rounds: int = 4
    last: int = 4000

    @property
    def total(self) -> int:
        """All of them."""
        return self.alone + self.afresh + self.rounds * self.grouped + self.last


def runs(choice: Choice) -> list[Run]:
    """For each seed, one for each fraction of labels, and one of long trajectories."""
    heaps = [Run(slug("labels", fraction, "seed", seed), partial(_heap, fraction, seed, choice))
             for seed in choice.seeds for fraction in FRACTIONS]
    return heaps + [Run(slug("long", "seed", seed), partial(_long, seed, choice)) for seed in choice.seeds]


def _steps(choice: Choice) -> Steps:
    return Steps(2, 1, 1, 1, 2) if choice.fast else Steps()


def _final(choice: Choice) -> Linearised:
    return TINY if choice.fast else FINAL


def _heap(fraction: float, seed: int, choice: Choice) -> Result:
    """Recover the tasks, and then train as the example does; where all is known, for as many steps in all."""
    learn, judge = data("pendulum", seed, choice)
    steps, shots = _steps(choice), learn.values.shape[1]
    truth = torch.arange(len(learn)).repeat_interleave(shots)
    known = round(fraction * len(learn)) * shots
    torch.manual_seed(seed)
    history: list[Result] = []
    if known < len(truth):
        labels, history = _recovered(scattered(learn), truth, known, steps, seed)
        learn = sets(scattered(learn), labels, shots)
    model = MetaHybridVAE(Pendulum(), latents=SPARE, **OPTIONS)
    _train(model, model.guide(), learn, steps.last if history else steps.total, seed)
    return {"case": "heap", "labelled": fraction, "seed": seed, "shots": shots, **steps._asdict(),
            "steps": steps.total, "tasks": len(learn), "grouping": history,
            **scores(model, learn, judge, _final(choice))}


def scattered(tasks: Tasks) -> Tasks:
    """Every trajectory a task by itself."""
    def apart(part: Tensor) -> Tensor:
        return part.flatten(0, 1).unsqueeze(1)

    assert isinstance(tasks.states, tuple)
    return Tasks(tasks.times, apart(tasks.values), tuple(map(apart, tasks.states)), 1,
                 mask=apart(torch.as_tensor(tasks.mask).expand_as(tasks.values)))


def _recovered(heap: Tasks, truth: Tensor, known: int, steps: Steps, seed: int) -> tuple[Tensor, list[Result]]:
    """Labels of all trajectories, the first ``known`` of which are given, and after each round how good the others are.

    After the first, a round learns only from what is in a group, and with a model of its own: the first one's latents
    are of what a trajectory alone can tell, and it wouldn't part with them.
    """
    labels, history = torch.cat([truth[:known], len(truth) + torch.arange(len(truth) - known)]), list[Result]()
    model: MetaHybridVAE = Unpaired(Pendulum(), INDEPENDENCE, **OPTIONS)
    guide = model.guide()
    for k, number in enumerate([steps.alone, steps.afresh, *[steps.grouped] * steps.rounds]):
        if k == 1:
            model = MetaHybridVAE(Pendulum(), latents=SPARE, **OPTIONS)
            guide = model.guide()
        _train(model, guide, pairs(heap, labels, loners=k == 0), number, seed + k, again=k > 1)
        found = groups_in(model, heap[known:], READING)
        labels = torch.cat([truth[:known], len(truth) + found])
        history.append(grouping_scores(found, truth[known:]))
    return labels, history


def _train(model: MetaHybridVAE, guide: AmortizedGuide, tasks: Tasks, steps: int, seed: int, again: bool = False,
           ) -> None:
    """As the example does: 48 tasks a step. Of pairs, which have one shot to explain instead of four, 192."""
    def grow(step: int, fit: Fit) -> None:
        model.correction = CORRECTION * (1.0 if again else ((step + 1) / steps) ** 2)

    model.prior.evidence = None
    meta_train(model, guide, tasks, steps=steps, batch_size=192 // (tasks.values.shape[1] - tasks.num_support),
               learning_rate=2e-3 if again else 3e-3, seed=seed, curriculum={0.0: 1}, segments=8, average=0.2,
               callback=grow, progress=False)


def _long(seed: int, choice: Choice) -> Result:
    system, steps = Pendulum(), _steps(choice).total
    learn, judge = data("pendulum", seed, choice)
    system.points *= PIECES
    tasks, other = (cut(system.simulate(len(some), 2, seed + start), PIECES)
                    for start, some in ((20_000, learn), (30_000, judge)))
    torch.manual_seed(seed)
    model = MetaHybridVAE(Clocked(), latents=SPARE, **OPTIONS)
    _train(model, model.guide(), tasks, steps, seed)
    return {"case": "long", "labelled": None, "seed": seed, "systems": len(tasks), "pieces": PIECES, "steps": steps,
            "grouping": [], **scores(model, tasks, with_clock(judge), _final(choice)),
            "long": scores(model, tasks, other, _final(choice))}


def grouping_scores(found: Tensor, truth: Tensor) -> Result:
    """Adjusted Rand index, how many of the pairs found are right, and how many of the right ones were found."""
    (_, wrong), (missed, right) = pair_confusion_matrix(truth.numpy(), found.numpy()).tolist()
    return {"adjusted_rand": round(float(adjusted_rand_score(truth.numpy(), found.numpy())), 4),
            "right_of_found": round(right / max(right + wrong, 1), 4),
            "found_of_right": round(right / max(right + missed, 1), 4), "groups": len(found.unique())}


@torch.no_grad()
def scores(model: MetaHybridVAE, learn: Tasks, judge: Tasks, reading: Linearised) -> Result:
    """What is recovered of unseen systems from their support; the unmixing comes from systems trained on."""
    assert judge.truth is not None
    model.prior.evidence = reading
    some = torch.from_numpy(np.random.default_rng(0).permutation(len(learn))[:500])
    seen, new = _latents(model, learn[some]), _latents(model, judge)
    truth = torch.cat([judge.truth[name] for name in (*model.system.physics, "unknown")], -1)
    unmixed = disentangle(new[:, 1:], components=len(model.system.unknown), fit=seen[:, 1:])
    everything, neural = mcc(new, truth), mcc(unmixed, truth[:, 1:])
    return {"latents": [*model.system.physics, *model.system.unknown],
            "strong_neural": round(neural.strong, 4), "strong": neural.matched.round(4).tolist(),
            "linear_r_mean": round(float(everything.linear_r.mean()), 4),
            "linear_r": everything.linear_r.round(4).tolist(), "held_out": len(judge)}


def _latents(model: MetaHybridVAE, tasks: Tasks) -> Tensor:
    """Means from the support alone, (task, latent), physics first."""
    pieces = []
    for start in range(0, len(tasks), 100):
        found = model.prior(tasks[start : start + 100].episode().support)
        pieces.append(torch.cat([found[name].mean for name in (*model.system.physics, "unknown")], -1))
    return torch.cat(pieces)


def table(results: Sequence[Result]) -> str:
    """A row for each fraction of labels, and one for long trajectories: mean ± standard deviation over seeds."""
    rows = []
    for (case, labelled), found in grouped(results, "case", "labelled").items():
        name = f"heap, {float(labelled):.0%} of the systems labelled" if case == "heap" else "one long trajectory each"
        rows.append([name, *_cells(found), *(_grouping(found, key) for key in GROUPING)])
        if case == "long":
            rows.append(["the same, judged on long ones", *_cells([one["long"] for one in found]), *["-"] * 3])
    return markdown(["what is known", *SCORES.values(), *GROUPING.values()], rows)


SCORES = {"strong_neural": "strong MCC of z_N", "linear_r_mean": "linear R"}
GROUPING = {"adjusted_rand": "adjusted Rand index", "right_of_found": "pairs that are right",
            "found_of_right": "right pairs found"}


def _cells(found: Sequence[Result]) -> list[str]:
    return [spread([one[score] for one in found], 3) for score in SCORES]


def _grouping(found: Sequence[Result], key: str) -> str:
    return spread([one["grouping"][-1][key] if one["grouping"] else None for one in found], 3)


def figure(results: Sequence[Result]) -> Figure:
    """Scores against the fraction of labels, with those of long trajectories as lines across."""
    drawn = Figure(figsize=(8.0, 3.2), layout="constrained")
    axes = drawn.subplots(1, 3)
    heaps, longs = ([one for one in results if one["case"] == case] for case in ("heap", "long"))
    for axis, (score, name) in zip(axes, SCORES.items(), strict=False):
        axis.plot([one["labelled"] for one in heaps], [one[score] for one in heaps], "o", label="heap")
        for one in longs:
            axis.axhline(one[score], color="C1", lw=1, label="one long trajectory each" if one is longs[0] else None)
        axis.set(xlabel="fraction of systems labelled", ylabel=name, ylim=(0.0, 1.03))
    axes[0].legend(fontsize=8)
    for one in (one for one in heaps if one["grouping"]):
        history = [step["adjusted_rand"] for step in one["grouping"]]
        first = one["seed"] == heaps[0]["seed"]
        axes[2].plot(range(1, 1 + len(history)), history, "o-", ms=3, color=f"C{FRACTIONS.index(one['labelled'])}",
                     label=f"{one['labelled']:.0%} labelled" if first else None)
    if axes[2].lines:
        axes[2].legend(fontsize=8)
    axes[2].set(xlabel="round of grouping", ylabel="adjusted Rand index", ylim=(0.0, 1.03))
    return drawn
