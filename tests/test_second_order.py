"""Second-order training: exact on a linear network, and safe where a program isn't linear."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor, nn
from toys import (
    BEND,
    NOISE,
    POINTS,
    SLOPE,
    START_NOISE,
    TIMES,
    Line,
    Shared,
    features,
    shared,
    without_type_checks,
)

import pyro_hybrid as ph
from pyro_hybrid.beliefs.belief import Gaussian
from pyro_hybrid.beliefs.families import LogNormal, Normal
from pyro_hybrid.evidence.least_squares import LeastSquares
from pyro_hybrid.training import weight_evidence as module
from pyro_hybrid.training.readings import FollowedPopulation
from pyro_hybrid.training.refinement import Refinement
from pyro_hybrid.training.second_order import read_batch, refine_in_place
from pyro_hybrid.training.weight_evidence import misfit, weight_evidence
from pyro_hybrid.training.weight_slopes import (
    Place,
    evaluate_force,
    slopes_by_force,
    slopes_by_weight,
    spread_knots,
    weight_slopes,
)


def pair(*, inferred: bool = False, noise: float = NOISE) -> tuple[Shared, ph.AmortizedGuide]:
    torch.manual_seed(0)
    model = Shared(inferred=inferred, noise=noise).double()
    return model, ph.AmortizedGuide(model, ph.GaussNewton(2)).double()


def refine(
    model: ph.HybridModel, guide: ph.AmortizedGuide, tasks: ph.Tasks, **options: Any
) -> list[float]:
    network = options.pop("network", None)
    settings = Refinement(**options)
    records = refine_in_place(model, guide, tasks, settings, network=network, progress=False)
    return [record.cost for record in records]


def exact_weights(model: Shared, tasks: ph.Tasks, prior_sd: float) -> Tensor:
    """Mean of the weights given all shots, with slopes and starts integrated out: generalized least squares."""
    shots = tasks.shots()
    times = features(TIMES)[1:] - features(TIMES)[:1]
    y = (shots.values[..., 0] - shots.initial)[..., 1:] - 0.5 * times[:, 0]
    num_shots = y.shape[1]
    block = NOISE**2 * torch.eye(POINTS - 1).double() + (START_NOISE**2 if model.inferred else 0.0)
    covariance = torch.block_diag(*[block] * num_shots)
    slope = times[:, 0].repeat(num_shots)
    covariance = covariance + 2.0**2 * torch.outer(slope, slope)
    design = times[:, 1:].repeat(num_shots, 1)
    inverse = torch.linalg.inv(covariance)
    before = model.residual.weight.detach()[0]
    precision = torch.eye(2).double() / prior_sd**2 + len(y) * design.T @ inverse @ design
    error = (y.flatten(1) - design @ before).sum(0)
    return before + torch.linalg.solve(precision, design.T @ inverse @ error)


# ---- a linear network, whose posterior is known --------------------------------------------------


@pytest.fixture
def all_tasks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count tasks that are explained badly in full, and keep the population: steps are those of least squares."""
    monkeypatch.setattr(module, "POOR_FIT", math.inf)
    monkeypatch.setattr(FollowedPopulation, "follow", lambda *_: None)


@pytest.mark.usefixtures("all_tasks_count")
@pytest.mark.parametrize("inferred", [False, True])
def test_one_batch_gives_the_exact_posterior_mean_of_a_linear_network(inferred: bool) -> None:
    model, guide = pair(inferred=inferred)
    tasks = shared(20, inferred=inferred)
    expected = exact_weights(model, tasks, prior_sd=0.3)
    refine(model, guide, tasks, num_steps=1, batch_size=20, noise=None, prior_sd=0.3)
    assert torch.allclose(model.residual.weight[0], expected, atol=1e-6)
    assert (model.residual.weight - BEND).abs().max() < 0.1


