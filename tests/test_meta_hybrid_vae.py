"""MetaHybridVAE: where its neural force is judged, the true one has nothing to answer for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from experiments.trained import exactly
from torch import Tensor

import pyro_hybrid as ph
from pyro_hybrid.data.segments import to_segments
from pyro_hybrid.systems.system import Force


def test_the_true_force_of_a_field_overlaps_with_the_physics_along_its_trajectory_and_not_where_it_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = ph.systems.AdvectionDiffusion()
    tasks = exactly(system, 20, 4, 0)
    model, episode = ph.models.MetaHybridVAE(system, correction=1.0), tasks.episode()
    physics, unknown = {"diffusion": tasks.true_latents["diffusion"]}, tasks.true_latents["unknown"]
    monkeypatch.setattr(
        model, "force", lambda unknown: system.truth(unknown[..., None, None, :].squeeze(-1))
    )
    along = model.objections(physics, unknown, episode.query.times, episode.query.values)
    began = model.objections(physics, unknown, *model.places(episode, episode.query.values))
    assert (began.abs() < 1e-3 * along.abs().mean()).all() and (along > 0.0).all()


@pytest.mark.parametrize("steps", [None, 2])
def test_fields_are_judged_at_their_initial_states_cut_or_not(steps: int | None) -> None:
    system = ph.systems.AdvectionDiffusion(6)
    episode = system.simulate(3, 4, 0).episode()
    model = ph.models.MetaHybridVAE(system)
    part = episode.map_shots(lambda shots: to_segments(shots, steps))
    times, places = model.places(part, part.query.values)
    assert torch.equal(places.squeeze(-2), episode.query.initial) and float(times) == 0.0


def test_others_are_judged_along_their_trajectories() -> None:
    system = ph.systems.Pendulum()
    whole = system.simulate(3, 4, 0).episode()
    episode = whole.map_shots(lambda shots: to_segments(shots, 7))
    times, places = ph.models.MetaHybridVAE(system).places(episode, episode.query.values)
    assert times is episode.query.times and places is episode.query.values


# ---- settled: what the neural force does in the physics' place counts as physics -----------------


def pushed(share: float) -> tuple[ph.models.MetaHybridVAE, ph.Tasks]:
    """A model whose neural force is the true friction and push, and so much of gravity's work besides."""
    system = ph.systems.Pendulum()
    model = ph.models.MetaHybridVAE(system).double()

    def force(unknown: Tensor) -> Force:
        true = system.truth(unknown[..., None, :])
        return lambda t, angle, speed: true(t, angle, speed) - share * angle.sin()

    model.force = force  # type: ignore[method-assign]
    return model, exactly(system, 200, 4, 0)


def trajectories(model: ph.models.MetaHybridVAE, tasks: ph.Tasks) -> Tensor:
    shots, truth = (
        tasks.shots(),
        {name: value.double() for name, value in tasks.true_latents.items()},
    )
    return model.trajectories(
        {"omega": truth["omega"]},
        truth["unknown"],
        shots.initial.double(),
        shots.times.double(),
    )


def test_once_settled_physics_latents_mean_what_they_say() -> None:
    model, tasks = pushed(0.01)
    wrong = trajectories(model, tasks)
    model.settle(tasks)
    right = trajectories(model, tasks)
    truth = tasks.values
    assert (right - truth).square().mean().sqrt() < 0.2 * (wrong - truth).square().mean().sqrt()


def test_settling_leaves_the_true_force_as_it_is() -> None:
    model, tasks = pushed(0.0)
    model.settle(tasks)
    omega = tasks.true_latents["omega"].double()
    settled = model.settled({"omega": omega}, tasks.true_latents["unknown"].double())["omega"]
    assert (settled / omega - 1.0).square().mean().sqrt() < 1e-4


def test_a_settled_model_trains_saves_and_loads_as_before(tmp_path: Path) -> None:
    system = ph.systems.Pendulum()
    tasks, model = system.simulate(8, 4, 0), ph.models.MetaHybridVAE(system)
    guide = model.guide()
    model.settle(tasks, 64)
    fit = ph.meta_train(model, guide, tasks, steps=1, batch_size=4, progress=False)
    fit.save(tmp_path / "fit", model, guide)
    other = ph.models.MetaHybridVAE(system)
    ph.load(tmp_path / "fit", other, other.guide())
    assert other.clock is None and model.samples is not None and model.samples.shape == (64, 2)


def test_fields_are_settled_where_they_began() -> None:
    system = ph.systems.AdvectionDiffusion(6)
    tasks, model = system.simulate(3, 4, 0), ph.models.MetaHybridVAE(system)
    model.settle(tasks)
    assert torch.equal(model.samples, tasks.shots().initial.flatten(0, 1))
    states = model.trajectories(
        {"diffusion": torch.full((3, 1), 0.05)},
        torch.zeros(3, 1),
        tasks.shots().initial,
        tasks.times,
    )
    assert states.shape == (3, 4, len(tasks.times), 6) and states.isfinite().all()


def test_what_was_read_before_settling_is_read_again() -> None:
    system = ph.systems.Pendulum()
    tasks, model = system.simulate(3, 4, 0), ph.models.MetaHybridVAE(system, ph.Linearised(1))
    support = tasks.episode().support
    before = model.prior.belief(support)
    model.settle(tasks, 64)
    assert not torch.equal(model.prior.belief(support).mean, before.mean)


def test_copies_that_are_the_same_are_settled_once_and_gradients_stay() -> None:
    model, tasks = pushed(0.01)
    model.settle(tasks, 64)
    omega, unknown = tasks.true_latents["omega"].double(), tasks.true_latents["unknown"].double()
    moved = torch.tensor([0.0, 0.1, 0.1, 0.0], dtype=torch.float64)[:, None, None]
    copies = (unknown + moved).requires_grad_()
    both = model.settled({"omega": omega.expand(4, -1, -1)}, copies)["omega"]
    for k in range(4):
        assert torch.allclose(
            both[k], model.settled({"omega": omega}, copies[k])["omega"], rtol=1e-12
        )
    (alone,) = torch.autograd.grad(
        model.settled({"omega": omega}, copies[2])["omega"].sum(), copies
    )
    (grad,) = torch.autograd.grad(both[2].sum(), copies)
    assert torch.allclose(grad[1:3].sum(0), alone[2], rtol=1e-9) and alone.abs().sum() > 0.0


def test_physics_latents_with_draws_are_settled_beside_neural_ones_without() -> None:
    model, tasks = pushed(0.01)
    model.settle(tasks, 64)
    omega, unknown = tasks.true_latents["omega"].double(), tasks.true_latents["unknown"].double()
    draws = torch.stack([omega, 1.1 * omega])
    both = model.settled({"omega": draws}, unknown)["omega"]
    assert all(
        torch.allclose(both[k], model.settled({"omega": draws[k]}, unknown)["omega"])
        for k in range(2)
    )


def test_no_place_at_all_is_refused() -> None:
    system = ph.systems.Pendulum()
    with pytest.raises(ValueError, match="expected 1 place or more"):
        ph.models.MetaHybridVAE(system).settle(system.simulate(3, 4, 0), 0)
