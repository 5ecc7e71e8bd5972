"""Check condition (ii), globally: search for latents far apart that have the same trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.dynamics.modes import nan_on_failure
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.evidence.least_squares import LeastSquares
from pyro_hybrid.identifiability.fisher import FisherInformation, least_squares_at
from pyro_hybrid.identifiability.task_beliefs import TaskBeliefs, copy_in_double
from pyro_hybrid.programs.module import local_parameters
from pyro_hybrid.programs.run import Program
from pyro_hybrid.programs.sites import random_sites, unwrap
from pyro_hybrid.scores.check import Check, Threshold, proportion_interval

__all__ = ["EquivalentLatents", "equivalent_latents", "judge_equivalent_latents"]

UNIQUE = Threshold(holds=0.9, fails=0.9)  # share of systems whose latents are the only ones
APART = 1.0  # population sds from the latents: nearer ones are no others
WITHIN = 3.0  # population sds from the center: latents further out are no system's
ALIKE = 1.0  # standard deviations of the noise, over all observations together
STARTS = 8
ROUNDS = 4
ITERATIONS = 4
AT_ONCE = 6  # starts that descend together
HELD = 8  # a shot's latents stay fixed if there are more of them: each costs a solve


class EquivalentLatents(NamedTuple):
    """Nearest thing to a second solution, by task.

    Attributes:
        names: of the latents.
        first: latents of the task, ``(task, latent)``.
        second: other latents with the most similar trajectories; NaN where none far enough was found.
        apart: difference of the two in unconstrained coordinates, in standard deviations over systems.
        distance: between their trajectories, in standard deviations of the noise; infinite where none was found.
        num_searches: number of starts for each task.
    """

    names: list[str]
    first: Tensor
    second: Tensor
    apart: Tensor
    distance: Tensor
    num_searches: int


@torch.no_grad()
def equivalent_latents(
    program: Program,
    episode: Episode,
    beliefs: TaskBeliefs,
    fisher: FisherInformation,
    *,
    progress: bool = True,
) -> EquivalentLatents:
    """Descend from many starts towards the trajectories of each task's latents, and see if other latents are reached.

    Starts are mirror images of the latents (about zero, and about the population's center), both ends of their weakest
    direction, and points that fill the region of the population. Starts are judged like the ends of descents: where a
    latent is ignored, or nearly, a start has the same trajectories. Latents nearer than one population standard
    deviation, or more than three from the population's center in some component, do not count.

    Arguments:
        program: the model.
        episode: trajectories of some tasks, with their support; their initial states and times are used.
        beliefs: families and population of the latents.
        fisher: Fisher information at the latents, which are the first draw of each task.
        progress: show a progress bar.
    """
    latents = fisher.points[0]
    center = beliefs.population_mean
    sd = beliefs.population_sd
    program = copy_in_double(program)

    def pose(rows: Tensor) -> LeastSquares:
        chosen = latents[rows]
        problem = least_squares_at(program, episode.select_tasks(rows), beliefs, chosen)
        return _towards_trajectories_of(chosen, problem)

    best = torch.full_like(latents, torch.nan)
    distance = torch.full_like(latents[:, 0], torch.inf)
    starts = torch.stack(_starts(latents, center, sd, fisher))
    bar = tqdm(
        total=len(starts),
        desc="searching for equivalent latents",
        unit="start",
        leave=False,
        disable=not progress,
    )
    with bar:
        for some in starts.split(AT_ONCE):
            for candidate, its_distance in _candidates(pose, latents, some, sd):
                is_far = ((candidate - latents) / sd).norm(dim=-1) > APART
                is_inside = (((candidate - center) / sd).abs() <= WITHIN).all(-1)
                is_better = is_far & is_inside & (its_distance < distance)
                best = torch.where(is_better.unsqueeze(-1), candidate, best)
                distance = torch.where(is_better, its_distance, distance)
            bar.update(len(some))
    return EquivalentLatents(
        names=beliefs.names,
        first=beliefs.constrained(latents),
        second=beliefs.constrained(best),
        apart=(best - latents) / sd,
        distance=distance,
        num_searches=len(starts),
    )


def _towards_trajectories_of(latents: Tensor, problem: LeastSquares) -> LeastSquares:
    """Return the same problem with the noise-free trajectories of ``latents`` in place of the observations."""
    values = problem.values(latents, problem.shot_mean)
    target = poutine.condition(
        problem.program, data=_noise_free(problem.program, problem.episode, values)
    )
    if problem.m > HELD:
        target = _with_fixed(target, {name: values[name] for name in problem.shot_sizes})
    return LeastSquares(target, problem.shots, problem.belief, problem.unit)


def _noise_free(program: Program, episode: Episode, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the means of the observed sites, by name, with latents at ``values``."""
    with (
        local_parameters(),
        nan_on_failure(),
        poutine.block(),
        pyro.validation_enabled(False),
    ):
        trace = poutine.trace(poutine.condition(program, data=values)).get_trace(episode)
    return {
        name: unwrap(site["fn"], None)[0].mean
        for name, site in random_sites(trace).items()
        if site["is_observed"] and name not in values
    }


def _with_fixed(program: Program, values: dict[str, Tensor]) -> Program:
    """Return the program with some latents fixed, so that no handler outside sees them."""
    fixed: Callable[[Episode], object] = poutine.condition(program, data=values)
    return poutine.block(fixed, hide=list(values))


def _candidates(
    pose: Callable[[Tensor], LeastSquares], latents: Tensor, starts: Tensor, sd: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield starts and the ends of descents from them, each with the distance between its trajectories and the task's.

    All starts (start, task, latent) descend at once, as if they were as many tasks.
    """
    num_starts, num_tasks, _ = starts.shape
    rows = torch.arange(num_tasks).repeat(num_starts)
    ends = starts.flatten(0, 1)
    yield from zip(starts, _distances(pose(rows), ends).view(num_starts, -1), strict=True)
    ends, distances = _descend(pose, rows, ends, latents[rows], sd)
    yield from zip(ends.view_as(starts), distances.view(num_starts, -1), strict=True)


def _distances(problem: LeastSquares, latents: Tensor) -> Tensor:
    """Return the distances between trajectories of ``latents`` and the targets, in noise standard deviations."""
    return problem.deviances(latents.unsqueeze(0), problem.shot_mean.unsqueeze(0))[0].sqrt()


def _descend(
    pose: Callable[[Tensor], LeastSquares], rows: Tensor, start: Tensor, home: Tensor, sd: Tensor
) -> tuple[Tensor, Tensor]:
    """Descend to minima, or for a few rounds, and return their distances too.

    What has arrived, stalled or come back to the task's own latents takes no part in further rounds.
    """
    ends = start.clone()
    costs = torch.full_like(start[:, 0], torch.inf)
    active, shot = torch.arange(len(rows)), None
    for _ in range(ROUNDS):
        end = GaussNewton().descend(pose(rows[active]), ends[active], ITERATIONS, shot)
        goes_on = (end.cost < 0.9 * costs[active]) & (end.cost > 1e-3)
        goes_on &= ((end.task - home[active]) / sd).norm(dim=-1) > APART
        ends[active], costs[active] = end.task, end.cost
        active, shot = active[goes_on], end.shot[goes_on]
        if not len(active):
            break
    return ends, costs.sqrt()


def _starts(latents: Tensor, center: Tensor, sd: Tensor, fisher: FisherInformation) -> list[Tensor]:
    starts = []
    for i in range(latents.shape[-1]):
        for mirror in (0.0, float(center[i])):
            image = latents.clone()
            image[:, i] = 2.0 * mirror - latents[:, i]
            starts.append(image)
    weakest = torch.linalg.eigh(fisher.information[0]).eigenvectors[..., 0] * sd
    starts += [latents + 2.0 * weakest, latents - 2.0 * weakest]
    sobol = torch.quasirandom.SobolEngine(len(center))
    for place in sobol.draw(STARTS + 2, dtype=latents.dtype)[2:]:
        starts.append((center + 2.5 * (2.0 * place - 1.0) * sd).expand_as(latents))
    return starts


def judge_equivalent_latents(equivalents: EquivalentLatents) -> Check:
    """Judge the share of systems without equivalent latents: a pair is evidence against, none in many searches for.

    Arguments:
        equivalents: result of :func:`equivalent_latents`.
    """
    num_tasks = len(equivalents.distance)
    count = int((equivalents.distance < ALIKE).sum())
    nearest = int(equivalents.distance.argmin())
    if count:
        verb = "has" if count == 1 else "have"
        why = (
            f"{count} of {num_tasks} systems {verb} other latents with the same trajectories: "
            f"{_describe_pair(equivalents, nearest)}."
        )
    elif torch.isfinite(equivalents.distance[nearest]):
        why = (
            f"Of {equivalents.num_searches} searches for each of {num_tasks} systems, none found other latents with "
            f"the same trajectories. The closest pair: {_describe_pair(equivalents, nearest)}."
        )
    else:
        why = (
            f"All of {equivalents.num_searches} searches for other latents with the same trajectories, for each of "
            f"{num_tasks} systems, led back to the system's own."
        )
    return Check.from_interval(
        "injectivity, global (ii)",
        1.0 - count / num_tasks,
        proportion_interval(num_tasks - count, num_tasks),
        UNIQUE,
        why,
        "Restrict the latents to a region where the program is one-to-one: a positive family, a fixed sign or order.",
    )


def _describe_pair(equivalents: EquivalentLatents, task: int) -> str:
    apart = equivalents.apart[task].abs()
    order = apart.argsort(descending=True).tolist()
    moved = [i for i in order if apart[i] > 0.1 * apart.max()]
    values = [
        f"`{equivalents.names[i]}` {equivalents.first[task, i]:.3g} and {equivalents.second[task, i]:.3g}"
        for i in moved[:3]
    ]
    return (
        f"{', '.join(values)}, whose trajectories differ by {equivalents.distance[task]:.2g} standard deviations of "
        "the noise"
    )