@pytest.mark.usefixtures("all_tasks_count")
def test_batches_add_up_if_nothing_is_forgotten() -> None:
    model, guide = pair()
    tasks = shared(20)
    expected = exact_weights(model, tasks, prior_sd=0.3)
    options = {"num_steps": 4, "batch_size": 5, "noise": None, "prior_sd": 0.3}
    refine(model, guide, tasks, forgetting=0.0, **options)
    assert torch.allclose(model.residual.weight[0], expected, atol=1e-6)


@pytest.mark.usefixtures("all_tasks_count")
def test_batches_that_are_forgotten_count_for_nothing() -> None:
    model, guide = pair()
    tasks = shared(20)
    options = {"num_steps": 4, "batch_size": 5, "noise": None, "prior_sd": 1e3}
    refine(model, guide, tasks, forgetting=1.0 - 1e-9, **options)
    batches = tasks.numbered_batches(5, 0)
    rows = [next(batches)[0] for _ in range(4)][-1]
    expected = exact_weights(pair()[0], tasks[rows], prior_sd=1e3)
    assert torch.allclose(model.residual.weight[0], expected, atol=1e-4)


@pytest.mark.parametrize("inferred", [False, True])
def test_noise_becomes_what_is_left_unexplained(inferred: bool) -> None:
    model, guide = pair(inferred=inferred, noise=3.0 * NOISE)
    tasks = shared(200, inferred=inferred)
    refine(model, guide, tasks, num_steps=5, batch_size=100)
    assert model.noise.item() == pytest.approx(NOISE, rel=0.04)


def test_noise_stays_if_it_is_not_named() -> None:
    model, guide = pair(noise=3.0 * NOISE)
    before = model.noise.detach().clone()
    refine(model, guide, shared(20), num_steps=2, batch_size=10, noise=None)
    assert torch.equal(model.noise, before)


def test_a_task_that_cannot_be_read_trains_nothing() -> None:
    model, guide = pair()
    tasks = shared(20)
    values = tasks.values.clone()
    values[7] = 1e3 * torch.randn(values[7].shape).double()
    spoiled = ph.Tasks.from_trajectories(TIMES, values, num_support=1)
    with torch.no_grad():
        problem, iterate = read_batch(model, spoiled, ph.GaussNewton(2))
        kept = weight_evidence(problem, iterate, model.residual, 10.0).kept
    assert (~kept).nonzero().flatten().tolist() == [7]
    refine(model, guide, spoiled, num_steps=1, batch_size=20, prior_sd=1.0)
    assert (model.residual.weight - BEND).abs().max() < 0.1
    assert model.noise.item() == pytest.approx(NOISE, rel=0.1)


def test_a_task_that_is_explained_badly_counts_by_the_logarithm() -> None:
    model, guide = pair()
    problem, iterate = read_batch(model, shared(4), ph.GaussNewton(2))
    n = problem.num_observed
    assert torch.equal(n, torch.full_like(n, float(n[0])))
    cost = n * torch.tensor([0.5, 2.0, 2.0 * math.e, 20.0]).double()
    expected = n * torch.tensor([0.5, 2.0, 4.0, 2.0 + 2.0 * math.log(10.0)]).double()
    assert torch.allclose(misfit(problem, cost), expected)


def test_a_batch_without_any_usable_task_changes_nothing() -> None:
    model, guide = pair()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.residual.weight.fill_(torch.nan)
    costs = refine(model, guide, shared(4), num_steps=2, batch_size=4)
    assert costs == [0.0, 0.0]
    assert model.residual.weight.isnan().all()
    assert torch.equal(model.prior.raw, before["prior.raw"])
    assert model.noise.item() == pytest.approx(NOISE)


def test_outlier_factor_decides_which_tasks_are_excluded() -> None:
    model, guide = pair()
    tasks = shared(20)
    values = tasks.values.clone()
    values[7, 1:] += 3.0 * features(TIMES)[:, :1]  # its shots are of two systems
    mixed = ph.Tasks.from_trajectories(TIMES, values, num_support=1)
    with torch.no_grad():
        problem, iterate = read_batch(model, mixed, ph.GaussNewton(2))
        ratio = float(iterate.cost[7] / iterate.cost.median())

        def excluded(factor: float) -> list[int]:
            kept = weight_evidence(problem, iterate, model.residual, factor).kept
            return (~kept).nonzero().flatten().tolist()

        assert ratio > 2.0
        assert excluded(1.01 * ratio) == []
        assert 7 in excluded(0.99 * ratio)


