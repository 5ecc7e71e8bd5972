"""Condition (ii), globally: a hunt for two sets of latents, far apart, with the same trajectories."""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.stats import beta
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.evidence.gauss_newton import Linearised, Point, Problem, Program
from pyro_hybrid.identifiability.check import Check, Interval, Threshold, judged
from pyro_hybrid.identifiability.fisher import Fisher, posed
from pyro_hybrid.identifiability.task_beliefs import Reading

__all__ = ["Twins", "judge_twins", "twins"]

ALONE = Threshold(holds=0.9, fails=0.9)  # share of systems without a twin
APART, WITHIN = (
    1.0,
    3.0,
)  # spreads: twins are further from each other, and nearer to the other systems
ALIKE = 1.0  # standard deviations of the noise, over all observations together
STARTS, ROUNDS, ITERATIONS = 8, 4, 4
HELD = 8  # so many latents of a shot, and they stay where they are: each costs a solve


class Twins(NamedTuple):
    """The nearest thing to a second solution that was found, by task.

    Attributes:
        names: the latents.
        first: what the hunt was for a twin of, ``(task, latent)``.
        second: what was found; NaN where nothing far enough was.
        apart: how far from each other, in spreads of the systems, in unconstrained coordinates.
        distance: between their trajectories, in standard deviations of the noise; infinite where nothing was found.
        hunts: descents that were tried for each task.
    """

    names: list[str]
    first: Tensor
    second: Tensor
    apart: Tensor
    distance: Tensor
    hunts: int


class _Against(Problem):
    """A problem whose observations are the program's own noise-free trajectories at a point."""

    def __init__(self, problem: Problem, task: Tensor) -> None:
        self.__dict__.update(problem.__dict__)
        self._there, self._shot = (
            problem.errors(task.unsqueeze(0), problem.shot_mean.unsqueeze(0)),
            problem.shot_mean,
        )
        self._held = problem.m > HELD
        if self._held:
            self.m, self.shot_mean, self.shot_weight = (
                0,
                self.shot_mean[..., :0],
                self.shot_weight[..., :0],
            )

    def errors(self, task: Tensor, shot: Tensor) -> Tensor:
        return super().errors(task, self._shot.unsqueeze(0) if self._held else shot) - self._there

    def distance(self, task: Tensor) -> Tensor:
        """Between the trajectories there and at the point, in standard deviations of the noise."""
        return (
            self.errors(task.unsqueeze(0), self.shot_mean.unsqueeze(0))[0]
            .square()
            .sum((1, 2))
            .sqrt()
        )


@torch.no_grad()
def twins(
    program: Program, episode: Episode, reading: Reading, found: Fisher, *, progress: bool = True
) -> Twins:
    """Descend from many starts towards the trajectories of a point, and see whether another point is reached.

    Starts are mirror images of the point in every latent (about zero, and about the systems' centre), both ends of its
    weakest direction, and points that fill the region of the systems. They are judged as well as the ends: where a
    latent is ignored, or nearly, a start has the same trajectories. What is within a spread of the point, or more than
    three from the systems' centre in some latent, doesn't count.

    Arguments:
        program: the model.
        episode: trajectories of some tasks, with their support; their initial states and times are used.
        reading: families and spread of the latents.
        found: Fisher information at the points, the first draw of each task.
    """
    point, (centre, spread) = found.points[0], reading.spread()
    problem = _Against(posed(program, episode, reading, point), point)
    starts = _starts(point, centre, spread, found)
    best, distance = torch.full_like(point, torch.nan), torch.full_like(point[:, 0], torch.inf)
    for start in tqdm(
        starts, desc="hunting for twins", unit="start", leave=False, disable=not progress
    ):
        end = _descend(problem, start)
        for place, away in ((start, problem.distance(start)), (end.task, end.cost.sqrt())):
            far = ((place - point) / spread).norm(dim=-1) > APART
            near = (((place - centre) / spread).abs() <= WITHIN).all(-1)
            better = far & near & (away < distance)
            best = torch.where(better.unsqueeze(-1), place, best)
            distance = torch.where(better, away, distance)
    return Twins(
        reading.names,
        reading.constrained(point),
        reading.constrained(best),
        (best - point) / spread,
        distance,
        len(starts),
    )


def _descend(problem: Problem, start: Tensor) -> Point:
    """To a minimum, or for so many rounds: those that return to the point itself are quick."""
    hunter = Linearised()
    end = hunter.descend(problem, start, ITERATIONS)
    for _ in range(ROUNDS - 1):
        before, end = end, hunter.descend(problem, end.task, ITERATIONS, end.shot)
        if bool((end.cost > 0.9 * before.cost).logical_or(end.cost < 1e-3).all()):
            break
    return end


def _starts(point: Tensor, centre: Tensor, spread: Tensor, found: Fisher) -> list[Tensor]:
    mirrored = []
    for i in range(point.shape[-1]):
        for about in (0.0, float(centre[i])):
            image = point.clone()
            image[:, i] = 2.0 * about - point[:, i]
            mirrored.append(image)
    weakest = torch.linalg.eigh(found.information[0]).eigenvectors[..., 0] * spread
    even = torch.quasirandom.SobolEngine(len(centre)).draw(STARTS + 2, dtype=point.dtype)[2:]
    filling = [(centre + 2.5 * (2.0 * place - 1.0) * spread).expand_as(point) for place in even]
    return [*mirrored, point + 2.0 * weakest, point - 2.0 * weakest, *filling]


def judge_twins(found: Twins) -> Check:
    """The share of systems without a twin: a pair is evidence against, none in so many hunts evidence for."""
    alike = found.distance < ALIKE
    count, tasks = int(alike.sum()), len(alike)
    nearest = int(found.distance.argmin())
    if count:
        why = f"{count} of {tasks} systems ha{'s' if count == 1 else 've'} a twin, such as {_pair(found, nearest)}"
    elif torch.isfinite(found.distance[nearest]):
        why = f"in {found.hunts} hunts for each of {tasks} systems the closest pair was {_pair(found, nearest)}"
    else:
        why = f"{found.hunts} hunts for a twin of each of {tasks} systems all led back to it"
    return judged(
        "injectivity, global (ii)",
        1.0 - count / tasks,
        _share(tasks - count, tasks),
        ALONE,
        why,
        "Restrict the latents to where the program is one-to-one: a positive family, a fixed sign or order.",
    )


def _share(count: int, of: int) -> Interval:
    """Clopper and Pearson's interval."""
    low = float(beta.ppf(0.025, count, of - count + 1)) if count else 0.0
    high = float(beta.ppf(0.975, count + 1, of - count)) if count < of else 1.0
    return low, high


def _pair(found: Twins, i: int) -> str:
    apart = found.apart[i].abs()
    moved = [j for j in apart.argsort(descending=True).tolist() if apart[j] > 0.1 * apart.max()]
    values = ", ".join(
        f"{found.names[j]} {found.first[i, j]:.3g} and {found.second[i, j]:.3g}" for j in moved[:3]
    )
    return f"({values}), whose trajectories differ by {found.distance[i]:.2g} standard deviations of the noise"
