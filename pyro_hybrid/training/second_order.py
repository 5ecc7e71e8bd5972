"""Second-order training: a network's weights as latents that all systems share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_hybrid.beliefs.quadratic import Quadratic
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import fail, require
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.evidence.least_squares import Iterate, LeastSquares
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.programs.module import HybridModel, local_parameters
from pyro_hybrid.programs.run import run_at
from pyro_hybrid.training.weight_slopes import trained_weights, weight_slopes

__all__ = ["Refinement", "read_batch", "refine_in_place", "weight_evidence"]

LARGEST = 10_000  # number of weights; their precision has the square of it, in float64
POPULATION = 200  # tasks that the population is fitted to at the end
DAMPINGS = (0.0, 3e-3, 0.1, 3.0)  # tried in turn until the batch is explained better


class Refinement(NamedTuple):
    """Settings of :func:`refine_in_place`.

    Attributes:
        num_steps: number of batches.
        batch_size: number of systems in a batch.
        evidence: how a batch is read, from where the guide points.
        forgetting: share of the weights' precision that each batch forgets, for earlier ones were linearized elsewhere.
        prior_sd: how far off the weights may be.
        outlier_factor: exclude tasks whose cost exceeds this multiple of the batch median.
        noise: name of the model's attribute that holds the observations' standard deviation, which is set to what is
            left unexplained; None to leave it.
        seed: seed of the batches.
    """

    num_steps: int = 8
    batch_size: int = 8
    evidence: GaussNewton = GaussNewton(2)
    forgetting: float = 0.1
    prior_sd: float = 0.1
    outlier_factor: float = 10.0
    noise: str | None = "noise"
    seed: int = 0


def refine_in_place(
    model: HybridModel,
    guide: AmortizedGuide,
    tasks: Tasks,
    settings: Refinement = Refinement(),
    *,
    network: nn.Module | None = None,
    progress: bool = True,
) -> list[float]:
    r"""Bring a trained network to the optimum by Gauss-Newton, in place.

    Stochastic gradients leave weights scattered in directions that cost the likelihood little and physics latents
    much. Here weights :math:`w` have a Gaussian belief of precision :math:`H`. Each batch of systems is linearized in
    the unknowns of its systems, of its shots and of the network; the former two are integrated out, and the factors of
    the weights are added (a Kalman filter whose state is the network),

    .. math:: H \leftarrow (1 - \gamma) H + \gamma s^{-2} I + \sum_i J_i^\top J_i, \qquad
              w \leftarrow w - H^{-1} \sum_i J_i^\top r_i,

    with forgetting :math:`\gamma` and prior standard deviation :math:`s`. A step is shortened until its batch is
    explained better. At the end the population is fitted to the tasks as they are inferred with the new weights.

    A batch costs as many runs of the program as there are weights, or as a :class:`~pyro_hybrid.Residual` is
    evaluated in one, whichever are fewer. Weights with ``requires_grad=False`` stay as they are.

    References:
        Incremental Least Squares Methods and the Extended Kalman Filter (Bertsekas, 1996)

    Arguments:
        model: a program whose ``prior`` holds the systems' latents.
        guide: its evidence says where the reading of a batch begins.
        tasks: the training data.
        settings: see :class:`Refinement`.
        network: the network, by default ``model.residual``.
        progress: show a progress bar after two seconds.

    Returns:
        The cost of each batch before its step: squared residuals in noise variances, per observation.
    """
    _check_settings(settings)
    network = _network(model, network)
    weights = list(trained_weights(network).values())
    size = sum(weight.numel() for weight in weights)
    dtype, device = torch.float64, weights[0].device
    identity = torch.eye(size, dtype=dtype, device=device)
    floor = Quadratic(identity.new_zeros(size), identity / settings.prior_sd**2)
    belief = floor
    unexplained = _UnexplainedNoise()
    costs: list[float] = []
    was_training = model.training
    batches = tasks.numbered_batches(settings.batch_size, settings.seed)
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
        with torch.no_grad(), local_parameters():
            for _ in bar:
                rows, _episode = next(batches)
                problem, iterate = read_batch(model, guide, tasks[rows], settings.evidence)
                belief = (1.0 - settings.forgetting) * belief + settings.forgetting * floor
                evidence = weight_evidence(problem, iterate, network, settings.outlier_factor)
                costs.append(evidence.cost)
                iterate = _take_step(problem, iterate, weights, evidence, belief)
                belief = Quadratic(belief.information, belief.precision + evidence.factor.precision)
                if settings.noise is not None:
                    deviations = unexplained.after(problem, iterate, evidence.kept)
                    _set_noise(model, settings.noise, deviations)
                bar.set_postfix_str(f"squared residual {evidence.cost:.4g} noise variances")
        _fit_population(model, guide, tasks, settings)
    finally:
        model.train(was_training)
    return costs


def _fit_population(
    model: HybridModel, guide: AmortizedGuide, tasks: Tasks, settings: Refinement
) -> None:
    """Fit the population to tasks as they are inferred with the new weights."""
    rows = torch.linspace(0, len(tasks) - 1, min(len(tasks), POPULATION)).long()
    means = []
    scales = []
    with torch.no_grad(), local_parameters():
        for some in rows.split(settings.batch_size):
            problem, iterate = read_batch(model, guide, tasks[some], settings.evidence)
            mean, scale = (problem.belief + problem.increment(iterate)).moments()
            kept = _usable_tasks(iterate.cost, settings.outlier_factor)
            means.append(mean[kept])
            scales.append(scale[kept])
    model.prior.fit_population(torch.cat(means), torch.cat(scales))


class WeightEvidence(NamedTuple):
    """The factor of the weights from one batch, the tasks that it is from, and the cost per observation."""

    factor: Quadratic
    kept: Tensor
    cost: float


def read_batch(
    model: HybridModel, guide: AmortizedGuide, tasks: Tasks, evidence: GaussNewton
) -> tuple[LeastSquares, Iterate]:
    """Pose the problem of all shots of some tasks given the population, and solve it from where the guide points."""
    start = guide.belief(model.with_belief(tasks.episode()))
    problem = LeastSquares(model, tasks.shots(slice(None)), model.prior.population())
    iterate = evidence.minimize(problem, start)
    return problem, evidence.descend(problem, iterate.task, evidence.num_iterations, iterate.shot)


def weight_evidence(
    problem: LeastSquares, iterate: Iterate, network: nn.Module, outlier_factor: float
) -> WeightEvidence:
    """Integrate the latents of shots and tasks out of each task's factor, and multiply what is left."""
    residuals, slopes = problem.jacobian(iterate.task, iterate.shot)
    by_weight = weight_slopes(problem, iterate, network)
    kept = _usable_tasks(iterate.cost, outlier_factor)
    kept &= slopes.isfinite().flatten(1).all(1) & by_weight.isfinite().flatten(1).all(1)
    size = by_weight.shape[2]
    total = Quadratic(
        torch.zeros(size, dtype=torch.float64, device=slopes.device),
        torch.zeros(size, size, dtype=torch.float64, device=slopes.device),
    )
    for task in kept.nonzero().squeeze(1).tolist():
        jacobian = torch.cat([by_weight[task], slopes[task]], 1).double()
        total = total + _task_factor(problem, iterate, task, jacobian, residuals[task].double())
    num_counted = max(int(residuals[kept].count_nonzero()), 1)
    cost = float(residuals[kept].double().square().sum()) / num_counted
    return WeightEvidence(total, kept, cost)


