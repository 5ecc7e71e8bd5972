"""Computed evidence: damped Gauss-Newton on the user's own program."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_hybrid.beliefs.belief import Belief
from pyro_hybrid.beliefs.families import Family
from pyro_hybrid.beliefs.quadratic import Quadratic, solve_positive
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.errors import fail, require
from pyro_hybrid.evidence.least_squares import Iterate, LeastSquares
from pyro_hybrid.programs.run import Program

__all__ = ["GaussNewton"]

Stages = list[tuple[LeastSquares, int]]


@dataclass(frozen=True)
class GaussNewton:
    """Computed evidence: damped Gauss-Newton steps, accepted task by task only if they help.

    Long trajectories have many local optima. Steps on short segments come first: their optimum can be found from far
    away, and lies near that of the whole trajectories.

    References:
        An Algorithm for Least-Squares Estimation of Nonlinear Parameters (Marquardt, 1963)

    Arguments:
        num_iterations: number of steps on the trajectories as they are.
        segments: for each step before those, the number of time intervals in a segment.
        num_restarts: number of further starts, spread over the belief; the end with the lowest cost counts, task by
            task. Each start costs as much as the first.
        damping: first Levenberg-Marquardt damping, relative to the precision's diagonal.
        max_step_sd: the longest step of a latent, in units of the belief's standard deviation or of its family's
            scale, whichever is larger.

    >>> GaussNewton(3, segments=(7, 7)) == GaussNewton(num_iterations=3, segments=(7, 7))
    True
    """

    num_iterations: int = 2
    segments: tuple[int, ...] = ()
    num_restarts: int = 0
    damping: float = 1e-3
    max_step_sd: float = 1.0

    def __post_init__(self) -> None:
        require(
            isinstance(self.segments, tuple) and all(_is_count(x, 1) for x in self.segments),
            "segments as a tuple of whole numbers of 1 or more",
            repr(self.segments),
            "Name the number of time intervals for each step, such as segments=(7, 7).",
        )
        for name, least in (("num_iterations", 1), ("num_restarts", 0)):
            value = getattr(self, name)
            require(
                _is_count(value, least),
                f"{name} as a whole number of {least} or more",
                repr(value),
                "Pass an encoder alone if nothing is to be computed.",
            )
        for name in ("damping", "max_step_sd"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            require(
                is_number and math.isfinite(value) and value > 0.0,
                f"{name} as a positive finite number",
                repr(value),
                "The default is a good choice.",
            )

    @property
    def network(self) -> nn.Module | None:
        """None: nothing is learned."""
        return None

    def bind(self, families: Mapping[str, Family], context: nn.Module | None = None) -> GaussNewton:
        """Return itself: the program says what its latents are."""
        return self

    @torch.no_grad()
    def __call__(
        self,
        belief: Belief,
        shots: Shots,
        program: Program | None,
        *,
        start: Belief | None = None,
        given: Shots | None = None,
    ) -> Belief:
        """Return the increment whose sum with ``belief`` is the posterior to second order.

        The iteration begins at the mean of ``start``, or of ``belief`` if that explains the trajectories better.
        """
        if program is None:
            fail(
                "a program to linearize",
                "none",
                "Run the model, which passes itself on, and not its prior; or pass program=model.",
            )
        problem = LeastSquares(program, shots, belief)
        return problem.increment(self.minimize(problem, start))

    @torch.no_grad()
    def minimize(self, problem: LeastSquares, start: Belief | None = None) -> Iterate:
        """Return the best iterate of all starts."""
        stages = self._stages(problem)
        first = problem.mean
        if start is not None:
            proposal = start.moments()[0].detach().to(problem.mean)
            first = stages[0][0].better_start(proposal.expand_as(problem.mean))
        best = self._from(stages, first)
        for other in _spread_starts(problem, self.num_restarts):
            iterate = self._from(stages, other)
            best = best.replace_where(iterate.cost < best.cost, iterate)
        return best

    def _stages(self, problem: LeastSquares) -> Stages:
        stages = []
        for length, group in itertools.groupby(self.segments):
            pieces = problem.cut(length)
            if pieces is not problem:
                stages.append((pieces, len(list(group))))
        return [*stages, (problem, self.num_iterations)]

    def _from(self, stages: Stages, start: Tensor) -> Iterate:
        for problem, num_iterations in stages:
            iterate = self.descend(problem, start, num_iterations)
            start = iterate.task
        return iterate

    @torch.no_grad()
    def descend(
        self,
        problem: LeastSquares,
        start: Tensor,
        num_iterations: int,
        shot: Tensor | None = None,
    ) -> Iterate:
        """Take steps from one start, each accepted task by task if it lowers the cost."""
        iterate = problem.at(start, shot)
        damping = torch.full_like(iterate.cost, self.damping)
        for i in range(num_iterations):
            task, shot = self.step(problem, iterate, damping)
            if i + 1 < num_iterations:
                proposal = problem.at(task, shot)
            else:
                # The last step is only judged, by one run: its Jacobian would differ little and cost d + m more.
                cost = problem.cost_at(task, shot)
                proposal = iterate._replace(task=task, shot=shot, cost=cost)
            is_better = proposal.cost < iterate.cost
            damping = torch.where(is_better, 0.1 * damping, 30.0 * damping.clamp(min=1e-3))
            iterate = iterate.replace_where(is_better, proposal)
        return iterate

    def step(
        self, problem: LeastSquares, iterate: Iterate, damping: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Solve the damped normal equations for a step of all latents."""
        factors = _damped_factors(problem, iterate, damping)
        offset = (iterate.task - problem.mean).double()
        prior = problem.prior.precision
        pull = (prior @ offset.unsqueeze(-1)).squeeze(-1)
        total = iterate.gram[..., : problem.d, : problem.d].sum(1) + prior
        own = Quadratic(-pull, prior + _diagonal(total, damping.view(-1, 1)))
        task_factor = own + factors.marginal(problem.d).sum(1)
        right = task_factor.information.unsqueeze(-1)
        move = solve_positive(task_factor.precision, right).squeeze(-1)
        relative = (move.abs() / problem.longest_move).amax(-1, keepdim=True)
        move = move * (self.max_step_sd / relative.clamp(min=self.max_step_sd))
        task = iterate.task + move.to(iterate.task.dtype)
        if not problem.m:
            return task, iterate.shot
        given = factors.condition(move.unsqueeze(1))
        shift = solve_positive(given.precision, given.information.unsqueeze(-1)).squeeze(-1)
        return task, iterate.shot + shift.to(iterate.shot.dtype)


