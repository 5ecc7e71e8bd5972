"""Weights by Gauss-Newton: where the program is linear, their exact posterior; and what may go wrong elsewhere."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro_hybrid.training.refinement import (
    _by_call,
    _by_weight,
    _evidence,
    _one_by_one,
    _pushed,
    _read,
)
from torch import Tensor, nn
from toys import NOISE, POINTS, START_NOISE, TIMES, Line, alone, features, make_tasks

import pyro_hybrid as ph
from pyro_hybrid.beliefs.families import Normal
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.evidence.least_squares import Iterate, LeastSquares

BEND = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
SITES = {"slope": Normal(1, loc=0.5, scale=2.0)}


class Shared(Line):
    """A line whose bend is the same in every system: a linear network of two weights."""

    def __init__(self, *, inferred: bool = False, noise: float = NOISE) -> None:
        super().__init__(sites=SITES, inferred=inferred, noise=noise)
        self.residual = nn.Linear(2, 1, bias=False)

    def forward(self, episode: ph.Episode) -> Tensor:
        p = self.prior(episode.support)
        start = torch.stack(episode.query.initial, -1)
        grown = features(episode.query.times) - features(episode.query.times[..., :1])
        with episode.plate:
            slope = pyro.sample("slope", p["slope"])
            if self.inferred:
                start = pyro.sample("start", dist.Normal(start, START_NOISE).to_event(2))
            mean = (
                start + grown[..., 0] * slope[..., None] + self.residual(grown[..., 1:]).squeeze(-1)
            )
            x = dist.Normal(mean.unsqueeze(-1), self.noise).mask(episode.query.scored)
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)


def shared(number: int, shots: int = 3, *, inferred: bool = False) -> ph.Tasks:
    """Lines that all bend alike."""
    made = make_tasks(number, shots, inferred=inferred, latents=1)
    values = made.values + (features(TIMES)[:, 1:] @ BEND[0]).view(-1, 1)
    return ph.Tasks.from_trajectories(
        TIMES, values, num_support=1, mask=torch.as_tensor(made.seen).expand_as(values)
    )


def ready(**options: bool | float) -> tuple[Shared, ph.AmortizedGuide]:
    model = Shared(**options).double()
    return model, ph.AmortizedGuide(model.prior, evidence=ph.GaussNewton(2))


def posterior(model: Shared, tasks: ph.Tasks, width: float) -> Tensor:
    """Mean of the weights given all shots, slopes and starts integrated out: generalised least squares."""
    everything, times = tasks.shots(), features(TIMES)[1:] - features(TIMES)[:1]
    y = (everything.query.values[..., 0] - everything.initial[0].unsqueeze(-1))[
        ..., 1:
    ] - 0.5 * times[:, 0]
    shots, design = y.shape[1], times[:, 1:]
    block = NOISE**2 * torch.eye(POINTS - 1).double() + (START_NOISE**2 if model.inferred else 0.0)
    covariance = torch.block_diag(*[block] * shots)
    slope = times[:, 0].repeat(shots)
    covariance = covariance + 2.0**2 * torch.outer(slope, slope)
    design, inverse = design.repeat(shots, 1), torch.linalg.inv(covariance)
    before = model.residual.weight.detach()[0]
    precision = torch.eye(2).double() / width**2 + len(y) * design.T @ inverse @ design
    error = (y.flatten(1) - design @ before).sum(0)
    return before + torch.linalg.solve(precision, design.T @ inverse @ error)


@pytest.mark.parametrize("inferred", [False, True])
def test_one_batch_gives_the_exact_posterior_mean_of_a_linear_network(inferred: bool) -> None:
    (model, guide), tasks = ready(inferred=inferred), shared(20, inferred=inferred)
    expected = posterior(model, tasks, width=0.3)
    ph.sharpen(model, guide, tasks, steps=1, batch_size=20, noise=None, width=0.3, progress=False)
    assert torch.allclose(model.residual.weight[0], expected, atol=1e-6)
    assert (model.residual.weight - BEND).abs().max() < 0.1


def test_batches_add_up_to_all_of_it() -> None:
    (model, guide), tasks = ready(), shared(20)
    expected = posterior(model, tasks, width=0.3)
    ph.sharpen(
        model,
        guide,
        tasks,
        steps=4,
        batch_size=5,
        noise=None,
        memory=1.0,
        width=0.3,
        progress=False,
    )
    assert torch.allclose(model.residual.weight[0], expected, atol=1e-6)


def test_what_is_forgotten_counts_less() -> None:
    (model, guide), tasks = ready(), shared(20)
    ph.sharpen(
        model,
        guide,
        tasks,
        steps=4,
        batch_size=5,
        noise=None,
        memory=1e-9,
        width=1e3,
        progress=False,
    )
    rows, _ = list(zip(range(4), tasks.numbered_batches(5, 0), strict=False))[-1][1]
    alone = ready()[0]
    expected = posterior(alone, tasks[rows], width=1e3)
    assert torch.allclose(model.residual.weight[0], expected, atol=1e-4)


@pytest.mark.parametrize("inferred", [False, True])
def test_the_noise_is_what_stays_unexplained(inferred: bool) -> None:
    (model, guide), tasks = (
        ready(inferred=inferred, noise=3.0 * NOISE),
        shared(400, inferred=inferred),
    )
    before = model.prior.base.clone()
    ph.sharpen(model, guide, tasks, steps=8, batch_size=200, progress=False)
    assert model.noise.item() == pytest.approx(NOISE, rel=0.02)
    assert torch.equal(model.prior.base, before)


def test_a_task_that_cannot_be_read_teaches_nothing() -> None:
    (model, guide), tasks = ready(), shared(20)
    values = tasks.values.clone()
    values[7] = 1e3 * torch.randn(values[7].shape).double()
    spoilt = ph.Tasks.from_trajectories(TIMES, values, num_support=1)
    with torch.no_grad():
        problem, point = _read(model, guide, spoilt, ph.GaussNewton(2))
    assert isinstance(problem, LeastSquares)
    with torch.no_grad():
        kept = _evidence(problem, point, model.residual, 10.0).kept
    assert (~kept).nonzero().flatten().tolist() == [7]
    ph.sharpen(model, guide, spoilt, steps=1, batch_size=20, width=1.0, progress=False)
    assert (model.residual.weight - BEND).abs().max() < 0.1
    assert model.noise.item() == pytest.approx(NOISE, rel=0.1)


def test_how_much_worse_a_task_may_be_is_the_users_choice() -> None:
    (model, guide), tasks = ready(), shared(20)
    values = tasks.values.clone()
    values[7, 1:] += 3.0 * features(TIMES)[:, :1]  # its shots are of two systems
    mixed = ph.Tasks.from_trajectories(TIMES, values, num_support=1)
    with torch.no_grad():
        problem, point = _read(model, guide, mixed, ph.GaussNewton(2))
        ratio = float(point.cost[7] / point.cost.median())
        dropped = [
            (~_evidence(problem, point, model.residual, misread).kept).nonzero().flatten().tolist()
            for misread in (1.01 * ratio, 0.99 * ratio)
        ]
    assert ratio > 2.0 and dropped[0] == [] and 7 in dropped[1]


def test_a_force_is_sharpened_until_systems_are_explained() -> None:
    system = ph.systems.AdvectionDiffusion(size=6)
    system.points = 8
    model, tasks = ph.models.MetaHybridVAE(system, width=4), system.simulate(12, 4, seed=0)
    guide = model.guide()
    ph.meta_train(model, guide, tasks, num_steps=30, batch_size=6, progress=False)
    costs = ph.sharpen(model, guide, tasks, steps=6, batch_size=12, width=1.0, progress=False)
    assert len(costs) == 6 and model.residual.last.weight.isfinite().all()
    again = ph.sharpen(model, guide, tasks, steps=1, batch_size=12, noise=None, progress=False)
    spread = model.noise / torch.tensor(system.noise)
    assert 0.8 < spread.mean().item() < 1.3 and again[0] == pytest.approx(1.0, abs=0.2)


def forced(
    system: ph.systems.System,
    *,
    points: int = 5,
    settled: bool = False,
    **options: Any,
) -> tuple[Any, LeastSquares, Iterate]:
    torch.manual_seed(0)
    system.points = points
    model, tasks = (
        ph.models.MetaHybridVAE(system, **options).double(),
        system.simulate(3, 2, seed=0),
    )
    if settled:
        model.settle(tasks, 64)
    start = tuple(part.double() for part in tasks.shots().initial)
    episode = alone(tasks.times.double(), tasks.values.double(), start)
    mean, precision = model.prior.gaussian(None)
    mean = mean + 0.3 * torch.randn(3, mean.shape[-1]).double()
    problem = LeastSquares(model, episode, model.prior.sites, mean, precision.expand(3, -1, -1))
    return model, problem, GaussNewton(1).descend(problem, mean, 1, problem.shot_mean)


@pytest.mark.parametrize("system", [ph.systems.Pendulum, ph.systems.DoublePendulum])
@torch.no_grad()
def test_derivatives_by_what_a_term_returns_are_those_by_its_weights(
    system: type[ph.systems.System],
) -> None:
    model, problem, point = forced(system(), linear=False, width=9)
    errors = problem.errors(point.task[None], point.shot[None])[0]
    calls = _pushed(problem, point, model.residual, None)[1]
    assert len(calls) == 4 * 4  # Runge-Kutta's four, for each of four steps
    expected = _one_by_one(problem, point, model.residual, errors)
    found = _by_call(problem, point, model.residual, errors, torch.stack(calls)[:, 0])
    assert expected.abs().max() > 1.0
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    chosen = _by_weight(problem, point, model.residual, errors)
    assert torch.equal(chosen, found)  # fewer calls than weights
    assert "given" not in vars(model.residual)


@pytest.mark.parametrize("options", [{"width": 1, "points": 9}, {"width": 9, "settled": True}])
@torch.no_grad()
def test_a_term_of_few_weights_or_called_elsewhere_too_is_moved_weight_by_weight(
    options: dict[str, Any],
) -> None:
    model, problem, point = forced(ph.systems.Pendulum(), **options)
    errors = problem.errors(point.task[None], point.shot[None])[0]
    expected = _one_by_one(problem, point, model.residual, errors)
    assert torch.equal(_by_weight(problem, point, model.residual, errors), expected)


def test_the_same_seed_gives_the_same_and_draws_nothing() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        (model, guide), tasks = ready(), shared(12)
        state = torch.get_rng_state()
        model.train()
        costs = ph.sharpen(model, guide, tasks, steps=3, batch_size=4, progress=False)
        assert torch.equal(torch.get_rng_state(), state) and model.training
        found.append((costs, model.residual.weight.detach().clone(), model.noise.detach().clone()))
    (costs, weight, noise), (again, same, too) = found
    assert costs == again and torch.equal(weight, same) and torch.equal(noise, too)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"expected steps and batch_size of 1 or more; got \(0, 8\)"),
        (
            {"memory": 0.0},
            r"expected a memory in \(0, 1\] and a positive width; got \(0\.0, 0\.1\)",
        ),
        ({"width": 0.0}, r"expected a memory in \(0, 1\] and a positive width; got \(0\.9, 0\.0\)"),
        ({"misread": 1.0}, r"expected misread above 1; got 1\.0"),
        ({"network": nn.Tanh()}, r"expected a network with weights; got Tanh"),
        (
            {"network": nn.Linear(100, 101)},
            r"expected a network of up to 10000 weights; got 10201\. Sharpen a part",
        ),
        (
            {"noise": "sigma"},
            r"expected 'sigma', a standard deviation of 1 sensors, or of all; got NoneType",
        ),
    ],
)
def test_what_it_cannot_do_is_said(options: dict, message: str) -> None:
    model, guide = ready()
    with pytest.raises(ValueError, match=message):
        ph.sharpen(model, guide, shared(4), **{"steps": 1, "progress": False, **options})


def test_a_program_without_a_residual_must_say_what_its_network_is() -> None:
    model = Line(sites=SITES).double()
    guide = ph.AmortizedGuide(model.prior, evidence=ph.GaussNewton(2))
    with pytest.raises(
        ValueError, match=r"expected a network; got Line without a residual\. Pass network="
    ):
        ph.sharpen(model, guide, shared(4), steps=1)