def _task_factor(
    problem: LeastSquares, iterate: Iterate, task: int, jacobian: Tensor, residuals: Tensor
) -> Quadratic:
    """Factor of a change of the weights from one task; rows of the Jacobian are weights, task's and shots' latents."""
    num_weights = jacobian.shape[1] - problem.d - problem.m
    information = -(jacobian @ residuals.unsqueeze(-1)).squeeze(-1)
    precision = jacobian @ jacobian.mT
    if problem.m:
        own = slice(num_weights + problem.d, None)
        offset = (iterate.shot[task] - problem.shot_mean[task]).double()
        information[:, own] -= problem.shot_precision[task] * offset
        precision[:, own, own] += torch.diag_embed(problem.shot_precision[task])
    factor = Quadratic(information, precision).marginal(num_weights + problem.d).sum(0)
    prior = problem.prior.precision[task]
    offset = (iterate.task[task] - problem.mean[task]).double()
    factor.information[num_weights:] -= prior @ offset
    factor.precision[num_weights:, num_weights:] += prior
    return factor.marginal(num_weights)


def _usable_tasks(cost: Tensor, outlier_factor: float) -> Tensor:
    finite = cost[cost.isfinite()]
    if not len(finite):
        return torch.zeros_like(cost, dtype=torch.bool)
    return cost < outlier_factor * finite.median()


def _take_step(
    problem: LeastSquares,
    iterate: Iterate,
    weights: list[nn.Parameter],
    evidence: WeightEvidence,
    belief: Quadratic,
) -> Iterate:
    """Take the longest of a few steps that explains the batch better than before; read the batch again."""
    old = nn.utils.parameters_to_vector(weights)
    before = float(iterate.cost[evidence.kept].sum())
    factor = evidence.factor
    for damping in DAMPINGS:
        precision = belief.precision + factor.precision
        precision = precision + torch.diag(damping * factor.precision.diagonal())
        move = torch.linalg.solve(precision, factor.information)
        nn.utils.vector_to_parameters(old + move.to(old), weights)
        proposal = GaussNewton(2).descend(problem, iterate.task, 2, iterate.shot)
        after = float(proposal.cost[evidence.kept].sum() + move @ belief.precision @ move)
        if after < before:
            return proposal
    nn.utils.vector_to_parameters(old, weights)
    return iterate