def _damped_factors(problem: LeastSquares, iterate: Iterate, damping: Tensor) -> Quadratic:
    """Each shot's factor of a step, (task, shot, d + m), its own latents damped."""
    d = problem.d
    information = -iterate.gradient
    precision = iterate.gram
    if problem.m:
        offset = (iterate.shot - problem.shot_mean).double()
        weighted = problem.shot_precision * offset
        information = torch.cat([information[..., :d], information[..., d:] - weighted], -1)
        block = precision[..., d:, d:] + torch.diag_embed(problem.shot_precision)
        precision = precision.clone()
        precision[..., d:, d:] = block + _diagonal(block, damping.view(-1, 1, 1))
    return Quadratic(information, precision)


def _diagonal(matrix: Tensor, factor: Tensor) -> Tensor:
    return torch.diag_embed(factor * matrix.diagonal(dim1=-2, dim2=-1))


def _spread_starts(problem: LeastSquares, number: int) -> Iterator[Tensor]:
    """Starts that fill the belief evenly, the same ones every time."""
    if number == 0:
        return
    # The first two of the sequence are the corner, which maps to infinity, and the mean, which was tried.
    uniform = torch.quasirandom.SobolEngine(problem.d).draw(number + 2)[2:].to(problem.mean)
    deviation = problem.prior.covariance.diagonal(dim1=-2, dim2=-1).sqrt().to(problem.mean)
    for normal in torch.special.ndtri(uniform):
        yield problem.mean + deviation * normal


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
