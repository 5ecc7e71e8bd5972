"""The literature's forced pendulum: its equation, its settings, its steps, and the published bound."""

from __future__ import annotations

import pytest
import torch
from test_systems import bound, latents, starts
from torch.testing import assert_close

import pyro_hybrid as ph
from pyro_hybrid.systems import ForcedPendulum


def test_it_obeys_its_equation() -> None:
    system = ForcedPendulum()
    z, (angle, _), t = (
        latents(system, 4),
        starts(system, 4, 3),
        torch.tensor(1.7, dtype=torch.float64),
    )
    speed = torch.randn_like(angle)
    slope, turn = system.full(z)(t, (angle, speed))
    damping, amplitude, frequency = z["unknown"].unsqueeze(1).unbind(-1)
    rate = z["omega"] ** 2
    assert torch.equal(slope, speed)
    push = amplitude * rate * torch.cos(2.0 * torch.pi * frequency * t)
    assert_close(turn + damping * speed + rate * angle.sin(), push.expand(4, 3))


def test_the_push_is_in_units_of_gravity_and_the_drag_is_not() -> None:
    system, z = ForcedPendulum(), latents(ForcedPendulum(), 4)
    state, one, none = starts(system, 4, 3), torch.ones(4, 3), torch.zeros(4, 3)

    def turn(*force: torch.Tensor) -> torch.Tensor:
        return system.known({"omega": z["omega"]}, lambda t, angle, speed: force)(
            torch.zeros(()), state
        )[1]

    assert_close(turn(none, none), -(z["omega"] ** 2) * state[0].sin())
    assert_close(turn(one, none) - turn(none, none), (z["omega"] ** 2).expand(4, 3))
    assert_close(turn(none, one) - turn(none, none), one.double())


def test_its_settings_are_the_literature_s() -> None:
    system = ForcedPendulum()
    assert system.ranges == {
        "omega": (0.785, 3.14),
        "damping": (0.0, 0.8),
        "amplitude": (0.0, 40.0),
        "frequency": (3.14, 6.28),
        "angle": (-1.57, 1.57),
    }
    assert_close(system.times, 0.05 * torch.arange(50, dtype=torch.float64))
    assert (
        system.noise == (0.01,) and system.names == ("angle",) and system.unknown[-1] == "frequency"
    )


def test_tasks_show_the_angle_alone_and_start_at_rest() -> None:
    tasks = ForcedPendulum().simulate(6, 5, seed=0)
    assert tasks.values.shape == (6, 5, 50, 1) and tasks.true_latents["unknown"].shape == (6, 3)
    assert tasks.states.shape[-1] == 2 and not tasks.states[..., 1].any()
    again = ForcedPendulum().simulate(6, 5, seed=0)
    assert torch.equal(tasks.values, again.values)


def test_simulation_steps_are_fine_enough_for_the_force() -> None:
    system = ForcedPendulum()
    z, y0 = latents(system, 60), starts(system, 60, 1)
    exact = ph.solve(system.full(z), y0, system.times, method="dopri8", rtol=1e-9, atol=1e-9)
    error = [
        float((ph.solve(system.full(z), y0, system.times, substeps=n) - exact)[..., 0].abs().max())
        / 0.01
        for n in (1, 2, system.substeps)
    ]
    assert error[0] > 0.2 and error[1] < 0.1 and error[2] < 0.01  # in units of the noise
    assert error[1] / error[2] > 12.0  # order four: 16 times


def test_the_force_is_called_with_sizes_that_the_system_says() -> None:
    system, seen = ForcedPendulum(), []
    z = latents(system, 60)
    truth = system.truth(z["unknown"][..., None, :])

    def force(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append([float(x.abs().max()) for x in inputs[1:]])
        return truth(*inputs)

    ph.solve(
        system.known({"omega": z["omega"]}, force), starts(system, 60, 1), system.times, substeps=4
    )
    for most, size in zip(torch.tensor(seen).amax(0).tolist(), system.inputs[1:], strict=True):
        assert 0.3 * size < most < 3.0 * size
    assert (
        system.inputs[0] < 0.5 / system.ranges["frequency"][1]
    )  # a fraction of the shortest period


def test_the_bound_is_that_of_finite_differences() -> None:
    system = ForcedPendulum()
    tasks = system.simulate(2, 2, seed=0)
    support = tasks.episode().support
    assert_close(
        system.cramer_rao(support, tasks.true_latents),
        bound(system, support, tasks.true_latents),
        rtol=1e-3,
        atol=0.0,
    )


def test_one_sequence_says_as_much_as_was_published() -> None:
    """MSE of omega 6e-4, correlations of 0.993, without the few systems that are all but at rest or unforced."""
    system = ForcedPendulum()
    tasks = system.simulate(400, 2, seed=0)
    bounds = (
        system.cramer_rao(tasks.episode().support, tasks.true_latents).sort(0).values[:396].mean(0)
    )
    spread = torch.tensor(
        [(high - low) ** 2 / 12.0 for high, low in map(system.ranges.get, system.unknown)]
    )
    assert 1.5e-4 < bounds[0] < 8e-4
    assert ((1.0 - bounds[1:] / spread).sqrt() > torch.tensor([0.98, 0.993, 0.999])).all()


@pytest.mark.parametrize("linear", [True, False])
def test_the_hybrid_model_runs_on_it(linear: bool) -> None:
    system = ForcedPendulum()
    model = ph.models.MetaHybridVAE(system, linear=linear, substeps=2)
    fit = ph.meta_train(
        model,
        model.guide(),
        system.simulate(4, 4, seed=0),
        num_steps=2,
        batch_size=4,
        curriculum={0.0: None},
        progress=False,
    )
    assert len(fit.loss) == 2 and all(torch.isfinite(torch.as_tensor(fit.loss)))
