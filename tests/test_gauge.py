"""Gauge and penalties of a program that a user wrote, without any System."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor, nn

import pyro_hybrid as ph
from pyro_hybrid.nets.hybrid_field import CollocationPoints
from pyro_hybrid.programs.fix_gauge import fix_gauge

NUM_TIMES = 15
OMEGA = 2.0


class Spring(ph.HybridModel):
    """θ'' = -ω² sin θ + f(θ, θ'; z), with a gauge."""

    def __init__(self) -> None:
        super().__init__()
        encoder = ph.SetEncoder(2, NUM_TIMES, 8)
        self.prior = ph.SupportPrior(
            encoder, omega=ph.families.LogNormal(1, loc=0.7, scale=0.2), z=ph.families.Normal(1)
        )
        self.residual = ph.Residual(inputs=2, latents=1, outputs=1, linear=True, width=4)
        self.gauge = ph.Gauge(components=2)
        self.noise = PyroParam(torch.tensor(0.1), constraints.positive)

    @property
    def equations(self) -> ph.HybridField:
        return ph.HybridField(self.known, self.force)

    def known(self, physics: Any, force: Any) -> Any:
        rate = physics["omega"] ** 2

        def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            angle, speed = state
            return speed, force(angle, speed) - rate * angle.sin()

        return field

    def force(self, z: Tensor) -> Any:
        return self.residual.given(z[..., None, :])

    def forward(self, episode: ph.Episode) -> Tensor:
        p = self.prior(episode)
        equations = self.equations
        with episode.plate:
            physics = {"omega": pyro.sample("omega", p["omega"])[..., None, 0]}
            z = pyro.sample("z", p["z"])
            start = pyro.sample(
                "start", dist.Normal(episode.query.measured_initial, 0.1).to_event(2)
            )
            field = equations(self.gauge(equations, physics, z), z)
            states = ph.solve(field, start.unbind(-1), episode.query.times)
            x = dist.Normal(states, self.noise).mask(episode.query.scored)
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)


class Gravity(Spring):
    """The same; its neural force is this share of gravity's and nothing else."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def force(self, z: Tensor) -> Any:
        return lambda angle, speed: -self.share * angle.sin() + 0.0 * z


class Rod(ph.HybridModel):
    """Diffusion on a rod whose neural force is this share of it."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.prior = ph.UnconditionalPrior(
            rate=ph.families.LogNormal(1, loc=-1.0, scale=0.2), z=ph.families.Normal(1)
        )
        self.share = share
        self.gauge = ph.Gauge(components=6, grid=True)

    @property
    def equations(self) -> ph.HybridField:
        return ph.HybridField(self.known, self.force, grid=True)

    def known(self, physics: Any, force: Any) -> Any:
        rate = physics["rate"].unsqueeze(-1)

        def field(t: Tensor, y: Tensor) -> Tensor:
            bend = y[..., 2:] - 2.0 * y[..., 1:-1] + y[..., :-2]
            return nn.functional.pad(rate * bend + force(bend), (1, 1))

        return field

    def force(self, z: Tensor) -> Any:
        return lambda bend: self.share * bend + 0.0 * z.unsqueeze(-1)

    def forward(self, episode: ph.Episode) -> Tensor:
        p = self.prior(episode)
        equations = self.equations
        with episode.plate:
            physics = {"rate": pyro.sample("rate", p["rate"])[..., None, 0]}
            z = pyro.sample("z", p["z"])
            field = equations(self.gauge(equations, physics, z), z)
            states = ph.solve(field, episode.query.measured_initial, episode.query.times)
            x = dist.Normal(states, 0.1).mask(episode.query.scored)
            return pyro.sample("x", x.to_event(3), obs=episode.query.values)


def make_tasks(num_tasks: int = 6, num_shots: int = 4) -> ph.Tasks:
    """Free swings of a pendulum, seen without noise."""
    times = 0.1 * torch.arange(float(NUM_TIMES))
    start = torch.rand(num_tasks, num_shots) - 0.5, torch.rand(num_tasks, num_shots) - 0.5
    values = ph.solve(lambda t, y: (y[1], -(OMEGA**2) * y[0].sin()), start, times, substeps=4)
    return ph.Tasks.from_trajectories(times, values, num_support=2)


