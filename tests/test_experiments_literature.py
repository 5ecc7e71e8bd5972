"""The literature's pendulum: a tiny run from end to end, and what its model and its reading promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import literature
from experiments.forced_pendulum_model import Driven, FromBeginnings
from experiments.literature import PUBLISHED
from experiments.run import Choice, carry_out
from matplotlib.figure import Figure
from test_systems import latents
from torch import Tensor
from torch.testing import assert_close

import pyro_hybrid as ph
from pyro_hybrid.systems import ForcedPendulum


def told(units: int = 1) -> Driven:
    """A model whose weights are the true ones: latents are damping, amplitude / 20 and frequency, as they are."""
    model = Driven(ForcedPendulum(), units=units, substeps=2)
    with torch.no_grad():
        for weight in (*model.push.parameters(), *model.residual.parameters()):
            weight.zero_()
        model.push.amplitude.weight[0, 1] = 1.0
        model.push.frequency.weight[0, 2] = 2.0 * torch.pi * model.system.step
        model.push.phase[0] = 0.5 * torch.pi
        model.residual.straight[1, 1] = -10.0 / 3.0  # damping times speed / (10 / 3)
        model.noise = torch.tensor([0.01])
        model.prior.raw.copy_(
            torch.tensor([[0.0, 0.0], [0.4, -1.5], [1.0, -0.5], [4.7, -0.1]]).flatten()
        )
    return model


def in_its_units(unknown: Tensor) -> Tensor:
    return unknown / torch.tensor([1.0, 20.0, 1.0])


def test_the_model_contains_the_truth() -> None:
    system, model, z = ForcedPendulum(), told(), latents(ForcedPendulum(), 4)["unknown"].float()
    t, angle, speed = torch.tensor(1.3), torch.randn(4, 3), torch.randn(4, 3)
    push, drag = model.force(in_its_units(z))(t, angle, speed)
    true_push, true_drag = system.truth(z[:, None, :])(t, angle, speed)
    assert_close(push.expand(4, 3), true_push.expand(4, 3), rtol=1e-4, atol=1e-3)
    assert_close(drag, true_drag)


def test_friction_is_linear_in_the_latents() -> None:
    torch.manual_seed(0)
    model, state, z = Driven(ForcedPendulum(), latents=4), torch.randn(2, 1, 5), torch.randn(2, 4)

    def friction(latents: Tensor) -> Tensor:
        return model.force(latents)(torch.tensor(0.0), *state)[1]

    none = torch.zeros_like(z)
    assert_close(friction(z) - friction(none), friction(none) - friction(-z))
    assert not torch.equal(friction(z), friction(none))


def test_a_push_is_blind_to_the_state_and_friction_to_time() -> None:
    torch.manual_seed(0)
    model = Driven(ForcedPendulum(), units=3, latents=4)
    force = model.force(torch.randn(2, 4))
    one, other = torch.randn(2, 2, 5), torch.randn(2, 2, 5)
    early, late = torch.tensor(0.1), torch.tensor(2.0)
    assert torch.equal(*(force(early, *state)[0].expand(2, 5) for state in (one, other)))
    assert torch.equal(*(force(t, *one)[1] for t in (early, late)))
    assert not torch.equal(*(force(t, *one)[0] for t in (early, late)))


def test_friction_that_does_gravity_s_work_is_penalized_and_a_push_never() -> None:
    model = told()
    model.penalty_weights["projection"] = 2.0
    states = torch.stack([3.0 * torch.rand(2, 4, 50) - 1.5, torch.randn(2, 4, 50)], -1)
    z = torch.tensor([[0.0, 1.0, 5.0]]).expand(2, 3)

    def penalty() -> Tensor:
        return model.penalty({"omega": torch.ones(2, 1)}, z, model.system.times.float(), states)

    assert not penalty().any()
    with torch.no_grad():
        model.residual.straight[0, 0] = 0.5  # of angle / 0.5: v = angle
    angle = states[..., 0].flatten(1)
    expected = 2.0 * (angle * angle.sin()).mean(1).square() / angle.sin().square().mean(1)
    assert_close(penalty(), expected, rtol=0.05, atol=0.0)


def test_reading_from_the_beginning_on_finds_what_reading_it_all_at_once_does_not() -> None:
    model, tasks = told(), ForcedPendulum().simulate(20, 4, seed=1, num_support=2)
    found: dict[str, Tensor] = {}
    encoder = model.prior.evidence
    horizons = (4, 4, 4, 4, 6, 6, 9, 9, 14, 14, 24, 24)
    for name, evidence in (
        ("grown", FromBeginnings(horizons, ph.GaussNewton(3))),
        ("at once", ph.GaussNewton(12)),
    ):
        model.prior.evidence = encoder.then(evidence)
        belief = model.prior.belief(tasks.episode().support, model)
        found[name] = belief.distributions()["unknown"].mean[:, 2]
    true = tasks.true_latents["unknown"][:, 2]
    missed = {name: ((value - true).abs() > 0.1).float().mean() for name, value in found.items()}
    assert missed["grown"] <= 0.1 < 0.3 < missed["at once"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("literature")
    return carry_out(literature, Choice(seeds=(0,), fast=True, folder=folder))


@pytest.mark.slow
def test_a_tiny_run_says_all_that_the_table_shows(results: list[dict[str, Any]]) -> None:
    assert [one["seed"] for one in results] == [0]
    for one in results:
        assert list(one["by_shots"]) == ["2", "1"]
        for found in one["by_shots"].values():
            assert (
                0.0 <= found["strong"] <= 1.0
                and len(found["linear_r"]) == 4
                and found["cramer_rao"] > 0.0
            )
    text = literature.table(results).splitlines()
    assert len(text) == 2 + 2 + len(PUBLISHED)
    assert "0.171" in text[4] and "0.057" in text[4] and "0.141" in text[5]


def test_the_figure_is_made_from_results_alone(results: list[dict[str, Any]]) -> None:
    drawn = literature.figure(results)
    assert isinstance(drawn, Figure) and len(drawn.axes) == 3