def test_the_same_seed_gives_the_same_result_and_takes_no_random_number() -> None:
    results = []
    for _ in range(2):
        model, guide = pair()
        tasks = shared(12)
        state = torch.get_rng_state()
        model.train()
        costs = refine(model, guide, tasks, num_steps=3, batch_size=4)
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        results.append((costs, {name: x.clone() for name, x in model.state_dict().items()}))
    first, second = results
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in second[1])


# ---- weights that must stay ----------------------------------------------------------------------


def test_frozen_weights_stay_as_they_are_and_the_others_are_exact() -> None:
    class TwoParts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sine = nn.Linear(1, 1, bias=False)
            self.square = nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.sine(x[..., :1]) + self.square(x[..., 1:])

    model, guide = pair()
    model.residual = TwoParts().double()
    with torch.no_grad():
        model.residual.square.weight.fill_(BEND[0, 1])
    model.residual.square.requires_grad_(False)
    frozen = model.residual.square.weight.clone()
    refine(model, guide, shared(40), num_steps=2, batch_size=40, prior_sd=10.0)
    assert torch.equal(model.residual.square.weight, frozen)
    assert not model.residual.square.weight.requires_grad
    assert model.residual.sine.weight.item() == pytest.approx(BEND[0, 0].item(), abs=0.05)


def test_a_network_that_is_frozen_entirely_is_refused() -> None:
    model, guide = pair()
    model.residual.requires_grad_(False)
    with pytest.raises(ValueError, match="weights that are not frozen; got Linear"):
        refine(model, guide, shared(4), num_steps=1)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_weights_with_gradient_hooks_are_refused(kind: str) -> None:
    model, guide = pair()
    getattr(model.residual.weight, kind)(lambda gradient: None)
    before = model.residual.weight.detach().clone()
    message = r"weights without hooks on their gradients.*; got \['weight'\]\. Freeze entries with"
    with pytest.raises(ValueError, match=message):
        refine(model, guide, shared(4), num_steps=1)
    assert torch.equal(model.residual.weight, before)


# ---- the population ------------------------------------------------------------------------------


def test_the_population_becomes_that_of_the_tasks() -> None:
    model, guide = pair()
    with torch.no_grad():
        model.prior.raw.copy_(torch.tensor([4.0, 0.5]))  # the mean lies at 0.5 + 2 · 4
    tasks = shared(150, num_shots=4)
    refine(model, guide, tasks, num_steps=2, batch_size=50)
    mean, sd = (x.item() for x in model.prior.population().moments())
    assert mean == pytest.approx(0.5, abs=0.5)
    assert sd == pytest.approx(2.0, rel=0.2)