def field_tasks() -> ph.Tasks:
    values = torch.rand(3, 4, 5, 6)
    return ph.Tasks.from_trajectories(
        0.1 * torch.arange(5.0), values, num_support=2, initial=values[:, :, 0]
    )


def states_at(model: Spring, omega: Tensor, z: Tensor, tasks: ph.Tasks) -> Tensor:
    """The program's trajectories at given latents."""
    shots = tasks.shots()
    values = {"omega": omega, "z": z, "start": shots.measured_initial}
    with torch.no_grad():
        conditioned = pyro.condition(model, values)
        trace = pyro.poutine.trace(conditioned).get_trace(ph.Episode(None, shots))
    return trace.nodes["x"]["fn"].base_dist.base_dist.loc


# ---- the gauge -----------------------------------------------------------------------------------


def test_a_gauge_changes_nothing_until_it_is_fixed() -> None:
    model = Spring()
    physics = {"omega": torch.rand(3, 1)}
    assert torch.equal(
        model.gauge(model.equations, physics, torch.randn(3, 1))["omega"], physics["omega"]
    )


@pytest.mark.parametrize("share", [0.04, -0.04])
def test_the_gauge_of_a_user_s_program_gives_the_physics_what_the_force_did(share: float) -> None:
    tasks, model = make_tasks(), Gravity(share)
    omega = torch.full((6, 1), OMEGA)
    truth = tasks.values
    wrong = states_at(model, omega, torch.zeros(6, 1), tasks)
    fix_gauge(model, tasks)
    right = states_at(model, omega, torch.zeros(6, 1), tasks)
    assert (right - truth).abs().max() < 0.05 * (wrong - truth).abs().max()
    corrected = model.gauge(model.equations, {"omega": omega}, torch.zeros(6, 1))["omega"]
    expected = OMEGA - share / (2.0 * OMEGA)  # (ω - c)² + share = ω² to first order
    assert torch.allclose(corrected, torch.full((6, 1), expected), atol=1e-4)


def test_the_gauge_of_a_field_gives_the_physics_what_the_force_did() -> None:
    model = Rod(0.05)
    fix_gauge(model, field_tasks())
    rate = torch.tensor([[0.3], [0.5]])
    corrected = model.gauge(model.equations, {"rate": rate}, torch.zeros(2, 1))["rate"]
    assert torch.allclose(corrected, rate - 0.05, atol=1e-5)


@pytest.mark.slow
def test_a_fixed_gauge_keeps_every_contract_and_the_state_s_names() -> None:
    tasks, model = make_tasks(2), Spring()
    guide = ph.AmortizedGuide(model, ph.SetEncoder(2, NUM_TIMES, 8))
    names = list(model.state_dict())
    before = ph.check_hybrid_model(model, guide, tasks.episode())
    fix_gauge(model, tasks, 32)
    assert ph.check_hybrid_model(model, guide, tasks.episode()) == before
    assert list(model.state_dict()) == names and "gauge.states" in names


def test_a_model_saved_with_its_gauge_predicts_the_same_in_a_new_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tasks, model = make_tasks(), Spring()
    guide = ph.AmortizedGuide(model, ph.SetEncoder(2, NUM_TIMES, 8))
    fit = ph.meta_train(model, guide, tasks, num_steps=1, batch_size=4, progress=False)
    fix_gauge(model, tasks, 64)
    fit.save(tmp_path / "fit", model, guide)
    latents = torch.full((6, 1), 2.0), torch.randn(6, 1)
    torch.save([*latents, tasks.times, tasks.values], tmp_path / "data.pt")
    code = (
        "import sys, torch, pyro_hybrid as ph; from test_gauge import Spring, states_at, NUM_TIMES\n"
        "omega, z, times, values = torch.load(sys.argv[1] + '/data.pt')\n"
        "model = Spring()\n"
        "guide = ph.AmortizedGuide(model, ph.SetEncoder(2, NUM_TIMES, 8))\n"
        "ph.load(sys.argv[1] + '/fit', model, guide)\n"
        "tasks = ph.Tasks.from_trajectories(times, values, num_support=2)\n"
        "torch.save(states_at(model, omega, z, tasks), sys.argv[1] + '/states.pt')\n"
    )
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,  # guards against hanging only
        cwd=here,
    )
    assert run.returncode == 0, run.stderr
    states = states_at(model, *latents, tasks)
    assert torch.equal(torch.load(tmp_path / "states.pt"), states)
    model.gauge.clear()
    assert not torch.allclose(states_at(model, *latents, tasks), states, atol=1e-6)


