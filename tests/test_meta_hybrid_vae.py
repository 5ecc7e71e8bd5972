"""MetaHybridVAE: where its neural force is judged, the true one has nothing to answer for."""

from __future__ import annotations

import pytest
import torch

import pyro_hybrid as ph
from pyro_hybrid.experiments.trained import exactly


def test_the_true_force_of_a_field_overlaps_with_the_physics_along_its_trajectory_and_not_where_it_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = ph.systems.AdvectionDiffusion()
    tasks = exactly(system, 20, 4, 0)
    model, episode = ph.models.MetaHybridVAE(system, correction=1.0), tasks.episode()
    physics, unknown = {"diffusion": tasks.truth["diffusion"]}, tasks.truth["unknown"]
    monkeypatch.setattr(model, "force", lambda unknown: system.truth(unknown[..., None, None, :].squeeze(-1)))
    along = model.objections(physics, unknown, episode.times, episode.query)
    began = model.objections(physics, unknown, *model.places(episode, episode.query))
    assert (began.abs() < 1e-3 * along.abs().mean()).all() and (along > 0.0).all()


@pytest.mark.parametrize("steps", [None, 2])
def test_fields_are_judged_at_their_initial_states_cut_or_not(steps: int | None) -> None:
    system = ph.systems.AdvectionDiffusion(6)
    episode = system.simulate(3, 4, 0).episode()
    model, states = ph.models.MetaHybridVAE(system), episode.cut(steps).query
    times, places = model.places(episode.cut(steps), states)
    assert torch.equal(places.squeeze(-2), episode.measured) and float(times) == 0.0


def test_others_are_judged_along_their_trajectories() -> None:
    system = ph.systems.Pendulum()
    episode = system.simulate(3, 4, 0).episode().cut(7)
    times, places = ph.models.MetaHybridVAE(system).places(episode, episode.query)
    assert times is episode.times and places is episode.query
