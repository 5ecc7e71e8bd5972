"""certify: the conditions of the identifiability theorem, checked on a program, its guide and its data."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import require
from pyro_hybrid.evidence.gauss_newton import Program
from pyro_hybrid.identifiability.certificate import Certificate
from pyro_hybrid.identifiability.check import Check, unchecked
from pyro_hybrid.identifiability.efficiency import efficiency, judge_efficiency
from pyro_hybrid.identifiability.fisher import fisher, judge_fisher
from pyro_hybrid.identifiability.fit import judge_fit, misfit
from pyro_hybrid.identifiability.injectivity import judge_twins, twins
from pyro_hybrid.identifiability.noise import judge_noise, noise
from pyro_hybrid.identifiability.statistics import judge_statistics, statistics
from pyro_hybrid.identifiability.task_beliefs import Reading, read
from pyro_hybrid.identifiability.variability import (
    NAMES,
    judge_variability,
    too_few,
    variability,
)
from pyro_hybrid.scores.ambiguity import ambiguity, judge_ambiguity
from pyro_hybrid.scores.separability import judge_separability, separable

__all__ = ["certify"]

READ, LINEARISED = 300, 40  # tasks looked at: in all, and by the checks that solve most
STILL, FOLLOWING = (
    1e-2,
    1e-5,
)  # shares of a spread: so little is constant, or nothing but what the others say


def certify(
    model: Program,
    guide: Program,
    tasks: Tasks,
    *,
    restarts: Sequence[Program] = (),
    seed: int = 0,
    progress: bool = True,
) -> Certificate:
    r"""Check whether the latents that a program recovers are the ones, up to a linear map, or some of many.

    The theorem: if :math:`x = F(z) + \varepsilon`, where (i) the characteristic function of :math:`\varepsilon` is
    zero on a null set at most, (ii) F is injective, (iii) the k statistics of each of n latents are linearly
    independent, and (iv) there are :math:`nk + 1` supports whose natural parameters differ in every direction,

    .. math:: L = \bigl(\lambda(S_1) - \lambda(S_0), \dots, \lambda(S_{nk}) - \lambda(S_0)\bigr)
              \;\text{ invertible},

    then a maximum of the ELBO identifies the latents: :math:`T(z) = A\, T(\tilde z) + c`. Each condition is measured,
    with an interval, and holds only with a margin; it fails only on evidence. What was trained isn't changed.

    References:
        | Variational Autoencoders and Nonlinear ICA: A Unifying Framework (Khemakhem et al., 2020)
        | https://arxiv.org/abs/1907.04809

    Arguments:
        model, guide: any Pyro program with task-level latents from exponential families, and its guide; trained.
        tasks: the data set that it was trained on. Its truth, if known, is compared with what is recovered.
        restarts: models of other trainings, from other seeds: do they recover the same?
        seed: of draws and resampling; the global random state is left alone.
        progress: show progress bars.
    """
    require(
        len(tasks) >= 2,
        "two tasks or more",
        len(tasks),
        "Identifiability is about what differs between systems.",
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return _certify(model, guide, tasks, restarts, seed, progress)


def _certify(
    model: Program,
    guide: Program,
    tasks: Tasks,
    restarts: Sequence[Program],
    seed: int,
    progress: bool,
) -> Certificate:
    began, numbers = time.perf_counter(), {}
    model, guide, *restarts = _at_rest(model, guide, *restarts)
    some = _some(tasks, READ)
    looks = 9 + len(restarts) + (tasks.true_latents is not None)
    bar = tqdm(total=looks, desc="certify", unit="check", leave=False, disable=not progress)

    def look(name: str, measure: Callable[[], Any]) -> Any:
        bar.set_postfix_str(name)
        numbers[name] = measure()
        bar.update()
        return numbers[name]

    with bar:
        reading = look("reading", lambda: read(model, some, progress=progress))
        episode = _some(_observed(tasks), LINEARISED).episode()
        conditions = [
            judge_noise(look("noise", lambda: noise(model, episode))),
            judge_fit(look("fit", lambda: misfit(model, guide, episode)), seed=seed),
        ]
        found = look("fisher", lambda: fisher(model, guide, episode, reading))
        conditions += [
            judge_fisher(found),
            judge_twins(
                look("twins", lambda: twins(model, episode, reading, found, progress=progress))
            ),
        ]
        conditions.append(
            judge_statistics(look("statistics", lambda: statistics(reading, seed=seed)))
        )
        conditions += _variability(reading, len(tasks), conditions[-1], look, seed)
        further = _further(model, restarts, some, reading, look, seed, progress)
    return Certificate(
        conditions, further, numbers, len(tasks), reading.shots, time.perf_counter() - began
    )


def _variability(
    reading: Reading, tasks: int, independent: Check, look: Callable[..., Any], seed: int
) -> list[Check]:
    if tasks <= len(reading.terms):
        return too_few(len(reading.terms), tasks)
    if independent.status == "fails":
        return [
            unchecked(name, "natural parameters mean nothing before (iii) holds", "See (iii).")
            for name in NAMES
        ]
    return judge_variability(
        look("variability", lambda: variability(reading, tasks=tasks, seed=seed))
    )


def _further(
    model: Program,
    restarts: Sequence[Program],
    tasks: Tasks,
    reading: Reading,
    look: Callable[..., Any],
    seed: int,
    progress: bool,
) -> list[Check]:
    """What the theorem leaves open; with too few tasks for any statistics, nothing."""
    latents, truth = reading.constrained(reading.coordinates()[0][0]), tasks.true_latents
    known = None if truth is None else torch.cat([value.double() for value in truth.values()], -1)
    others = {}
    for i, restart in enumerate(restarts):
        again = read(restart, tasks, progress=progress)
        others[f"against restart {i + 1}"] = again.constrained(again.coordinates()[0][0])
    if known is not None:
        others["against the truth"] = known
    widest = max([latents.shape[1], *(other.shape[1] for other in others.values())])
    mean, spread = reading.coordinates()[0][0], reading.spread()[1]
    if len(tasks) < 4 * (widest + 1) or not bool((mean.std(0) > STILL * spread).all()):
        return [
            unchecked(name, "the recovered latents are too few, or constant", "Pass more tasks.")
            for name in ("residual ambiguity", "separability", "efficiency")
        ]
    checks = []
    for name, other in others.items():
        found = (
            look(name, lambda other=other: ambiguity(latents, other, seed=seed))
            if _varies(other)
            else None
        )
        checks.append(
            unchecked(f"ambiguity {name}", "that is the same in all systems")
            if found is None
            else judge_ambiguity(found)._replace(condition=f"ambiguity {name}")
        )
    if not checks:
        checks = [
            unchecked(
                "residual ambiguity",
                "there is nothing to compare with",
                "Train again from another seed, and pass restarts=[model].",
            )
        ]
    standard = (latents - latents.mean(0)) / latents.std(0)
    if float(torch.linalg.svdvals(standard)[-1]) < FOLLOWING * len(standard) ** 0.5:
        checks.append(
            unchecked(
                "separability", "some of the recovered latents follow from the others", "See (ii)."
            )
        )
    else:
        checks.append(
            judge_separability(look("separability", lambda: separable(latents, seed=seed)))
        )
    return [
        *checks,
        judge_efficiency(
            look("efficiency", lambda: efficiency(model, tasks, reading, truth=truth, seed=seed))
        ),
    ]


def _varies(values: Tensor) -> bool:
    return bool((values.std(0) > 1e-6 * values.abs().amax(0)).all())


def _some(tasks: Tasks, most: int) -> Tasks:
    """So many tasks, evenly spaced."""
    return tasks if len(tasks) <= most else tasks[torch.linspace(0, len(tasks) - 1, most).long()]


def _observed(tasks: Tasks) -> Tasks:
    """Those of which more than the support was observed."""
    counts = tasks.scored[:, tasks.num_support :].flatten(1).any(1)
    require(
        bool(counts.any()),
        "systems with observations beside their support",
        "none",
        "Take fewer shots into the support, or record more.",
    )
    return tasks[counts]


def _at_rest(*programs: Program) -> list[Any]:
    """Copies on the CPU that don't train, what they share being shared still."""
    copies = copy.deepcopy(programs)
    return [
        program.cpu().eval() if isinstance(program, nn.Module) else program for program in copies
    ]