def test_fixing_a_gauge_again_gives_the_same_points() -> None:
    tasks, model = make_tasks(), Gravity(0.04)
    fix_gauge(model, tasks)
    states = model.gauge.states.clone()
    fix_gauge(model, tasks)
    assert torch.equal(model.gauge.states, states)


def test_points_fill_the_middle_of_what_trajectories_visit() -> None:
    tasks, model = make_tasks(), Gravity(0.0)
    fix_gauge(model, tasks)
    visited = states_at(
        model,
        model.prior.population().distributions()["omega"].mean.expand(6, -1),
        torch.zeros(6, 1),
        tasks,
    )
    # The outermost of nine nodes lie at 4% and 96% of the middle nine tenths.
    low, high = torch.quantile(visited.flatten(0, -2), torch.tensor([0.09, 0.91]), 0)
    count = int(model.gauge.num_points)
    times, states = model.gauge.times[:count], model.gauge.states[:count]
    assert count == 9**3 <= len(model.gauge.states) == 1024
    assert torch.allclose(states.amin(0), low, atol=0.02)
    assert torch.allclose(states.amax(0), high, atol=0.02)
    assert 0.07 <= float(times.min()) and float(times.max()) <= 1.33


@pytest.mark.parametrize(
    ("num_points", "placed"), [(1, 1), (60, 60), (300, 300), (728, 728), (729, 729), (1024, 729)]
)
def test_no_more_points_are_placed_than_were_asked_for(num_points: int, placed: int) -> None:
    tasks, model = make_tasks(), Gravity(0.0)
    fix_gauge(model, tasks, num_points)
    points = torch.cat([model.gauge.times.unsqueeze(-1), model.gauge.states], -1)[:placed]
    assert int(model.gauge.num_points) == placed
    assert len(points.unique(dim=0)) == placed


@pytest.mark.parametrize("by_shot", [False, True])
def test_padding_changes_no_point_of_a_gauge(by_shot: bool) -> None:
    tasks, num_real = make_tasks(), 10
    shape = tasks.values.shape[:2] if by_shot else tasks.values.shape[1:2]
    times = tasks.times.expand(*shape, -1)
    whole = ph.Tasks.from_trajectories(
        times[..., :num_real], tasks.values[:, :, :num_real], num_support=2
    )
    padded_times = times.clone()
    padded_times[..., num_real:] += 1.0
    observed = torch.ones_like(tasks.values, dtype=torch.bool)
    observed[:, :, num_real:] = False
    padded = ph.Tasks.from_trajectories(
        padded_times, tasks.values, num_support=2, observed=observed
    )
    one, other = Gravity(0.0), Gravity(0.0)
    fix_gauge(one, whole)
    fix_gauge(other, padded)
    assert torch.allclose(other.gauge.times, one.gauge.times)
    assert torch.allclose(other.gauge.states, one.gauge.states)


def test_points_of_a_gauge_are_within_each_trajectory_s_own_length() -> None:
    tasks = make_tasks()
    observed = torch.ones_like(tasks.values, dtype=torch.bool)
    observed[:, 1:, 3:] = False
    observed[:, 0, -2] = False  # a gap is no padding
    times = tasks.times.expand(4, -1) + torch.tensor([0.0, 5.0, 5.0, 5.0]).unsqueeze(-1)
    padded = ph.Tasks.from_trajectories(times, tasks.values, num_support=2, observed=observed)
    model = Gravity(0.0)
    fix_gauge(model, padded)
    assert float(model.gauge.times.max()) <= 5.2
    assert float(model.gauge.times.max()) > 4.6


def test_fixing_a_gauge_draws_nothing_and_leaves_no_gradient() -> None:
    tasks, model = make_tasks(), Spring()
    state = torch.get_rng_state()
    fix_gauge(model, tasks, 64)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.gauge.states.requires_grad


