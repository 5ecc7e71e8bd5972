r"""A program's Jacobian and Gauss-Newton evidence: for inference, Fisher information and efficiency alike.

Any program is seen as a map from its latents, in unconstrained coordinates :math:`u`, to the whitened errors of its
observed sites, :math:`r(u) = (x - \mu(u)) / \sigma(u)`. Latents are of two kinds: a task's (the sites of its prior) and
a shot's (all others, such as initial states). Given the task's, shots are independent, so that their latents are
eliminated shot by shot (a Schur complement) and cost one solve for each component, however many shots there are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_hybrid.beliefs.families import Family
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.segments import to_segments
from pyro_hybrid.dynamics.solve import failures_as_values, standing_still
from pyro_hybrid.errors import require

__all__ = [
    "Belief",
    "Linearised",
    "Point",
    "Problem",
    "Program",
    "Site",
    "bare",
    "information",
    "is_random",
    "observed",
    "random_sites",
]

Program = Callable[[Episode], object]
Site = Mapping[str, Any]


class Belief(NamedTuple):
    """A Gaussian posterior in unconstrained coordinates: of a task's latents, and of each shot's given the task's.

    ``mean`` (task, d) and ``precision`` (task, d, d) are the task's. ``shot_mean`` (task, shot, m) holds where the
    task's latents are at their mean; ``shot_precision`` (task, shot, m, m) and ``coupling`` (task, shot, m, d) say how
    it moves.
    """

    mean: Tensor
    precision: Tensor
    shot_mean: Tensor
    shot_precision: Tensor
    coupling: Tensor

    @property
    def covariance(self) -> Tensor:
        """Marginal covariance of the task's latents."""
        return torch.linalg.inv(self.precision)

    def shots_given(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and precision of each shot's latents, given the task's, (..., task, d)."""
        shift = torch.einsum("tsmd,...td->...tsm", self.coupling, (latents - self.mean).double())
        shift = _solve(self.shot_precision, shift.unsqueeze(-1)).squeeze(-1)
        return self.shot_mean - shift.to(self.shot_mean.dtype), self.shot_precision


class Observed(NamedTuple):
    """An observed site: what was expected, with what spread, what came, and whether it counts."""

    mean: Tensor
    scale: Tensor
    value: Tensor
    mask: Tensor


def observed(
    program: Program,
    episode: Episode,
    values: Mapping[str, Tensor],
) -> tuple[list[Observed], dict[str, Tensor]]:
    """Run a program with latents set to ``values``: its observed sites, and all other latents as (mean, scale) stacked.

    Nothing of the run is seen by handlers outside, and a diverging trajectory comes back as NaN.
    """
    with poutine.block(), failures_as_values(), pyro.validation_enabled(False):
        trace = poutine.trace(poutine.condition(program, data=dict(values))).get_trace(episode)
    seen, free = [], {}
    for name, site in random_sites(trace).items():
        if name in values:
            continue
        fn, mask = bare(site["fn"], site["mask"])
        if not site["is_observed"]:
            free[name] = torch.stack(torch.broadcast_tensors(fn.mean, fn.stddev))
        else:
            seen.append(
                Observed(
                    fn.mean, fn.stddev, site["value"], torch.as_tensor(mask, device=fn.mean.device)
                )
            )
    return seen, free


def random_sites(trace: poutine.Trace) -> dict[str, Site]:
    """A trace's latents and observations, by name."""
    return {name: site for name, site in trace.nodes.items() if is_random(site)}


def is_random(site: Site) -> bool:
    """Whether a trace's site is a latent or an observation, and no parameter, plate, factor or function of them."""
    return (
        site["type"] == "sample"
        and type(site["fn"]).__name__ not in ("_Subsample", "Unit")
        and not site["infer"].get("_deterministic")
    )


def bare(fn: Distribution, mask: Tensor | bool | None) -> tuple[Distribution, Tensor | bool]:
    """The distribution without its Independent and Masked wrappers, and the product of the masks."""
    mask = True if mask is None else mask
    while isinstance(fn, Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask & mask
        fn = fn.base_dist
    return fn, mask


class Problem:
    """A program on an episode as a least-squares problem in the task's and the shots' unconstrained latents.

    Arguments:
        program: anything that samples the sites of ``families`` and observes something.
        episode: the trajectories that are the evidence.
        families: the task's sites, in order.
        mean, precision: the Gaussian prior of the task's latents, (task, d) and (task, d, d).
    """

    def __init__(
        self,
        program: Program,
        episode: Episode,
        families: Mapping[str, Family],
        mean: Tensor,
        precision: Tensor,
    ) -> None:
        self.program, self.episode, self.families = program, episode, dict(families)
        self.mean, self.precision, self.tasks, self.d = (
            mean,
            precision,
            mean.shape[0],
            mean.shape[-1],
        )
        with standing_still():
            sites, free = observed(program, episode, self.values(mean))
        require(
            bool(sites),
            "a program that observes something",
            "no observed sample site with data",
            "Pass an episode whose query has values, and obs=episode.query.values in the program.",
        )
        shots = episode.query.shape[1]
        for name, site in free.items():
            require(
                tuple(site.shape[1:3]) == (self.tasks, shots) and site.dim() == 4,
                f"latent site {name!r} of shape (task, shot, component)",
                tuple(site.shape[1:]),
                "Name it in the SupportPrior if it belongs to the task; give it a shot axis if it doesn't.",
            )
        self.sizes = {name: site.shape[-1] for name, site in free.items()}
        both = (
            torch.cat(list(free.values()), -1) if free else mean.new_zeros(2, self.tasks, shots, 0)
        )
        self.shot_mean, self.shot_weight = both[0], both[1].square().reciprocal()
        self.m = both.shape[-1]

    def cut(self, steps: int) -> Problem:
        """The same problem on trajectories cut into shorter segments; itself where they are that short already."""
        pieces = self.episode.map_shots(lambda shots: to_segments(shots, steps))
        if pieces.query is self.episode.query:
            return self
        return Problem(self.program, pieces, self.families, self.mean, self.precision)

    def values(self, task: Tensor, shot: Tensor | None = None) -> dict[str, Tensor]:
        """Unconstrained latents to the values of their sites."""
        pieces = task.split([family.n for family in self.families.values()], -1)
        sites = {
            name: family.constrained(u)
            for (name, family), u in zip(self.families.items(), pieces, strict=True)
        }
        if shot is not None and shot.shape[-1]:
            sites |= dict(zip(self.sizes, shot.split(list(self.sizes.values()), -1), strict=True))
        return sites

    def errors(self, task: Tensor, shot: Tensor) -> Tensor:
        """Whitened errors (copy, task, shot, number) of latents (copy, task, d) and (copy, task, shot, m)."""
        copies, shots = task.shape[0], self.episode.query.shape[1]
        rows = []
        for site in observed(self.program, self.episode, self.values(task, shot))[0]:
            error = ((site.value - site.mean) / site.scale).where(site.mask, 0.0)
            error = error.expand(copies, *error.shape[-site.value.dim() :])
            by_shot = error.dim() > 2 and error.shape[2] == shots
            require(
                by_shot or not self.m,
                "observations with axes (task, shot, ...)",
                tuple(site.value.shape),
                "Latents of shots need observations by shot.",
            )
            rows.append(error.reshape(copies, self.tasks, shots if by_shot else 1, -1))
        if len({row.shape[2] for row in rows}) > 1:
            rows = [row.reshape(copies, self.tasks, 1, -1) for row in rows]
        return torch.cat(rows, -1)

    def jacobian(self, task: Tensor, shot: Tensor) -> tuple[Tensor, Tensor]:
        """Errors (task, shot, number) and their derivatives (task, shot, d + m, number): d + m + 1 solves at once."""
        h = 10.0 * math.sqrt(torch.finfo(task.dtype).eps)
        copies = 1 + self.d + self.m
        moved = h * torch.eye(copies, dtype=task.dtype, device=task.device)[:, 1:]
        errors = self.errors(task + moved[:, None, : self.d], shot + moved[:, None, None, self.d :])
        return errors[0], ((errors[1:] - errors[0]) / h).permute(1, 2, 0, 3)


@torch.no_grad()
def information(problem: Problem, task: Tensor, shot: Tensor | None = None) -> Tensor:
    """Fisher information of the task's latents at a point, in unconstrained coordinates, (task, d, d).

    What is unknown about the shots' latents is taken off.
    """
    point = _at(problem, task, problem.shot_mean if shot is None else shot)
    return _belief(problem, point).precision - problem.precision


class Point(NamedTuple):
    """Where the iteration stands, by task: latents, Gram matrix and gradient of the errors by shot, and the cost."""

    task: Tensor
    shot: Tensor
    gram: Tensor
    slope: Tensor
    cost: Tensor


class _Normal(NamedTuple):
    """The normal equations: the task's block, the shots' blocks, and what couples them."""

    task: Tensor
    shot: Tensor
    cross: Tensor


class Linearised:
    """Computed evidence: damped Gauss-Newton on the user's own program, accepted per task only where it helps.

    Long trajectories have many local optima. ``segments`` come first: an iteration each, on trajectories cut into
    segments of so many steps, whose optimum can be found from far away and lies near the whole trajectories' one.

    References:
        An Algorithm for Least-Squares Estimation of Nonlinear Parameters (Marquardt, 1963)

    Arguments:
        iterations: number of Gauss-Newton steps tried on the trajectories as they are.
        segments: segment lengths of the iterations before those.
        restarts: further starts, spread over the prior; by task the best end counts. For the final answer: each costs
            as much as the first.
        damping: first Levenberg-Marquardt damping, relative to the precision's diagonal.
        reach: the longest step of a latent in unconstrained coordinates, in standard deviations of the prior where
            these are more than one.
    """

    def __init__(
        self,
        iterations: int = 2,
        *,
        segments: Sequence[int] = (),
        restarts: int = 0,
        damping: float = 1e-3,
        reach: float = 1.0,
    ) -> None:
        require(
            iterations >= 1,
            "iterations of 1 or more",
            iterations,
            "Leave evidence=None for the encoder alone.",
        )
        self.iterations, self.segments, self.restarts = iterations, tuple(segments), restarts
        self.damping, self.reach = damping, reach

    @torch.no_grad()
    def __call__(self, problem: Problem, start: Tensor) -> Belief:
        """The posterior of a problem's latents to second order.

        It starts at ``start`` (task, d), or at the prior's mean where that explains the trajectories better.
        """
        stages = [
            (problem.cut(length), len(list(group)))
            for length, group in itertools.groupby(self.segments)
        ]
        stages = [(pieces, n) for pieces, n in stages if pieces is not problem] + [
            (problem, self.iterations)
        ]
        best = self._from(stages, _better(stages[0][0], start))
        for other in _spread(problem, self.restarts):
            point = self._from(stages, other)
            best = Point(
                *(_where(point.cost < best.cost, a, b) for a, b in zip(point, best, strict=True))
            )
        return _belief(problem, best)

    def _from(self, stages: list[tuple[Problem, int]], start: Tensor) -> Point:
        for problem, iterations in stages:
            point = self.descend(problem, start, iterations)
            start = point.task
        return point

    @torch.no_grad()
    def descend(
        self, problem: Problem, start: Tensor, iterations: int, shot: Tensor | None = None
    ) -> Point:
        """So many steps from one start, each accepted by task where it helps."""
        point = _at(problem, start, problem.shot_mean if shot is None else shot)
        damping = torch.full_like(point.cost, self.damping)
        for i in range(iterations):
            task, shot = self._step(problem, point, damping)
            # The last step is only judged, by one run: its Jacobian would differ little and cost d + m more.
            new = (
                _at(problem, task, shot)
                if i + 1 < iterations
                else point._replace(
                    task=task,
                    shot=shot,
                    cost=_cost(problem, problem.errors(task[None], shot[None])[0], task, shot),
                )
            )
            better = new.cost < point.cost
            damping = torch.where(better, 0.1 * damping, 30.0 * damping.clamp(min=1e-3))
            point = Point(*(_where(better, a, b) for a, b in zip(new, point, strict=True)))
        return point

    def _step(self, problem: Problem, point: Point, damping: Tensor) -> tuple[Tensor, Tensor]:
        normal = _normal(problem, point, damping)
        pull = point.slope[..., : problem.d].sum(1) + _times(
            problem.precision, point.task - problem.mean
        )
        move, shift = -pull, torch.zeros_like(point.shot)
        if problem.m:
            push = point.slope[..., problem.d :] + problem.shot_weight * (
                point.shot - problem.shot_mean
            )
            inner = _solve(normal.shot, torch.cat([push.unsqueeze(-1), normal.cross], -1))
            move = move + _times(normal.cross.mT, inner[..., 0]).sum(1)
            normal = normal._replace(task=normal.task - (normal.cross.mT @ inner[..., 1:]).sum(1))
        move = _solve(normal.task, move.unsqueeze(-1)).squeeze(-1)
        far = move.abs() * problem.precision.diagonal(dim1=-2, dim2=-1).sqrt().clamp(max=1.0)
        move = move * (self.reach / far.amax(-1, keepdim=True).clamp(min=self.reach))
        if problem.m:
            shift = -inner[..., 0] - _times(inner[..., 1:], move.unsqueeze(1))
        return point.task + move.to(point.task.dtype), point.shot + shift.to(point.shot.dtype)


def _at(problem: Problem, task: Tensor, shot: Tensor) -> Point:
    error, slopes = problem.jacobian(task, shot)
    cost = _cost(problem, error, task, shot)
    finite = torch.isfinite(slopes).flatten(1).all(1) & torch.isfinite(cost)
    slopes, error = (_where(finite, x, torch.zeros_like(x)) for x in (slopes, error))
    slopes = (
        slopes.double()
    )  # sensitivities of a chaotic system differ by more than float32 has digits
    return Point(
        task,
        shot,
        slopes @ slopes.mT,
        _times(slopes, error.double()),
        cost.where(finite, torch.inf),
    )


def _spread(problem: Problem, number: int) -> Iterator[Tensor]:
    """Starts that fill the prior evenly, the same ones every time."""
    if number == 0:
        return
    even = (
        torch.quasirandom.SobolEngine(problem.d).draw(number + 2)[2:].to(problem.mean)
    )  # not 0, nor the mean
    spread = torch.linalg.inv(problem.precision).diagonal(dim1=-2, dim2=-1).sqrt()
    for point in torch.special.ndtri(even):
        yield problem.mean + spread * point


def _better(problem: Problem, start: Tensor) -> Tensor:
    """By task: the start, or the prior's mean where that explains the trajectories better."""
    if start is problem.mean:
        return start
    starts = torch.stack([problem.mean, start])
    errors = problem.errors(starts, problem.shot_mean.expand(2, *problem.shot_mean.shape))
    costs = [
        _cost(problem, error, task, problem.shot_mean)
        for error, task in zip(errors, starts, strict=True)
    ]
    return _where(costs[1] <= costs[0], start, problem.mean)


def _cost(problem: Problem, error: Tensor, task: Tensor, shot: Tensor) -> Tensor:
    away = task - problem.mean
    cost = error.square().sum((1, 2)) + (away * _times(problem.precision, away)).sum(-1).to(
        away.dtype
    )
    return (
        cost + ((shot - problem.shot_mean).square() * problem.shot_weight).sum((1, 2))
    ).nan_to_num(torch.inf)


def _where(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (b.dim() - 1)), a, b)


def _normal(problem: Problem, point: Point, damping: Tensor | None = None) -> _Normal:
    d = problem.d
    task = point.gram[..., :d, :d].sum(1) + problem.precision
    shot = (
        point.gram[..., d:, d:] + torch.diag_embed(problem.shot_weight)
        if problem.m
        else point.gram[..., d:, d:]
    )
    if damping is not None:
        task = task + torch.diag_embed(damping.unsqueeze(-1) * task.diagonal(dim1=-2, dim2=-1))
        shot = shot + torch.diag_embed(damping.view(-1, 1, 1) * shot.diagonal(dim1=-2, dim2=-1))
    return _Normal(task, shot, point.gram[..., d:, :d])


def _belief(problem: Problem, point: Point) -> Belief:
    normal = _normal(problem, point)
    precision = normal.task
    if problem.m:
        precision = precision - (normal.cross.mT @ _solve(normal.shot, normal.cross)).sum(1)
    return Belief(
        point.task, 0.5 * (precision + precision.mT), point.shot, normal.shot, normal.cross
    )


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Where a matrix is singular, no step is taken."""
    return torch.linalg.solve_ex(matrix, right).result.nan_to_num(0.0, 0.0, 0.0)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.to(matrix.dtype).unsqueeze(-1)).squeeze(-1)
