"""APHYNITY: what is penalised, when λ grows, and that the neural force takes up what is missing and no more."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro import poutine
from torch import Tensor
from toys import with_query

import pyro_hybrid as ph
from pyro_hybrid.models import APHYNITY, OriginalAPHYNITY
from pyro_hybrid.models.aphynity import squared_norm
from pyro_hybrid.programs.module import local_parameters

SHORT: dict[str, Any] = {"num_steps": 6, "batch_size": 4, "eval_every": 3, "progress": False}
SYSTEMS = {
    "pendulum": ph.systems.Pendulum,
    "double pendulum": ph.systems.DoublePendulum,
    "rod": lambda: ph.systems.AdvectionDiffusion(6),
}


class Swing(ph.systems.Pendulum):
    """A pendulum with friction, which nobody pushes and everybody sees clearly."""

    periodic = False

    def __init__(self, damping: float) -> None:
        super().__init__()
        self.points, self.noise = 13, (0.0, 0.0)
        self.ranges = {
            **super().ranges,
            "damping": (damping,) * 2,
            "amplitude": (0.0, 0.0),
            "omega": (1.5, 1.5),
        }


def small(name: str = "pendulum", points: int = 6) -> Any:
    system = SYSTEMS[name]()
    system.points = points
    return system


def pair(**options: Any) -> tuple[APHYNITY, ph.AmortizedGuide]:
    torch.manual_seed(0)
    model = APHYNITY(small(), **{"width": 4, **options})
    return model, model.guide()


def episode(shots: int = 4, num_support: int = 2) -> ph.Episode:
    return small().simulate(5, shots, seed=0, num_support=num_support).episode()


def loss_of(
    model: APHYNITY | OriginalAPHYNITY, guide: Any, data: ph.Episode, seed: int = 0
) -> Tensor:
    torch.manual_seed(seed)
    svi = ph.SVI(model, guide, torch.optim.SGD(model.parameters(), lr=0.0))
    with local_parameters():
        return svi.differentiable_loss(model, guide, replace(data, is_training=model.training))


def error_of(model: APHYNITY, guide: Any, data: ph.Episode) -> float:
    """L of the run that ``loss_of`` makes with the same seed, from its trace."""
    torch.manual_seed(0)
    with local_parameters(), torch.no_grad():
        run = poutine.trace(poutine.replay(model, poutine.trace(guide).get_trace(data))).get_trace(
            data
        )
    x = run.nodes["x"]["fn"].base_dist.base_dist
    counts = data.query.scored
    return float(
        x.scale.square().mean() * ((data.query.values - x.mean) / x.scale).square()[counts].mean()
    )


def norm_of(
    system: Any, physics: dict[str, Tensor], force: Any, times: Tensor, states: Tensor
) -> Tensor:
    """The squared norm of a force that has no latents."""
    equations = ph.HybridField(system.known, lambda _: force, grid=system.grid)
    return squared_norm(equations, physics, torch.zeros(1, 1), times, states)


# ---- the program ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "linear"), [*((name, True) for name in SYSTEMS), ("pendulum", False)]
)
def test_a_model_that_reads_sets_keeps_every_contract(name: str, linear: bool) -> None:
    system = small(name)
    model = APHYNITY(system, width=4, linear=linear)
    lines = ph.check_hybrid_model(model, model.guide(), system.simulate(2, 4, seed=0).episode())
    assert len(lines) == 25 and not any("not checked" in line for line in lines)


def test_a_model_that_reads_one_trajectory_keeps_every_contract_but_the_order_of_several() -> None:
    system = small()
    model = APHYNITY(system, width=4)
    lines = ph.check_hybrid_model(
        model, model.guide(), system.simulate(2, 4, seed=0, num_support=3).episode()
    )
    assert [line.split(":")[0] for line in lines if "not checked" in line] == ["query order"]


def test_as_published_it_trains_on_segments_of_one_trajectory() -> None:
    model, guide = pair()
    tasks = replace(small().simulate(8, 4, seed=0), num_support=3)
    fit = ph.meta_train(
        model, guide, tasks, **SHORT, curriculum={0.0: 2, 0.5: None}, segments_per_shot=1
    )
    assert fit.skipped == 0 and model.constraint.weight > 1.0


@pytest.mark.parametrize("num_support", [1, 2])
def test_the_guide_reads_a_support_as_if_it_were_the_query(num_support: int) -> None:
    (model, guide), given = pair(), episode(num_support=num_support).support
    assert given is not None
    samples = ph.draws(model, guide, ph.Episode(None, given), 7)
    assert samples["omega"].shape == (7, 5, 1) and samples["unknown"].shape == (7, 5, 3)
    assert not torch.allclose(samples["omega"].mean(0)[0], samples["omega"].mean(0)[1])


@pytest.mark.parametrize(("weight", "growth"), [(0.0, 1.0), (1.0, -1.0)])
def test_a_constraint_that_could_not_hold_is_refused(weight: float, growth: float) -> None:
    with pytest.raises(ValueError, match="expected a positive weight and a growth of 0 or more"):
        APHYNITY(small(), weight=weight, growth=growth)


def test_a_penalty_without_observations_is_refused() -> None:
    model, _ = pair()
    data = episode().simulation()
    with pytest.raises(ValueError, match="expected a query with values; got none"):
        model.constraint(torch.ones(5), torch.zeros(5, 2, 6, 2), model.noise, data)


# ---- the penalty ---------------------------------------------------------------------------------


def test_the_penalty_is_the_squared_neural_force_at_the_states_of_the_trajectory() -> None:
    model, _ = pair()
    data = episode()
    states, unknown = torch.randn(5, 2, 6, 2), torch.randn(5, 3)
    force = model.force(unknown)
    physics = {"omega": torch.rand(5, 1)}
    expected = torch.stack(
        [
            torch.stack(
                [
                    force(t, states[:, :, k, 0], states[:, :, k, 1]).square()
                    for k, t in enumerate(data.query.times)
                ],
                -1,
            )
        ]
    ).mean((0, 2, 3))
    assert torch.allclose(norm_of(model.system, physics, force, data.query.times, states), expected)


def test_a_torque_counts_by_the_acceleration_that_it_causes() -> None:
    system, states = ph.systems.DoublePendulum(), torch.zeros(1, 1, 2, 4)  # hanging down, at rest
    physics = {"gravity": torch.ones(1, 1), "ratio": torch.ones(1, 1)}

    def torque(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(inputs[0]), torch.zeros_like(inputs[0])

    norm = norm_of(system, physics, torque, torch.arange(2.0), states)
    assert torch.allclose(norm, torch.tensor([2.0]))  # (2 1; 1 1) a = (1, 0) has a = (1, -1)


def test_segments_with_clocks_of_their_own_are_penalised_at_their_own_times() -> None:
    system, states = small(), torch.randn(5, 2, 5, 2)
    times = torch.arange(5.0)
    clocks = torch.stack([times, times + 5.0])

    def force(t: Tensor, angle: Tensor, speed: Tensor) -> Tensor:
        return t + 0.0 * angle

    norm = norm_of(system, {"omega": torch.ones(5, 1)}, force, clocks, states)
    assert torch.allclose(norm, clocks.square().mean().expand(5), rtol=1e-4)


def test_the_penalty_of_no_residual_is_nothing() -> None:
    model, guide = pair()
    for parameter in (*model.residual.last.parameters(), model.residual.straight):
        parameter.data.zero_()
    data = episode()
    trained = loss_of(model, guide, data)
    model.eval()
    assert torch.equal(trained, loss_of(model, guide, data))


def test_the_objective_is_the_published_one_times_half_the_observations_over_lambda() -> None:
    system = small()
    model = OriginalAPHYNITY(system, weight=3.0, width=4)
    data = system.simulate(1, 4, seed=0, num_support=1).episode()
    states = model.trajectories(data)
    norm = model.squared_norm(data.query.times, states)
    n = 3 * 5 * 2  # what is measured at the first time is where trajectories begin
    mean_square = (states - data.query.values).square()[:, :, 1:].mean()
    published = 3.0 * mean_square + norm.sum()
    constant = 0.5 * n * torch.log(torch.tensor(2.0 * torch.pi))
    assert torch.allclose(
        loss_of(model, model.guide(), data) - constant, n / 6.0 * published, rtol=1e-4
    )


# ---- λ -------------------------------------------------------------------------------------------


def still_svi(model: APHYNITY, guide: Any) -> ph.SVI:
    """An SVI whose steps change no parameter."""
    return ph.SVI(model, guide, torch.optim.SGD(model.parameters(), lr=0.0))


def test_every_training_step_raises_lambda_once_by_growth_times_the_reconstruction_error() -> None:
    model, guide = pair(weight=2.0, growth=0.7)
    data = episode()
    error = error_of(model, guide, data)
    svi = still_svi(model, guide)
    for number in range(1, 4):
        torch.manual_seed(0)
        svi.step(data)
        expected = 2.0 + number * 0.7 * error
        assert float(model.constraint.weight) == pytest.approx(expected, rel=1e-6)


def test_a_gradient_is_that_of_the_weight_before_it_grew() -> None:
    gradients = []
    for growth in (0.0, 100.0):
        model, guide = pair(growth=growth)
        model.double(), guide.double()
        loss_of(model, guide, episode().double()).backward()
        gradients.append(model.residual.straight.grad)
    assert torch.equal(*gradients)


def test_lambda_of_the_original_grows_by_exactly_the_mean_squared_error() -> None:
    system = small()
    model = OriginalAPHYNITY(system, weight=1.0, growth=0.25, width=4).double()
    data = system.simulate(1, 4, seed=0, num_support=1).episode().double()
    with torch.no_grad():
        squares = (model.trajectories(data) - data.query.values).square()[:, :, 1:]
    loss_of(model, model.guide(), data).backward()
    assert float(model.constraint.weight) == pytest.approx(
        1.0 + 0.25 * float(squares.mean()), rel=1e-14
    )


def test_lambda_stays_where_nothing_is_trained() -> None:
    model, guide = pair()
    data, svi = episode(), still_svi(model, guide)
    svi.evaluate_loss(data), svi.evaluate_loss(replace(data, is_training=True))
    svi.differentiable_loss(model, guide, data).backward()
    ph.predict(model, data, 2), ph.draws(model, guide, data, 2)
    model(replace(data, is_training=True).simulation())
    model.eval()
    svi.step(data)
    assert float(model.constraint.weight) == 1.0


def test_lambda_ignores_a_run_that_is_not_finite() -> None:
    system = small()
    model, data = (
        OriginalAPHYNITY(system, width=4),
        system.simulate(1, 4, seed=0, num_support=1).episode(),
    )
    loss = loss_of(
        model, model.guide(), with_query(data, values=torch.full_like(data.query.values, torch.inf))
    )
    loss.backward()
    assert not loss.isfinite() and float(model.constraint.weight) == 1.0


def test_held_out_looks_do_not_change_a_training() -> None:
    tasks = small().simulate(8, 4, seed=0)
    weights = []
    for held_out in (None, tasks[:3]):
        model, guide = pair()
        ph.meta_train(model, guide, tasks, **SHORT, held_out=held_out)
        weights.append(float(model.constraint.weight))
    assert weights[0] == weights[1] > 1.0


def test_a_resumed_training_has_the_same_lambda_bit_for_bit(tmp_path: Path) -> None:
    tasks = small().simulate(8, 4, seed=0)
    whole, begun, resumed = pair(), pair(), pair()
    ph.meta_train(*whole, tasks, **SHORT)

    def stop(step: int, fit: ph.Fit) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ph.meta_train(*begun, tasks, **SHORT, checkpoint=tmp_path, callback=stop)
    assert not torch.equal(begun[0].constraint.weight, whole[0].constraint.weight)
    ph.meta_train(*resumed, tasks, **SHORT, checkpoint=tmp_path, resume=True)
    for one, other in zip(whole, resumed, strict=True):
        after = other.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in one.state_dict().items())


def test_lambda_is_saved_and_loaded(tmp_path: Path) -> None:
    model, guide = pair()
    ph.meta_train(model, guide, small().simulate(8, 4, seed=0), **SHORT).save(
        tmp_path / "fit", model, guide
    )
    other = pair()
    ph.load(tmp_path / "fit", *other)
    assert (
        torch.equal(other[0].constraint.weight, model.constraint.weight)
        and model.constraint.weight > 1.0
    )
    assert torch.equal(copy.deepcopy(model).constraint.weight, model.constraint.weight)


# ---- what it is for ------------------------------------------------------------------------------


def trained(damping: float, weight: float) -> tuple[OriginalAPHYNITY, Tensor, Tensor]:
    """After a short training at a weight that lasts: the program, and its force beside the true one at other states."""
    system = Swing(damping)
    torch.manual_seed(0)
    model = OriginalAPHYNITY(system, weight=weight, width=8, depth=1)
    ph.meta_train(
        model,
        model.guide(),
        system.simulate(1, 13, seed=0, num_support=1),
        num_steps=150,
        batch_size=1,
        learning_rate=3e-2,
        curriculum={0.0: 3},
        progress=False,
    )
    angle, speed = system.simulate(1, 9, seed=1, num_support=1).episode().query.values.unbind(-1)
    with torch.no_grad(), local_parameters():
        return model, model.force()(torch.tensor(1.0), angle, speed), -damping * speed


@pytest.mark.slow
def test_nothing_is_left_to_the_neural_force_where_the_equations_are_complete() -> None:
    model, force, _ = trained(0.0, 100.0)
    assert force.square().mean().sqrt() < 0.02
    assert float(model.omega) == pytest.approx(1.5, rel=0.01)


@pytest.mark.slow
def test_the_neural_force_is_the_friction_that_the_equations_lack() -> None:
    model, force, true = trained(0.3, 1000.0)
    assert (force - true).square().mean() < 0.05 * true.square().mean()
    assert float(model.omega) == pytest.approx(1.5, rel=0.04)