def test_a_gauge_that_could_not_be_fixed_stays_as_it_was() -> None:
    tasks, model = make_tasks(), Gravity(0.04)
    fix_gauge(model, tasks, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.share = torch.nan
    with pytest.raises(
        ValueError,
        match="trajectories that stay finite where latents are at their prior means; got none",
    ):
        fix_gauge(model, tasks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class TwoGauges(Spring):
    def __init__(self) -> None:
        super().__init__()
        self.second = ph.Gauge(components=2)


class OtherGauge(Spring):
    def __init__(self) -> None:
        super().__init__()
        self.gauge = ph.Gauge(components=3)


def test_what_has_no_gauge_to_fix_is_refused_with_words() -> None:
    tasks = make_tasks(2)
    with pytest.raises(
        ValueError, match=r"a model with one ph\.Gauge; got TwoGauges with 2\. Assign"
    ):
        fix_gauge(TwoGauges(), tasks)
    with pytest.raises(
        ValueError, match=r"a state of 3 components; got states of \[2\] components"
    ):
        fix_gauge(OtherGauge(), tasks)
    with pytest.raises(ValueError, match=r"expected num_points from 1 to 1024; got 0\."):
        fix_gauge(Spring(), tasks, 0)
    with pytest.raises(ValueError, match=r"1 to 1024 points of 2 components; got \(3,\) times"):
        ph.Gauge(2).place(torch.zeros(3), torch.zeros(3, 1))


# ---- the penalties -------------------------------------------------------------------------------


def points(num_points: int = 400) -> CollocationPoints:
    return CollocationPoints(torch.rand(num_points), torch.randn(num_points, 2))


def test_only_what_gravity_could_have_done_is_penalized() -> None:
    torch.manual_seed(0)
    physics, z = {"omega": torch.full((5, 1), OMEGA)}, torch.zeros(5, 1)
    at = points()
    at_fault = Gravity(0.5).equations.projection_penalty(physics, z, at)
    expected = 0.25 * at.states[:, 0].sin().square().mean()
    assert torch.allclose(at_fault, expected.expand(5), rtol=0.01)
    friction = ph.HybridField(Spring().known, lambda z: lambda angle, speed: -speed + 0.0 * z)
    assert (friction.projection_penalty(physics, z, at).abs() < 0.05).all()


def test_a_force_that_is_linear_in_its_latents_is_not_penalized_for_the_bend() -> None:
    physics, z, at = {"omega": torch.ones(5, 1)}, torch.randn(5, 1), points()
    linear = Spring().equations.nonlinearity_penalty(physics, z, at)
    assert (linear < 1e-10).all()
    bent = ph.HybridField(Spring().known, lambda z: lambda angle, speed: z**2 * angle)
    expected = (z - z.roll(1, 0)).square().square() / 16.0 * at.states[:, 0].square().mean()
    assert torch.allclose(bent.nonlinearity_penalty(physics, z, at), expected[:, 0], rtol=1e-4)


def test_penalties_train_the_force_and_no_latent() -> None:
    model = Spring()
    physics = {"omega": torch.ones(5, 1, requires_grad=True)}
    z = torch.randn(5, 1, requires_grad=True)
    penalty = model.equations.projection_penalty(physics, z, points()).sum()
    penalty = penalty + model.equations.nonlinearity_penalty(physics, z, points()).sum()
    penalty.backward()
    assert physics["omega"].grad is None and z.grad is None
    assert model.residual.straight.grad.abs().sum() > 0.0


def test_collocation_points_have_the_components_of_unrelated_trajectories() -> None:
    states = torch.randn(3, 2, 7, 2)
    at = Spring().equations.collocation_points(torch.arange(7.0), states)
    assert at.times.shape == (42,) and at.states.shape == (3, 42, 2)
    for k in range(2):
        original = states[..., k].flatten().repeat(3).sort().values
        assert torch.equal(at.states[..., k].flatten().sort().values, original)
    assert (torch.corrcoef(at.states.flatten(0, 1).T)[0, 1]).abs() < 0.5
    clocks = torch.stack([torch.arange(7.0), torch.arange(7.0) + 9.0])
    assert Spring().equations.collocation_points(clocks, states).times[:14].tolist() == [
        *range(7),
        *range(9, 16),
    ]