class Pushed(ph.HybridModel):
    """y' = -rate y + force(y; z): a known decay, and a force with a latent of its own."""

    def __init__(
        self,
        *,
        evidence: ph.GaussNewton | None = None,
        outputs: int = 1,
        linear: bool = True,
        width: int = 5,
        elsewhere: int = 0,
        noise: float = 0.05,
        **solver: Any,
    ) -> None:
        super().__init__()
        families = {"rate": LogNormal(1, loc=-0.5, scale=0.3), "z": Normal(1)}
        self.prior = ph.SupportPrior(evidence or ph.GaussNewton(3), **families)
        self.residual = ph.Residual(outputs, 1, outputs, linear, width=width)
        self.noise = PyroParam(torch.full((outputs,), noise), constraints.positive)
        self.outputs = outputs
        self.elsewhere = elsewhere
        self.solver = solver

    def forward(self, episode: ph.Episode) -> Tensor:
        p = self.prior(episode)
        shots = episode.query
        with episode.plate:
            rate = pyro.sample("rate", p["rate"])
            z = pyro.sample("z", p["z"])
            force = self.residual.given(z.unsqueeze(-2))
            offset = 0.0
            if self.elsewhere:  # the force also counts at states of no trajectory
                grid = torch.linspace(-1.0, 1.0, self.elsewhere, dtype=rate.dtype)
                offset = force(*[grid] * self.outputs)
                offset = sum(offset) if isinstance(offset, tuple) else offset
                offset = offset.mean(-1, keepdim=True)

            def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                pushes = force(*state)
                pushes = pushes if isinstance(pushes, tuple) else (pushes,)
                return tuple(
                    push + offset - rate * part for push, part in zip(pushes, state, strict=True)
                )

            states = ph.solve(field, shots.initial.unbind(-1), shots.times, **self.solver)
            x = dist.Normal(states, self.noise).mask(shots.scored)
            return pyro.sample("x", x.to_event(3), obs=shots.values)


def pushed_tasks(num_tasks: int, num_shots: int = 4, seed: int = 0) -> ph.Tasks:
    """Systems whose true force is z sin 2y."""
    generator = torch.Generator().manual_seed(seed)
    rate = torch.exp(-0.5 + 0.3 * torch.randn(num_tasks, 1, generator=generator)).double()
    z = torch.randn(num_tasks, 1, generator=generator).double()
    start = 1.5 * torch.randn(num_tasks, num_shots, generator=generator).double()
    times = torch.linspace(0.0, 2.0, 9, dtype=torch.float64)

    def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (z * torch.sin(2.0 * state[0]) - rate * state[0],)

    clean = ph.solve(field, (start,), times, substeps=4)
    noise = 0.05 * torch.randn(clean.shape, generator=generator).double()
    return ph.Tasks.from_trajectories(
        times,
        clean + noise,
        num_support=num_shots // 2,
        initial=start.unsqueeze(-1),
        true_latents={"rate": rate, "z": z},
    )


def prior_error(model: ph.HybridModel, tasks: ph.Tasks) -> float:
    """Root mean squared error of predictions from the support alone."""
    torch.manual_seed(1)
    x = ph.predict(model, tasks.episode(), 60)["x"].mean(0)
    return float((x - tasks.episode().query.values).square().mean().sqrt())


@pytest.mark.slow
def test_a_force_is_refined_until_systems_are_explained() -> None:
    tasks = pushed_tasks(48)
    model = Pushed(noise=0.3).double()
    guide = ph.AmortizedGuide(model, ph.GaussNewton(2))
    svi = ph.SVI(model, guide, torch.optim.Adam(model.parameters(), 1e-2))
    batches = tasks.batches(16, seed=0)
    for _ in range(60):
        svi.step(next(batches))
    before = prior_error(model, tasks)
    costs = refine(model, guide, tasks, num_steps=6, batch_size=24, prior_sd=1.0)
    assert len(costs) == 6
    assert model.residual.last.weight.isfinite().all()
    again = refine(model, guide, tasks, num_steps=1, batch_size=24, noise=None)
    assert again[0] == pytest.approx(1.0, abs=0.2)
    assert model.noise.item() == pytest.approx(0.05, rel=0.3)
    assert prior_error(model, tasks) < 0.8 * before


