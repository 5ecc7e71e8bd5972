"""MetaHybridVAE: where its neural force is judged, the true one is not penalized; its gauge credits the physics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from experiments.trained import simulate_exactly
from torch import Tensor

import pyro_hybrid as ph
from pyro_hybrid.data.segments import to_segments
from pyro_hybrid.nets.hybrid_field import Force
from pyro_hybrid.programs.fix_gauge import fix_gauge

# ---- penalties -----------------------------------------------------------------------------------


def test_the_true_force_of_a_field_is_penalized_along_its_trajectory_and_not_where_it_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = ph.systems.AdvectionDiffusion()
    tasks = simulate_exactly(system, 20, 4, 0)
    model = ph.models.MetaHybridVAE(system, correction=1.0)
    episode = tasks.episode()
    physics, unknown = {"diffusion": tasks.true_latents["diffusion"]}, tasks.true_latents["unknown"]
    monkeypatch.setattr(
        model, "force", lambda unknown: system.truth(unknown[..., None, None, :].squeeze(-1))
    )
    along = model.penalty(physics, unknown, episode.query.times, episode.query.values)
    first = model.collocation_states(episode, episode.query.values)
    at_start = model.penalty(physics, unknown, *first)
    assert (at_start.abs() < 1e-3 * along.abs().mean()).all() and (along > 0.0).all()


@pytest.mark.parametrize("steps", [None, 2])
def test_fields_are_judged_at_their_initial_states_cut_or_not(steps: int | None) -> None:
    system = ph.systems.AdvectionDiffusion(6)
    episode = system.simulate(3, 4, 0).episode()
    model = ph.models.MetaHybridVAE(system)
    part = episode.map_shots(lambda shots: to_segments(shots, steps))
    times, fields = model.collocation_states(part, part.query.values)
    assert torch.equal(fields.squeeze(-2), episode.query.initial) and float(times) == 0.0


def test_other_systems_are_judged_along_their_trajectories() -> None:
    system = ph.systems.Pendulum()
    whole = system.simulate(3, 4, 0).episode()
    episode = whole.map_shots(lambda shots: to_segments(shots, 7))
    model = ph.models.MetaHybridVAE(system)
    times, states = model.collocation_states(episode, episode.query.values)
    assert times is episode.query.times and states is episode.query.values


# ---- gauge ---------------------------------------------------------------------------------------


def model_and_tasks(share: float) -> tuple[ph.models.MetaHybridVAE, ph.Tasks]:
    """A model whose neural force is the true friction and push, and this share of gravity's work besides."""
    system = ph.systems.Pendulum()
    model = ph.models.MetaHybridVAE(system).double()

    def force(unknown: Tensor) -> Force:
        true = system.truth(unknown[..., None, :])
        return lambda t, angle, speed: true(t, angle, speed) - share * angle.sin()

    model.force = force  # type: ignore[method-assign]
    return model, simulate_exactly(system, 200, 4, 0)


def trajectories(model: ph.models.MetaHybridVAE, tasks: ph.Tasks) -> Tensor:
    """The model's trajectories at the true latents."""
    shots = tasks.shots().double()
    truth = {name: value.double() for name, value in tasks.true_latents.items()}
    physics = {"omega": truth["omega"]}
    return model.trajectories(physics, truth["unknown"], shots.initial, shots.times)


def corrected(model: ph.models.MetaHybridVAE, omega: Tensor, unknown: Tensor) -> Tensor:
    return model.gauge(model.equations, {"omega": omega}, unknown)["omega"]


def rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def test_physics_latents_mean_what_they_say_once_the_gauge_is_fixed() -> None:
    model, tasks = model_and_tasks(0.01)
    before = trajectories(model, tasks)
    fix_gauge(model, tasks)
    after = trajectories(model, tasks)
    truth = tasks.values
    assert rms(after - truth) < 0.2 * rms(before - truth)


