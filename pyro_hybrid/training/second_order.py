"""Second-order training: a network's weights as latents that all systems share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_hybrid.beliefs.belief import Belief
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.evidence.least_squares import Iterate, LeastSquares
from pyro_hybrid.evidence.settings import encoder_of
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.inference.prior import SupportPrior
from pyro_hybrid.programs.module import HybridModel, local_parameters
from pyro_hybrid.training.readings import FollowedPopulation, Readings
from pyro_hybrid.training.refinement import Refinement, check_settings, network_of
from pyro_hybrid.training.unexplained import UnexplainedNoise, set_noise
from pyro_hybrid.training.weight_evidence import (
    WeightEvidence,
    misfit,
    move_latents,
    usable_tasks,
    weight_evidence,
)
from pyro_hybrid.training.weight_slopes import trained_weights

__all__ = ["BatchRecord", "Refiner", "read_batch", "refine_in_place"]

POPULATION = 100  # tasks that the population is fitted to at the end, at least
TRIES = 6  # of one batch, each with more damping
FIRST_DAMPING = 3e-3


def refine_in_place(
    model: HybridModel,
    guide: AmortizedGuide,
    tasks: Tasks,
    settings: Refinement,
    *,
    network: nn.Module | None = None,
    progress: bool = True,
) -> list[BatchRecord]:
    r"""Bring a network to the optimum by Gauss-Newton, in place.

    Stochastic gradients leave weights scattered in directions that cost the likelihood little and physics latents
    much. Here weights :math:`w` have a Gaussian belief of precision :math:`H`. Each batch of systems is linearized in
    the unknowns of its systems, of its shots and of the network; the former two are integrated out, and the factors of
    the weights are added (a Kalman filter whose state is the network),

    .. math:: H \leftarrow (1 - \gamma) H + \gamma s^{-2} I + \sum_i J_i^\top J_i, \qquad
              w \leftarrow w - H^{-1} \sum_i J_i^\top r_i,

    with forgetting :math:`\gamma` and prior standard deviation :math:`s`. The latents follow each move of the weights,
    without which a network that is far from its optimum can hardly move. A move is damped until its batch is explained
    better, and the damping carries over to the next batch. Systems that are explained badly count less. Meanwhile the
    population follows the systems as they are inferred: a network may grow while its latents shrink, and a population
    that stays behind would then say nothing.

    A batch costs as many runs of the program as there are weights, or for a :class:`~pyro_hybrid.Residual` as there are
    observation times, whichever are fewer. Weights with ``requires_grad=False`` stay as they are.

    References:
        | Incremental Least Squares Methods and the Extended Kalman Filter (Bertsekas, 1996)
        | The Variable Projection Method: Its Extension and Applications (Golub and Pereyra, 2003)

    Arguments:
        model: a program whose ``prior`` holds the systems' latents.
        guide: its encoders, if there are any, say where the reading of a batch begins.
        tasks: the training data.
        settings: see :class:`Refinement`.
        network: the network, by default ``model.residual``.
        progress: show a progress bar after two seconds.

    Returns:
        What happened in each batch.
    """
    refiner = Refiner(model, guide, tasks, settings, network=network)
    batches = tasks.numbered_batches(settings.batch_size, settings.seed)
    was_training = model.training
    records: list[BatchRecord] = []
    bar = tqdm(
        range(settings.num_steps),
        desc="refining weights",
        unit="batch",
        disable=not progress,
        delay=2.0,
        dynamic_ncols=True,
    )
    try:
        model.eval()
        for _ in bar:
            records.append(refiner.step(next(batches)[0]))
            bar.set_postfix_str(str(records[-1]))
        refiner.finish()
    finally:
        model.train(was_training)
    return records


class BatchRecord(NamedTuple):
    """What happened in one batch.

    Attributes:
        cost: deviance per observation before the step (squared residuals in noise variances, if the noise is normal).
        cost_after: and after it.
        is_accepted: False if no step explained the batch better, so that the weights stayed.
        damping: of the step.
        num_excluded: number of systems that were excluded because they are explained far worse than the others.
    """

    cost: float
    cost_after: float
    is_accepted: bool
    damping: float
    num_excluded: int

    def __str__(self) -> str:
        text = f"squared residual {self.cost:.4g} noise variances"
        return text if self.is_accepted else f"{text}, step rejected"


class Refiner:
    """The state of a second-order training, and its step.

    Arguments:
        model, guide, tasks, settings, network: see :func:`refine_in_place`.
    """

    def __init__(
        self,
        model: HybridModel,
        guide: AmortizedGuide,
        tasks: Tasks,
        settings: Refinement,
        *,
        network: nn.Module | None = None,
    ) -> None:
        check_settings(settings)
        self.model = model
        self.guide = guide
        self.tasks = tasks
        self.settings = settings
        self.network = network_of(model, network)
        self.weights = list(trained_weights(self.network).values())
        size = sum(weight.numel() for weight in self.weights)
        identity = torch.eye(size, dtype=torch.float64, device=self.weights[0].device)
        self.floor = identity / settings.prior_sd**2
        self.precision = self.floor
        self.damping = 0.0
        self.forgetting = settings.forgetting
        self.population = FollowedPopulation(model.prior)
        self.readings = Readings(len(tasks), model.prior)
        self.noise = UnexplainedNoise()

    @torch.no_grad()
    def step(self, rows: Tensor) -> BatchRecord:
        """Read some tasks, move the weights, and let noise and population follow."""
        with local_parameters():
            problem, iterate = self._read(rows)
            before = (1.0 - self.forgetting) * self.precision + self.forgetting * self.floor
            evidence = weight_evidence(problem, iterate, self.network, self.settings.outlier_factor)
            after, is_accepted = self._move(problem, evidence, before)
            self.precision = before + evidence.factor.precision
            kept = evidence.kept
            num_observed = problem.num_observed[kept].sum().clamp(min=1.0)
            record = BatchRecord(
                evidence.cost,
                float(after.cost[kept].sum() / num_observed),
                is_accepted,
                self.damping,
                int((~kept).sum()),
            )
            if bool(kept.any()):
                self._follow(problem, after, rows, kept)
        return record

    def _read(self, rows: Tensor) -> tuple[LeastSquares, Iterate]:
        tasks = self.tasks[rows]
        start = self.readings.start(rows)
        if start is None:
            start = proposal(self.model, self.guide, tasks)
        return read_batch(self.model, tasks, self.settings.evidence, self.population.belief, start)

    def hold(self, prior_sd: float, forgetting: float) -> None:
        """Hold weights closer to where they are now, and remember former batches longer."""
        closer = torch.eye(len(self.floor)).to(self.floor) / prior_sd**2
        self.precision = self.precision + closer - self.floor
        self.floor = closer
        self.forgetting = forgetting

    def _move(
        self, problem: LeastSquares, evidence: WeightEvidence, before: Tensor
    ) -> tuple[Iterate, bool]:
        """Move the weights so that the batch is explained better, or not at all; read the batch again."""
        old = nn.utils.parameters_to_vector(self.weights)
        kept = evidence.kept
        iterate = evidence.iterate
        cost_before = float(misfit(problem, iterate.cost)[kept].sum())
        factor = evidence.factor
        diagonal = torch.diag(factor.precision.diagonal())
        for attempt in range(TRIES):
            precision = before + factor.precision + self.damping * diagonal
            move = torch.linalg.solve(precision, factor.information)
            nn.utils.vector_to_parameters(old + move.to(old), self.weights)
            moved = move_latents(problem, evidence, move)
            proposed = GaussNewton(2).descend(problem, moved.task, 2, moved.shot)
            cost = misfit(problem, proposed.cost)[kept].sum()
            if float(cost + move @ before @ move) < cost_before:
                if attempt == 0:
                    self.damping = 0.2 * self.damping if self.damping > 1e-4 else 0.0
                return proposed, True
            self.damping = max(6.0 * self.damping, FIRST_DAMPING)
        nn.utils.vector_to_parameters(old, self.weights)
        return iterate, False

    def _follow(self, problem: LeastSquares, iterate: Iterate, rows: Tensor, kept: Tensor) -> None:
        if self.settings.noise is not None:
            deviations = self.noise.after(problem, iterate, kept)
            set_noise(self.model, self.settings.noise, deviations)
        posterior = (problem.belief + problem.increment(iterate)).gaussian()
        self.population.follow(posterior, kept)
        self.readings.note(rows[kept], posterior.select_tasks(kept.nonzero().squeeze(1)))

    @torch.no_grad()
    def finish(self) -> None:
        """Fit the prior's population to tasks as they are inferred with the new weights."""
        with local_parameters():
            unread = self.readings.unread(POPULATION)
            for rows in unread.split(self.settings.batch_size) if len(unread) else ():
                problem, iterate = self._read(rows)
                kept = usable_tasks(iterate.cost, self.settings.outlier_factor)
                posterior = (problem.belief + problem.increment(iterate)).gaussian()
                chosen = kept.nonzero().squeeze(1)
                self.readings.note(rows[kept], posterior.select_tasks(chosen))
        mean, scale = self.readings.recent()
        self.model.prior.fit_population(mean, scale)


def proposal(model: HybridModel, guide: AmortizedGuide, tasks: Tasks) -> Belief | None:
    """Return what encoders say of some tasks; None if there are none."""
    evidences = [guide.evidence]
    if isinstance(model.prior, SupportPrior):
        evidences.append(model.prior.evidence)
    if all(encoder_of(evidence) is None for evidence in evidences):
        return None
    return guide.belief(model.with_belief(tasks.episode()))


def read_batch(
    model: HybridModel,
    tasks: Tasks,
    evidence: GaussNewton,
    population: Belief | None = None,
    start: Belief | None = None,
) -> tuple[LeastSquares, Iterate]:
    """Pose the problem of all shots of some tasks given the population, and solve it.

    Arguments:
        model: the program.
        tasks: the systems.
        evidence: how they are read.
        population: the belief before, by default the prior's population.
        start: where to begin, by default at the population's mean.
    """
    belief = model.prior.population() if population is None else population
    problem = LeastSquares(model, tasks.shots(slice(None)), belief)
    iterate = evidence.minimize(problem, start)
    return problem, evidence.descend(problem, iterate.task, evidence.num_iterations, iterate.shot)