@pytest.mark.parametrize(
    "solver",
    [{"substeps": 2}, {"step": 0.1}, pytest.param({"method": "dopri5"}, marks=pytest.mark.slow)],
    ids=["substeps", "step", "dopri5"],
)
def test_predictions_from_the_support_are_no_worse_afterwards_whatever_the_solver(
    solver: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    tasks = pushed_tasks(8)
    model = Pushed(width=3, noise=0.3, evidence=ph.GaussNewton(2), **solver).double()
    guide = ph.AmortizedGuide(model, ph.GaussNewton(1))
    before = prior_error(model, tasks)
    evidence = ph.GaussNewton(1)
    costs = refine(model, guide, tasks, num_steps=2, batch_size=8, prior_sd=1.0, evidence=evidence)
    assert all(math.isfinite(cost) for cost in costs)
    assert prior_error(model, tasks) < 2.0 * before


# ---- derivatives by weight -----------------------------------------------------------------------


def forced(seed: int = 0, times: Tensor | None = None, **options: Any) -> tuple[Pushed, Place]:
    """A problem of two systems, at an iterate away from the population's mean."""
    torch.manual_seed(seed)
    model = Pushed(**options).double()
    start = torch.randn(2, 3, model.outputs, dtype=torch.float64)
    if times is None:
        times = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    values = torch.randn(2, 3, len(times), model.outputs, dtype=torch.float64)
    shots = ph.Shots.from_tensors(times, values, start)
    mean = 0.3 * torch.randn(2, 2, dtype=torch.float64)
    belief = Gaussian.around(model.prior.families, mean, 1.0)
    with torch.no_grad():
        problem = LeastSquares(model, shots, belief)
        iterate = problem.at(mean)
        return model, Place(problem, iterate, problem.roots(iterate))


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("linear", [True, False])
@torch.no_grad()
def test_derivatives_by_force_are_those_by_weight(outputs: int, linear: bool) -> None:
    model, place = forced(outputs=outputs, linear=linear, width=9)
    calls = evaluate_force(place, model.residual, None)[1]
    assert len(calls) == 4 * 4  # Runge-Kutta's four, in each of four intervals
    expected = slopes_by_weight(place, model.residual)
    by_force = slopes_by_force(place, model.residual, torch.stack(calls)[:, 0])
    assert expected.abs().max() > 1.0
    assert torch.allclose(by_force, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"width": 9, "linear": False}, slopes_by_force),
        ({"width": 1}, slopes_by_weight),
        ({"width": 9, "linear": False, "elsewhere": 3}, slopes_by_weight),
        ({"width": 9, "linear": False, "elsewhere": 4}, slopes_by_weight),
    ],
    ids=["many weights", "few weights", "at as many states as shots", "at other states"],
)
@torch.no_grad()
def test_derivatives_take_the_shorter_way_that_is_right(
    options: dict[str, Any], expected: Callable[..., Tensor]
) -> None:
    model, place = forced(**options)
    arguments = [place, model.residual]
    if expected is slopes_by_force:
        calls = evaluate_force(place, model.residual, None)[1]
        arguments.append(torch.stack(calls)[:, 0])
    chosen = weight_slopes(place.problem, place.iterate, model.residual)
    assert torch.equal(chosen, expected(*arguments))


