r"""A program on trajectories as a least-squares problem.

Any program maps its latents, in unconstrained coordinates :math:`u`, to the whitened residuals of its observed sites,
:math:`r(u) = (x - \mu(u)) / \sigma`; of counts and other noises, those of Fisher scoring. Latents are of two kinds: a task's (the sites of its prior) and a shot's (all
others, such as initial states). Given the task's, shots are independent, so that their latents cost one run of the
program for each component, however many shots there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hybrid.beliefs.belief import Belief, Gaussian
from pyro_hybrid.beliefs.quadratic import Quadratic
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.segments import to_segments
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.dynamics.modes import skip_integration
from pyro_hybrid.errors import require
from pyro_hybrid.programs.run import Observation, Program, run_at
from pyro_hybrid.programs.whiten import Whitened

__all__ = ["Iterate", "LeastSquares", "fisher_information"]


class Iterate(NamedTuple):
    """A point of an iteration, by task, with what is known of the problem there.

    Attributes:
        task: coordinates of the task's latents, ``(task, d)``.
        shot: latents of shots, ``(task, shot, m)``.
        gram: Gram matrix of the Jacobian over both kinds, ``(task, shot, d + m, d + m)``.
        gradient: gradient of half the deviance, ``(task, shot, d + m)``.
        cost: deviance (squared residuals, if the noise is normal) and squared distances to the priors' means,
            ``(task,)``.
    """

    task: Tensor
    shot: Tensor
    gram: Tensor
    gradient: Tensor
    cost: Tensor

    def replace_where(self, rows: Tensor, other: Iterate) -> Iterate:
        """Take the tasks in ``rows`` from another iterate."""
        parts = zip(other, self, strict=True)
        return Iterate(*(select_rows(rows, theirs, mine) for theirs, mine in parts))


class LeastSquares:
    """The least-squares problem of a program on some shots, around a Gaussian belief.

    Arguments:
        program: any program that samples the sites of ``belief`` and observes something.
        shots: the trajectories.
        belief: the belief about the task's latents before.
        unit: the size of a change of each latent that matters, ``(d,)``; by default the family's scale, or the
            belief's standard deviation if that is more.
    """

    def __init__(
        self, program: Program, shots: Shots, belief: Belief, unit: Tensor | None = None
    ) -> None:
        num_tasks, num_shots = shots.shape
        self.program = program
        self.shots = shots
        self.belief = belief.gaussian().without_shots().expand(num_tasks)
        self.episode = Episode(None, shots)
        self.num_tasks = num_tasks
        self.d = belief.size
        self.prior = self.belief.own
        self.mean = self.prior.mean.to(self.belief.dtype)
        deviations = self.prior.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        self.unit = unit
        self.task_unit = (
            torch.maximum(_scales(self.belief), deviations) if unit is None else unit.double()
        )
        self.task_unit = self.task_unit.expand(num_tasks, self.d)
        self.longest_move = torch.maximum(self.task_unit, deviations)
        with skip_integration():
            run = run_at(program, self.episode, self.belief.constrained(self.mean))
        require(
            bool(run.observations),
            "a program that observes something",
            "no observed sample site with data",
            "Pass shots with values, and obs=episode.query.values in the program.",
        )
        for name, moments in run.latents.items():
            shape = tuple(moments.mean.shape)
            require(
                len(shape) == 3 and shape[:2] == (num_tasks, num_shots),
                f"latent site {name!r} of shape (task, shot, component)",
                shape,
                "Name it in the SupportPrior if it belongs to the task; give it a shot axis if it doesn't.",
            )
        self.shot_sizes = {name: x.mean.shape[-1] for name, x in run.latents.items()}
        self.m = sum(self.shot_sizes.values())
        empty = self.mean.new_zeros(num_tasks, num_shots, 0)
        means = [x.mean for x in run.latents.values()]
        scales = [x.scale for x in run.latents.values()]
        self.shot_mean = torch.cat([empty, *means], -1)
        self.shot_precision = torch.cat([empty, *scales], -1).double() ** -2
        ones = [(torch.ones_like(site.whitened.error), site) for site in run.observations]
        self.num_observed = self._rows(ones, 1)[0].double().sum((1, 2))

    def cut(self, num_intervals: int) -> LeastSquares:
        """Pose the same problem on shorter segments; shots that are short enough give the problem itself."""
        segments = to_segments(self.shots, num_intervals)
        if segments is self.shots:
            return self
        return LeastSquares(self.program, segments, self.belief, self.unit)

    def values(self, task: Tensor, shot: Tensor) -> dict[str, Tensor]:
        """Map coordinates of the task's latents, and latents of shots, to the values of their sites."""
        values = self.belief.constrained(task)
        parts = shot.split(list(self.shot_sizes.values()), -1) if self.m else ()
        return values | dict(zip(self.shot_sizes, parts, strict=True))

    def observe(self, task: Tensor, shot: Tensor) -> list[Observation]:
        """Run the program at latents (copy, task, d) and (copy, task, shot, m), and return what it observes."""
        return run_at(self.program, self.episode, self.values(task, shot)).observations

    def residuals(self, task: Tensor, shot: Tensor) -> Tensor:
        """Whitened residuals (copy, task, shot, number) at latents (copy, task, d) and (copy, task, shot, m)."""
        return self._rows([(s.whitened.residual, s) for s in self.observe(task, shot)], len(task))

    def errors(self, task: Tensor, shot: Tensor, roots: Tensor) -> Tensor:
        """Errors of the observations in the form of residuals, the information being held fixed.

        Arguments:
            task, shot: latents, as for :meth:`residuals`.
            roots: result of :meth:`roots`.
        """
        rows = self._rows([(s.whitened.error, s) for s in self.observe(task, shot)], len(task))
        return rows * roots

    def roots(self, iterate: Iterate) -> Tensor:
        """Square roots of the information about each observation, (task, shot, number)."""
        sites = self.observe(iterate.task[None], iterate.shot[None])
        return self._rows([(s.whitened.root, s) for s in sites], 1)[0]

    def deviances(self, task: Tensor, shot: Tensor) -> Tensor:
        """Sum of the deviances, (copy, task): for normal noise the squared residuals."""
        rows = [(s.whitened.deviance, s) for s in self.observe(task, shot)]
        return self._rows(rows, len(task)).double().sum((2, 3))

    def _rows(self, parts: list[tuple[Tensor, Observation]], num_copies: int) -> Tensor:
        """Arrange numbers of all sites as (copy, task, shot, number), with zeros for what isn't counted."""
        num_shots = self.shots.shape[1]
        rows = []
        for numbers, site in parts:
            counted = numbers.where(site.mask, 0.0)
            counted = counted.expand(num_copies, *counted.shape[-site.value.dim() :])
            is_by_shot = counted.dim() > 2 and counted.shape[2] == num_shots
            require(
                is_by_shot or not self.m,
                "observations with axes (task, shot, ...)",
                tuple(site.value.shape),
                "Latents of shots need observations by shot.",
            )
            rows.append(
                counted.reshape(num_copies, self.num_tasks, num_shots if is_by_shot else 1, -1)
            )
        if len({row.shape[2] for row in rows}) > 1:
            rows = [row.reshape(num_copies, self.num_tasks, 1, -1) for row in rows]
        return torch.cat(rows, -1)

    def jacobian(self, task: Tensor, shot: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals (task, shot, number) and their derivatives (task, shot, d + m, number), by forward differences.

        All d + m + 1 runs of the program happen at once. Steps are in units of the latents, task by task.
        """
        residuals, slopes, _ = self._linearize(task, shot)
        return residuals, slopes

    def _linearize(self, task: Tensor, shot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residuals, their derivatives, and the deviance by task."""
        tasks = task + self._moves(_task_step(task.dtype) * self.task_unit, self.d, 0)
        shots = shot + self._moves(
            _shot_step(task.dtype) * self.shot_precision.rsqrt(), self.m, self.d
        )
        noise = [(site.whitened, site) for site in self.observe(tasks, shots)]

        def rows(part: Callable[[Whitened], Tensor]) -> Tensor:
            return self._rows([(part(one), site) for one, site in noise], len(tasks))

        errors = rows(lambda one: one.error)
        # Divide by the step that was taken, which rounding makes another than the one that was asked for.
        task_step = (tasks[1 : self.d + 1] - task).diagonal(dim1=0, dim2=2).unsqueeze(1)
        shot_step = (shots[self.d + 1 :] - shot).diagonal(dim1=0, dim2=3)[:, : errors.shape[2]]
        step = torch.cat([task_step.expand(-1, errors.shape[2], -1), shot_step], -1)
        slopes = (errors[1:] - errors[0]) / step.permute(2, 0, 1).unsqueeze(-1)
        slopes = slopes * rows(lambda one: one.root)[0]
        deviance = rows(lambda one: one.deviance)[0].double().sum((1, 2))
        return rows(lambda one: one.residual)[0], slopes.permute(1, 2, 0, 3), deviance

    def _moves(self, steps: Tensor, number: int, first: int) -> Tensor:
        """One copy that stays and d + m copies that move one coordinate each, of which ``number`` are these."""
        moves = torch.diag_embed(steps.to(self.mean)).movedim(-2, 0)
        before = moves.new_zeros(1 + first, *moves.shape[1:])
        after = moves.new_zeros(self.d + self.m - first - number, *moves.shape[1:])
        return torch.cat([before, moves, after])

    def at(self, task: Tensor, shot: Tensor | None = None) -> Iterate:
        """Linearize at a point; a task that isn't finite there has no slope and an infinite cost."""
        shot = self.shot_mean if shot is None else shot
        residuals, slopes, deviance = self._linearize(task, shot)
        cost = self.cost(deviance, task, shot)
        is_finite = torch.isfinite(slopes).flatten(1).all(1) & torch.isfinite(cost)
        # Sensitivities of a chaotic system differ by more than float32 has digits.
        slopes = select_rows(is_finite, slopes, torch.zeros_like(slopes)).double()
        residuals = select_rows(is_finite, residuals, torch.zeros_like(residuals)).double()
        gradient = (slopes @ residuals.unsqueeze(-1)).squeeze(-1)
        return Iterate(task, shot, slopes @ slopes.mT, gradient, cost.where(is_finite, torch.inf))

    def cost(self, deviance: Tensor, task: Tensor, shot: Tensor) -> Tensor:
        """Add the squared distances to the priors' means to the deviance, by task."""
        offset = (task - self.mean).double()
        distance = (offset * (self.prior.precision @ offset.unsqueeze(-1)).squeeze(-1)).sum(-1)
        shot_offset = (shot - self.shot_mean).double()
        shot_distance = (shot_offset.square() * self.shot_precision).sum((1, 2))
        total = deviance + distance + shot_distance
        return total.nan_to_num(torch.inf)

    def cost_at(self, task: Tensor, shot: Tensor | None = None) -> Tensor:
        """Run the program once, and return the cost by task."""
        shot = self.shot_mean if shot is None else shot
        return self.cost(self.deviances(task[None], shot[None])[0], task, shot)

    def better_start(self, start: Tensor) -> Tensor:
        """Choose between a start and the belief's mean, by task: what explains the trajectories better."""
        both = torch.stack([self.mean, start])
        shots = self.shot_mean.expand(2, *self.shot_mean.shape)
        deviances = self.deviances(both, shots)
        at_mean = self.cost(deviances[0], self.mean, self.shot_mean)
        at_start = self.cost(deviances[1], start, self.shot_mean)
        return select_rows(at_start < at_mean, start, self.mean)

    def shot_factors(self, iterate: Iterate) -> Quadratic:
        """Factors of each shot over the task's and its own latents, (task, shot, d + m), linearized at an iterate."""
        precision = iterate.gram.clone()
        diagonal = precision.diagonal(dim1=-2, dim2=-1)
        if self.m:
            diagonal[..., self.d :] += self.shot_precision
        point = torch.cat(
            [iterate.task.unsqueeze(1).expand(*iterate.gram.shape[:2], -1), iterate.shot], -1
        )
        return Quadratic.centered(point, precision)

    def increment(self, iterate: Iterate) -> Gaussian:
        """Return what the shots add to the belief if the posterior's mean is at the iterate."""
        offset = (iterate.task - self.mean).double()
        pull = (self.prior.precision @ offset.unsqueeze(-1)).squeeze(-1)
        own = Quadratic(pull, torch.zeros_like(self.prior.precision))
        factors = self.shot_factors(iterate)
        families, dtype = self.belief.families, self.belief.dtype
        if not self.m:
            return Gaussian(families, own + factors.sum(1), dtype)
        return Gaussian(families, own, dtype, factors, self.shot_sizes)


@torch.no_grad()
def fisher_information(problem: LeastSquares, task: Tensor, shot: Tensor | None = None) -> Tensor:
    """Fisher information of the task's latents at a point, in unconstrained coordinates, (task, d, d).

    What is unknown about the latents of shots is taken off.
    """
    factors = problem.shot_factors(problem.at(task, shot))
    return factors.marginal(problem.d).sum(1).precision


def select_rows(rows: Tensor, chosen: Tensor, otherwise: Tensor) -> Tensor:
    """Take the tasks in ``rows`` from one tensor, and all others from another."""
    return torch.where(rows.view(-1, *[1] * (otherwise.dim() - 1)), chosen, otherwise)


def _scales(belief: Gaussian) -> Tensor:
    """Scale of each latent's family, (d,)."""
    zero = belief.own.information
    return torch.cat([zero.new_full((f.n,), f.scale) for f in belief.families.values()])


def _task_step(dtype: torch.dtype) -> float:
    """A step of the task's latents, whose units are large compared with what is known of them in the end."""
    return 10.0 * math.sqrt(torch.finfo(dtype).eps)


def _shot_step(dtype: torch.dtype) -> float:
    """A step of the shots' latents, which are known nearly as well before as after: a larger part of the unit."""
    return 5.0 * math.sqrt(math.sqrt(torch.finfo(dtype).eps))