class _UnexplainedNoise:
    """Variances of the observations by sensor, of the last few batches: squared errors over degrees of freedom."""

    def __init__(self) -> None:
        self.squares = torch.zeros(())
        self.freedom = torch.zeros(())

    def after(self, problem: LeastSquares, iterate: Iterate, kept: Tensor) -> Tensor:
        """Standard deviations with one more batch."""
        values = problem.values(iterate.task[None], iterate.shot[None])
        observations = run_at(problem.program, problem.episode, values).observations
        require(
            len(observations) == 1,
            "a program with one observed site",
            f"{len(observations)} of them",
            "Pass noise=None.",
        )
        site = observations[0]
        error = site.value - site.mean  # (1, task, shot, time, sensor)
        counts = site.mask.expand_as(error)[0][kept].double()
        error = error[0][kept].double()
        num_values = counts.sum()
        freedom = 1.0 - self._num_fitted(problem, iterate, kept) / num_values
        self.squares = 0.5 * self.squares + (counts * error.square()).sum((0, 1, 2))
        self.freedom = 0.5 * self.freedom + counts.sum((0, 1, 2)) * freedom
        return (self.squares / self.freedom).sqrt()

    def _num_fitted(self, problem: LeastSquares, iterate: Iterate, kept: Tensor) -> Tensor:
        """Number of values that were used up by the latents of tasks and shots."""
        by_task = torch.as_tensor(problem.d * int(kept.sum()), dtype=torch.float64)
        if not problem.m:
            return by_task
        slopes = problem.jacobian(iterate.task, iterate.shot)[1][kept].double()[:, :, problem.d :]
        gram = slopes @ slopes.mT
        weight = torch.diag_embed(problem.shot_precision[kept])
        by_shot: Tensor = torch.linalg.solve(gram + weight, gram).diagonal(dim1=-2, dim2=-1).sum()
        return by_task + by_shot


def _set_noise(model: HybridModel, name: str, deviations: Tensor) -> None:
    old = getattr(model, name, None)
    if not isinstance(old, Tensor) or old.numel() not in (1, len(deviations)):
        fail(
            f"{name!r}, a standard deviation of {len(deviations)} sensors, or of all",
            getattr(old, "shape", type(old).__name__),
            "Pass the attribute's name, or noise=None.",
        )
    new = deviations if old.numel() == len(deviations) else deviations.square().mean().sqrt()
    new = new.reshape(old.shape).to(old)
    is_usable = new > 0.0  # False where it isn't a number
    setattr(model, name, torch.where(is_usable, new, old))


def _network(model: HybridModel, network: nn.Module | None) -> nn.Module:
    network = network if network is not None else getattr(model, "residual", None)
    if network is None:
        fail(
            "a network",
            f"{type(model).__name__} without a residual",
            "Pass network=, such as model.force.",
        )
    weights = trained_weights(network)
    require(
        bool(weights),
        "a network with weights that are not frozen",
        type(network).__name__,
        "Pass the part that was trained.",
    )
    hooked = [
        name
        for name, weight in weights.items()
        if weight._backward_hooks or weight._post_accumulate_grad_hooks
    ]
    require(
        not hooked,
        "weights without hooks on their gradients, which second-order training can't see",
        hooked,
        "Freeze entries with torch.nn.utils.parametrize, or whole weights with requires_grad_(False).",
    )
    size = sum(weight.numel() for weight in weights.values())
    require(
        size <= LARGEST,
        f"a network of up to {LARGEST} weights",
        size,
        "Refine a part of it, or train longer.",
    )
    return network


def _check_settings(settings: Refinement) -> None:
    checks: list[tuple[str, Callable[[float], bool], str]] = [
        ("num_steps", lambda x: isinstance(x, int) and x >= 1, "a whole number of 1 or more"),
        ("batch_size", lambda x: isinstance(x, int) and x >= 1, "a whole number of 1 or more"),
        ("forgetting", lambda x: 0.0 <= x < 1.0, "a number in [0, 1)"),
        ("prior_sd", lambda x: 0.0 < x < float("inf"), "a positive number"),
        ("outlier_factor", lambda x: x > 1.0, "a number above 1"),
    ]
    for name, is_good, wanted in checks:
        value = getattr(settings, name)
        require(is_good(value), f"{name} as {wanted}", repr(value), "The default is a good choice.")
    require(
        isinstance(settings.evidence, GaussNewton),
        "evidence=ph.GaussNewton(...)",
        type(settings.evidence).__name__,
        "A batch is linearized where Gauss-Newton ends.",
        TypeError,
    )