@pytest.mark.parametrize("solver", [{"step": 0.17}, {"method": "dopri5"}], ids=["step", "dopri5"])
@torch.no_grad()
def test_derivatives_are_right_whatever_the_solver(solver: dict[str, Any]) -> None:
    model, place = forced(width=3, linear=False, **solver)
    slopes = weight_slopes(place.problem, place.iterate, model.residual)
    weight = model.residual.last.weight
    names = [name for name, _ in model.residual.named_parameters()]
    sizes = [parameter.numel() for parameter in model.residual.parameters()]
    column = sum(sizes[: names.index("last.weight")])
    step = 1e-5
    weight[0, 0] += step
    ahead = place.errors()
    weight[0, 0] -= 2.0 * step
    behind = place.errors()
    expected = (ahead - behind) / (2.0 * step)
    assert torch.allclose(slopes[:, :, column], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("regular", [True, False])
@torch.no_grad()
def test_derivatives_between_observations_are_interpolated(regular: bool) -> None:
    times = torch.linspace(0.0, 2.0, 21, dtype=torch.float64)
    if not regular:
        times = times + 0.03 * torch.sin(37.0 * times)
    model, place = forced(times=times, width=20, linear=False, substeps=3)
    calls = evaluate_force(place, model.residual, None)[1]
    knots = spread_knots(len(calls), times)
    assert knots is not None and knots.shape == (4 * 3 * 20, 21 if regular else 41)
    exact = slopes_by_force(place, model.residual, torch.stack(calls)[:, 0])
    found = slopes_by_force(place, model.residual, torch.stack(calls)[:, 0], knots)
    largest = float(exact.abs().max())
    assert float((found - exact).abs().max()) < 3e-3 * largest
    chosen = weight_slopes(place.problem, place.iterate, model.residual)
    assert torch.equal(chosen, found)


def test_interpolation_is_exact_for_cubics_and_lines() -> None:
    regular = torch.linspace(0.0, 1.0, 13)
    knots = spread_knots(4 * 2 * 12, regular)
    assert knots is not None
    stages = torch.tensor([0.0, 0.5, 0.5, 1.0]).double()
    place = ((torch.arange(24).unsqueeze(1) + stages).flatten() / 24.0).double()
    nodes = torch.linspace(0.0, 1.0, 13).double()
    for power in range(4):
        assert torch.allclose(knots @ nodes**power, place**power, atol=1e-6)
    irregular = spread_knots(4 * 2 * 12, regular**2 + regular)
    middles = torch.linspace(0.0, 1.0, 25).double()
    assert irregular is not None and torch.allclose(irregular @ middles, place, atol=1e-12)


@pytest.mark.parametrize(("num_calls", "num_times"), [(4 * 9, 10), (50, 13), (4 * 13, 13)])
def test_few_observations_and_other_solvers_are_not_interpolated(
    num_calls: int, num_times: int
) -> None:
    assert spread_knots(num_calls, torch.linspace(0.0, 1.0, num_times)) is None


@torch.no_grad()
def test_derivatives_leave_no_hook_behind() -> None:
    model, place = forced(width=9, linear=False)
    weight_slopes(place.problem, place.iterate, model.residual)
    assert not any(module._forward_hooks for module in model.modules())


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, r"expected num_steps as a whole number of 1 or more; got 0\."),
        ({"num_steps": 1.5}, r"expected num_steps as a whole number of 1 or more; got 1\.5\."),
        ({"batch_size": -1}, r"expected batch_size as a whole number of 1 or more; got -1\."),
        ({"forgetting": 1.0}, r"expected forgetting as a number in \[0, 1\); got 1\.0\."),
        ({"forgetting": -0.1}, r"expected forgetting as a number in \[0, 1\); got -0\.1\."),
        ({"forgetting": math.nan}, r"expected forgetting as a number in \[0, 1\); got nan\."),
        ({"prior_sd": 0.0}, r"expected prior_sd as a positive number; got 0\.0\."),
        ({"prior_sd": math.inf}, r"expected prior_sd as a positive number; got inf\."),
        ({"outlier_factor": 1.0}, r"expected outlier_factor as a number above 1; got 1\.0\."),
        ({"network": nn.Tanh()}, r"a network with weights that are not frozen; got Tanh"),
        ({"network": nn.Linear(100, 101)}, r"a network of up to 10000 weights; got 10201\."),
        ({"noise": "sigma"}, r"'sigma', a standard deviation of 1 sensors, or of all; got None"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    model, guide = pair()
    with without_type_checks(), pytest.raises(ValueError, match=message):
        refine(model, guide, shared(4), **{"num_steps": 1, **options})


def test_evidence_that_is_no_gauss_newton_is_refused() -> None:
    model, guide = pair()
    message = r"expected evidence=ph\.GaussNewton\(\.\.\.\); got Encoder"
    with without_type_checks(), pytest.raises(TypeError, match=message):
        refine(model, guide, shared(4), evidence=ph.Encoder(ph.SetEncoder(1, POINTS)))


def test_a_program_without_a_residual_must_name_its_network() -> None:
    model = Line(sites=SLOPE).double()
    guide = ph.AmortizedGuide(model, ph.GaussNewton(2))
    message = r"expected a network; got Line without a residual\. Pass network="
    with pytest.raises(ValueError, match=message):
        refine(model, guide, shared(4), num_steps=1)