@pytest.mark.parametrize(("num_points", "error"), [(256, 2e-4), (1024, 1e-12)])
def test_fixing_the_gauge_leaves_the_true_force_as_it_is(num_points: int, error: float) -> None:
    model, tasks = model_and_tasks(0.0)
    fix_gauge(model, tasks, num_points)
    omega, unknown = tasks.true_latents["omega"].double(), tasks.true_latents["unknown"].double()
    assert rms(corrected(model, omega, unknown) / omega - 1.0) < error


def test_a_model_whose_gauge_is_fixed_trains_saves_and_loads_with_it(tmp_path: Path) -> None:
    system = ph.systems.Pendulum()
    tasks, model = system.simulate(8, 4, 0), ph.models.MetaHybridVAE(system)
    guide = model.guide()
    fix_gauge(model, tasks, 64)
    fit = ph.meta_train(model, guide, tasks, num_steps=1, batch_size=4, progress=False)
    fit.save(tmp_path / "fit", model, guide)
    other = ph.models.MetaHybridVAE(system)
    ph.load(tmp_path / "fit", other, other.guide())
    assert int(other.gauge.num_points) == 64
    with torch.no_grad():
        shots = tasks.shots()
        latents = {"omega": torch.ones(8, 1)}, torch.randn(8, 3)
        states = [x.trajectories(*latents, shots.initial, shots.times) for x in (model, other)]
    assert torch.equal(*states)


def test_the_gauge_of_fields_has_them_as_they_began() -> None:
    system = ph.systems.AdvectionDiffusion(6)
    tasks, model = system.simulate(3, 4, 0), ph.models.MetaHybridVAE(system)
    fix_gauge(model, tasks)
    initial = tasks.shots().initial
    assert torch.equal(model.gauge.states[: int(model.gauge.num_points)], initial.flatten(0, 1))
    states = model.trajectories(
        {"diffusion": torch.full((3, 1), 0.05)},
        torch.zeros(3, 1),
        initial,
        tasks.times,
    )
    assert states.shape == (3, 4, len(tasks.times), 6) and states.isfinite().all()


def test_a_belief_from_before_the_gauge_was_fixed_is_computed_again() -> None:
    system = ph.systems.Pendulum()
    tasks, model = system.simulate(3, 4, 0), ph.models.MetaHybridVAE(system, ph.GaussNewton(1))
    support = tasks.episode().support
    before, _ = model.prior.belief(support, model).moments()
    fix_gauge(model, tasks, 64)
    after, _ = model.prior.belief(support, model).moments()
    assert not torch.equal(after, before)


def test_equal_copies_are_corrected_once_and_gradients_stay() -> None:
    model, tasks = model_and_tasks(0.01)
    fix_gauge(model, tasks, 64)
    omega, unknown = tasks.true_latents["omega"].double(), tasks.true_latents["unknown"].double()
    moves = torch.tensor([0.0, 0.1, 0.1, 0.0], dtype=torch.float64)[:, None, None]
    copies = (unknown + moves).requires_grad_()
    together = corrected(model, omega.expand(4, -1, -1), copies)
    for k in range(4):
        assert torch.allclose(together[k], corrected(model, omega, copies[k]), rtol=1e-12)
    (alone,) = torch.autograd.grad(corrected(model, omega, copies[2]).sum(), copies)
    (grad,) = torch.autograd.grad(together[2].sum(), copies)
    assert torch.allclose(grad[1:3].sum(0), alone[2], rtol=1e-9) and alone.abs().sum() > 0.0


def test_draws_of_physics_latents_are_corrected_beside_neural_ones_without() -> None:
    model, tasks = model_and_tasks(0.01)
    fix_gauge(model, tasks, 64)
    omega, unknown = tasks.true_latents["omega"].double(), tasks.true_latents["unknown"].double()
    draws = torch.stack([omega, 1.1 * omega])
    together = corrected(model, draws, unknown)
    for k in range(2):
        assert torch.allclose(together[k], corrected(model, draws[k], unknown))
