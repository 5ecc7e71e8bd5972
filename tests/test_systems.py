"""Ground truth: its equations derived anew, its simulations, and the bound that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.func import grad, hessian, jacfwd
from torch.testing import assert_close

import pyro_hybrid as ph
from pyro_hybrid.dynamics.slopes import Field
from pyro_hybrid.dynamics.solve import solve
from pyro_hybrid.systems import AdvectionDiffusion, DoublePendulum, Pendulum, System

SYSTEMS: dict[str, Callable[[], System]] = {
    "pendulum": Pendulum,
    "pendulum, angles only": lambda: Pendulum(angles_only=True),
    "double pendulum": DoublePendulum,
    "double pendulum, angles only": lambda: DoublePendulum(angles_only=True),
    "advection-diffusion": AdvectionDiffusion,
}
FORCELESS = {
    "pendulum": ("damping", "amplitude"),
    "double pendulum": ("upper", "lower"),
    "advection-diffusion": ("advection",),
}
every_system = pytest.mark.parametrize("name", SYSTEMS)
full_systems = pytest.mark.parametrize("name", FORCELESS)


def uniform(low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, dtype=torch.float64)


def latents(system: System, tasks: int) -> dict[str, Tensor]:
    values = {name: uniform(*system.ranges[name], tasks, 1) for name in system.physics}
    return values | {
        "unknown": torch.cat(
            [uniform(*system.ranges[name], tasks, 1) for name in system.unknown], -1
        )
    }


def starts(system: System, tasks: int, shots: int) -> Tensor | tuple[Tensor, ...]:
    return system.initial(lambda name: uniform(*system.ranges[name], tasks, shots))


# ------------------------------------------------------------------------------------------------------------ equations


def test_the_pendulum_obeys_its_equation() -> None:
    system = Pendulum()
    z, (angle, speed), t = (
        latents(system, 4),
        starts(system, 4, 3),
        torch.tensor(1.7, dtype=torch.float64),
    )
    slope, turn = system.full(z)(t, (angle, speed))
    damping, amplitude, frequency = z["unknown"].unsqueeze(1).unbind(-1)
    assert torch.equal(slope, speed)
    left = turn + damping * speed + z["omega"] ** 2 * angle.sin()
    assert_close(left, (amplitude * torch.cos(2.0 * torch.pi * frequency * t)).expand(4, 3))


def accelerations(q: Tensor, w: Tensor, gravity: Tensor, ratio: Tensor, friction: Tensor) -> Tensor:
    """Of two masses on two rods, from where they are: Euler and Lagrange's equations, solved for the accelerations."""

    def lagrangian(q: Tensor, w: Tensor) -> Tensor:
        def places(q: Tensor) -> Tensor:
            upper = torch.stack([q[0].sin(), -q[0].cos()])
            return torch.stack([upper, upper + torch.stack([q[1].sin(), -q[1].cos()])])

        mass = torch.stack([torch.ones_like(ratio), ratio])
        velocity = jacfwd(places)(q) @ w
        return (
            0.5 * (mass * velocity.square().sum(-1)).sum()
            - gravity * (mass * places(q)[:, 1]).sum()
        )

    inertia = hessian(lagrangian, argnums=1)(q, w)
    drift = jacfwd(grad(lagrangian, argnums=1), argnums=0)(q, w) @ w

    def dissipation(w: Tensor) -> Tensor:  # Rayleigh's: each joint loses by its own rate
        return 0.5 * (friction[0] * w[0] ** 2 + friction[1] * (w[1] - w[0]) ** 2)

    return torch.linalg.solve(inertia, grad(lagrangian)(q, w) - drift - grad(dissipation)(w))


def test_the_double_pendulum_obeys_the_laws_of_mechanics() -> None:
    system = DoublePendulum()
    z = latents(system, 6)
    state = (
        *uniform(-3.0, 3.0, 2, 6, 1),
        *uniform(-4.0, 4.0, 2, 6, 1),
    )  # far beyond where trajectories start
    slopes = system.full(z)(torch.zeros(()), state)
    assert torch.equal(slopes[0], state[2]) and torch.equal(slopes[1], state[3])
    for task in range(6):
        q, w = (torch.stack([part[task, 0] for part in pair]) for pair in (state[:2], state[2:]))
        expected = accelerations(
            q, w, z["gravity"][task, 0], z["ratio"][task, 0], z["unknown"][task]
        )
        assert_close(
            torch.stack([slopes[2][task, 0], slopes[3][task, 0]]), expected, rtol=1e-9, atol=1e-9
        )


def test_joint_torques_act_as_documented() -> None:
    system, seen = DoublePendulum(), []

    def force(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        seen.extend(inputs)
        return u1, u2

    z, state = latents(system, 5), tuple(uniform(-2.0, 2.0, 4, 5, 3))
    u1, u2 = uniform(-1.0, 1.0, 2, 5, 3)
    _, _, a1, a2 = system.known(z, force)(torch.zeros(()), state)
    t1, t2, w1, w2 = state
    g, m, away = z["gravity"], z["ratio"], t1 - t2
    first = (1 + m) * a1 + m * away.cos() * a2 + m * away.sin() * w2**2 + (1 + m) * g * t1.sin()
    second = m * away.cos() * a1 + m * a2 - m * away.sin() * w1**2 + m * g * t2.sin()
    assert_close(first, u1 - u2)
    assert_close(second, u2)
    for given, expected in zip(seen, (t1, t2 - t1, w1, w2 - w1), strict=True):
        assert torch.equal(given, expected)


def test_advection_and_diffusion_are_the_central_differences_of_their_equation() -> None:
    system = AdvectionDiffusion()
    z, y = latents(system, 3), uniform(-1.0, 1.0, 3, 2, 20)
    slope = system.full(z)(torch.zeros(()), y)
    assert not slope[..., [0, -1]].any()  # the ends are held
    for task in range(3):
        a, b, dx = z["diffusion"][task], z["unknown"][task], 0.1
        for i in range(1, 19):
            left, here, right = y[task, :, i - 1], y[task, :, i], y[task, :, i + 1]
            assert_close(
                slope[task, :, i],
                a * (left - 2 * here + right) / dx**2 - b * (right - left) / (2 * dx),
            )


def test_a_sine_decays_at_the_rate_of_diffusion() -> None:
    system = AdvectionDiffusion()
    z = {"diffusion": uniform(0.01, 0.1, 3, 1), "unknown": torch.zeros(3, 1, dtype=torch.float64)}
    start = starts(system, 3, 2)
    rate = (
        z["diffusion"]
        / 0.1**2
        * (2.0 - 2.0 * torch.cos(torch.tensor(torch.pi / 19, dtype=torch.float64)))
    )
    decay = torch.exp(-rate.unsqueeze(-1) * system.times).unsqueeze(-1)
    assert_close(
        system.trajectories(z, start, system.times),
        start.unsqueeze(-2) * decay,
        rtol=0.0,
        atol=1e-9,
    )


@full_systems
def test_without_the_unknown_the_full_equations_are_the_known_ones(name: str) -> None:
    system = SYSTEMS[name]()
    z, y0 = latents(system, 4), starts(system, 4, 3)
    for i, component in enumerate(system.unknown):
        if component in FORCELESS[name]:
            z["unknown"][:, i] = 0.0
    nothing = torch.zeros((), dtype=torch.float64)
    none = nothing if system.outputs == 1 else (nothing,) * system.outputs
    known = system.known({k: z[k][..., None, 0] for k in system.physics}, lambda *inputs: none)
    assert_close(solve(known, y0, system.times), solve(system.full(z), y0, system.times))


@full_systems
def test_the_force_is_called_with_as_many_inputs_and_returns_as_many_outputs_as_the_system_says(
    name: str,
) -> None:
    system, calls = SYSTEMS[name](), []
    z = latents(system, 4)
    truth = system.truth(z["unknown"][..., None, :])

    def force(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        calls.append((inputs, truth(*inputs)))
        return calls[-1][1]

    known = system.known({k: z[k][..., None, 0] for k in system.physics}, force)
    states = solve(known, starts(system, 4, 3), system.times)
    assert all(len(inputs) == len(system.inputs) for inputs, _ in calls)
    assert all((len(out) if isinstance(out, tuple) else 1) == system.outputs for _, out in calls)
    assert_close(states, solve(system.full(z), starts_again(states, system), system.times))
    sizes = torch.tensor(
        [
            max(float(inputs[i].abs().max()) for inputs, _ in calls)
            for i in range(len(system.inputs))
        ]
    )
    assert (sizes < 20.0 * torch.tensor(system.inputs)).all()


def starts_again(states: Tensor, system: System) -> Tensor | tuple[Tensor, ...]:
    return states[..., 0, :] if system.grid else states[..., 0, :].unbind(-1)


@full_systems
def test_latents_of_particles_broadcast_through_the_equations(name: str) -> None:
    system = SYSTEMS[name]()
    particles = [latents(system, 3) for _ in range(2)]
    together = {key: torch.stack([z[key] for z in particles]) for key in particles[0]}
    y0 = starts(system, 3, 2)
    states = system.trajectories(together, y0, system.times)
    for k, z in enumerate(particles):
        assert_close(states[k], system.trajectories(z, y0, system.times), rtol=0.0, atol=1e-12)


@every_system
def test_simulation_steps_are_fine_enough_for_the_noise(name: str) -> None:
    system = SYSTEMS[name]()
    z, y0 = latents(system, 20), starts(system, 20, 1)
    exact = system.observe(
        solve(system.full(z), y0, system.times, method="dopri8", rtol=1e-9, atol=1e-9)
    )
    error = (system.trajectories(z, y0, system.times) - exact).abs().amax((0, 1, 2))
    assert (error < 0.01 * torch.tensor(system.noise)).all()


# ----------------------------------------------------------------------------------------------------------- simulation

RANGES = {
    "pendulum": {
        "omega": (1.0, 3.0),
        "damping": (0.0, 0.8),
        "amplitude": (0.5, 2.0),
        "frequency": (0.2, 0.6),
        "angle": (-1.57, 1.57),
        "speed": (-0.5, 0.5),
    },
    "double pendulum": {
        "gravity": (6.0, 14.0),
        "ratio": (0.5, 2.0),
        "upper": (0.0, 0.8),
        "lower": (0.0, 0.8),
        "angle": (-1.2, 1.2),
        "speed": (-0.5, 0.5),
    },
    "advection-diffusion": {
        "diffusion": (0.01, 0.1),
        "advection": (0.01, 0.1),
        "height": (0.5, 1.5),
    },
}
STEP_AND_NOISE = {
    "pendulum": (0.1, (0.01, 0.01)),
    "pendulum, angles only": (0.1, (0.01,)),
    "double pendulum": (0.05, (0.01, 0.01, 0.05, 0.05)),
    "double pendulum, angles only": (0.05, (0.01, 0.01)),
    "advection-diffusion": (0.02, (1e-3,) * 20),
}


@every_system
def test_default_settings_are_those_that_published_numbers_refer_to(name: str) -> None:
    system, (step, noise) = SYSTEMS[name](), STEP_AND_NOISE[name]
    assert system.ranges == RANGES[name.removesuffix(", angles only")]
    assert system.noise == noise and system.sensors == len(noise)
    assert_close(system.times, step * torch.arange(50, dtype=torch.float64))


@every_system
def test_simulated_tasks_have_the_shapes_and_the_truth_that_they_say(name: str) -> None:
    system = SYSTEMS[name]()
    tasks = system.simulate(6, 5, seed=0)
    assert tasks.values.shape == (6, 5, 50, system.sensors) and tasks.values.dtype == torch.float32
    assert_close(tasks.times.double(), system.times, rtol=0.0, atol=1e-6)
    assert tasks.num_support == 2 and tasks.states is not None
    assert {key: tuple(value.shape) for key, value in tasks.true_latents.items()} == {
        **{key: (6, 1) for key in system.physics},
        "unknown": (6, len(system.unknown)),
    }


@every_system
def test_the_same_seed_gives_the_same_tasks_and_leaves_global_random_numbers_alone(
    name: str,
) -> None:
    system = SYSTEMS[name]()
    torch.manual_seed(3)
    one, same, other = (system.simulate(3, 2, seed=seed) for seed in (1, 1, 2))
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.equal(one.values, same.values) and not torch.equal(one.values, other.values)
    for key in one.true_latents:
        assert torch.equal(one.true_latents[key], same.true_latents[key]) and not torch.equal(
            one.true_latents[key], other.true_latents[key]
        )


def noiseless(name: str, tasks: int, shots: int) -> tuple[ph.Tasks, ph.Tasks]:
    """The same tasks with and without noise."""
    system = SYSTEMS[name]()
    noisy = system.simulate(tasks, shots, seed=0)
    system.noise = tuple(0.0 for _ in system.noise)
    return noisy, system.simulate(tasks, shots, seed=0)


@every_system
def test_truth_and_starts_fill_their_ranges(name: str) -> None:
    system, (_, clean) = SYSTEMS[name](), noiseless(name, 300, 2)
    drawn = {key: clean.true_latents[key][:, 0] for key in system.physics}
    drawn |= dict(zip(system.unknown, clean.true_latents["unknown"].unbind(-1), strict=True))
    first = clean.values[:, :, 0]
    if name == "advection-diffusion":
        place = torch.sin(torch.pi * torch.linspace(0.0, 1.0, 20))
        drawn["height"] = (first * place).sum(-1) / place.square().sum()
        assert_close(first, drawn["height"].unsqueeze(-1) * place)
    else:
        half = first.shape[-1] if "only" in name else first.shape[-1] // 2
        drawn |= {f"angle {i}": first[..., i] for i in range(half)}
        drawn |= {f"speed {i}": first[..., half + i] for i in range(first.shape[-1] - half)}
    for key, values in drawn.items():
        low, high = system.ranges[key.split()[0]]
        slack = 1e-6 * (high - low)
        assert low - slack <= values.min() <= low + 0.03 * (high - low), key
        assert high - 0.03 * (high - low) <= values.max() <= high + slack, key


@every_system
def test_noise_is_white_and_as_large_as_said(name: str) -> None:
    system, (noisy, clean) = SYSTEMS[name](), noiseless(name, 60, 4)
    noise = (noisy.values - clean.values).double() / torch.tensor(system.noise)
    count = noise[..., 0].numel()
    assert (noise.flatten(0, 2).std(0) - 1.0).abs().max() < 5.0 / (2 * count) ** 0.5
    assert noise.flatten(0, 2).mean(0).abs().max() < 5.0 / count**0.5
    for a, b in ((noise[:, :, 1:], noise[:, :, :-1]), (noise[:, 1:], noise[:, :-1])):
        assert (a * b).mean() < 5.0 / a.numel() ** 0.5


@pytest.mark.parametrize("system", [Pendulum, DoublePendulum])
def test_angles_only_is_the_same_motion_seen_through_fewer_sensors(
    system: type[Pendulum | DoublePendulum],
) -> None:
    full, part = system(), system(angles_only=True)
    full.noise, part.noise = tuple(0.0 for _ in full.noise), tuple(0.0 for _ in part.noise)
    all_of_it, angles = full.simulate(3, 2, seed=0), part.simulate(3, 2, seed=0)
    assert torch.equal(angles.values, all_of_it.values[..., : part.sensors])
    assert angles.states.shape == all_of_it.states.shape == (3, 2, 50, 2 * part.sensors)
    known = slice(0, part.sensors)
    assert torch.equal(angles.states[..., known], all_of_it.states[..., known])
    assert not angles.states[..., part.sensors :].any()
    low, high = part.ranges["speed"]
    assert all(
        s >= high for s in part.start_noise[part.sensors :]
    )  # a speed of zero is a guess, and known to be one


@pytest.mark.parametrize(
    ("shots", "asked", "support"), [(2, None, 1), (8, None, 4), (5, None, 2), (8, 3, 3)]
)
def test_half_of_the_shots_are_support_unless_said_otherwise(
    shots: int, asked: int | None, support: int
) -> None:
    assert Pendulum().simulate(2, shots, seed=0, num_support=asked).num_support == support


def test_what_cannot_be_simulated_is_refused_with_words() -> None:
    with pytest.raises(
        ValueError,
        match="at least one task of two shots; got 3 of 1. One shot conditions the prior",
    ):
        Pendulum().simulate(3, 1, seed=0)
    with pytest.raises(ValueError, match="at least one task of two shots; got 0 of 2"):
        Pendulum().simulate(0, 2, seed=0)
    with pytest.raises(
        ValueError,
        match=r"num_support from 1 to 3 \(of 4 shots\); got 0. The support can't be empty",
    ):
        Pendulum().simulate(3, 4, seed=0, num_support=0)


class Decay(System):
    """A system of one's own: y' = -rate y + push, with nothing but what the base class asks for."""

    ranges = {"rate": (0.5, 1.0), "push": (0.0, 1.0), "size": (1.0, 2.0)}
    physics = {"rate": ph.families.LogNormal(1)}
    unknown = ("push",)
    inputs = (1.0,)
    outputs = 1

    def __init__(self) -> None:
        self.step, self.noise, self.start_noise = 0.1, (0.01,), (0.01,)

    def known(self, physics: Mapping[str, Tensor], force: Callable[..., Tensor]) -> Field:
        return lambda t, state: (-physics["rate"] * state[0] + force(state[0]),)

    def truth(self, unknown: Tensor) -> Callable[..., Tensor]:
        return lambda y: unknown[..., 0]

    def initial(self, draw: Callable[[str], Tensor]) -> tuple[Tensor]:
        return (draw("size"),)


def test_a_system_of_one_s_own_needs_three_methods() -> None:
    system = Decay()
    z, y0 = latents(system, 3), starts(system, 3, 2)
    rest = (z["unknown"] / z["rate"]).unsqueeze(-1)
    truth = rest + (y0[0].unsqueeze(-1) - rest) * torch.exp(-z["rate"].unsqueeze(-1) * system.times)
    assert_close(system.trajectories(z, y0, system.times).squeeze(-1), truth, rtol=0.0, atol=1e-9)
    assert system.simulate(3, 2, seed=0).values.shape == (3, 2, 50, 1)
    with pytest.raises(TypeError, match="abstract"):
        System()


# ------------------------------------------------------------------------------------------ the true program, its bound


@every_system
def test_the_true_program_expects_the_true_trajectories(name: str) -> None:
    system = SYSTEMS[name]()
    tasks = system.simulate(3, 4, seed=0)
    episode, start = tasks.episode().double(), starts(system, 3, 2)
    truth = {key: value.double() for key, value in tasks.true_latents.items()}
    at = truth | {"initial": start if system.grid else torch.stack(start, -1)}
    trace = poutine.trace(poutine.condition(system.program, data=at)).get_trace(episode)
    assert set(trace.observation_nodes) == {*truth, "initial", "x"}
    x = trace.nodes["x"]["fn"]
    while not isinstance(x, dist.Normal):
        x = x.base_dist
    error = (x.loc - system.trajectories(truth, start, system.times)).abs() / torch.tensor(
        system.noise
    )
    assert error.max() < 0.1  # in units of the noise
    assert_close(x.scale, torch.tensor(system.noise, dtype=torch.float64).expand_as(x.scale))
    trace.compute_log_prob()
    z = ((episode.query.values - x.loc) / x.scale).where(episode.query.scored, 0.0)
    size = episode.query.scored * (x.scale.log() + 0.5 * math.log(2.0 * math.pi))
    assert_close(trace.nodes["x"]["log_prob"], -(0.5 * z**2 + size).sum((1, 2, 3)))


@every_system
def test_the_true_program_simulates_where_nothing_is_observed(name: str) -> None:
    system = SYSTEMS[name]()
    episode = system.simulate(3, 4, seed=0).episode()
    assert system.program(episode.simulation()).shape == (3, 2, 50, system.sensors)
    assert torch.equal(system.program(episode), episode.query.values)


def bound(system: System, support: ph.Shots, truth: Mapping[str, Tensor]) -> Tensor:
    """The Cramér-Rao bound by central differences, task by task, with nothing of the library but the solver."""
    measured, rows = support.double().measured_initial, []
    tasks, shots, components = measured.shape
    spread = torch.tensor(system.start_noise, dtype=torch.float64).repeat(shots)
    for task in range(tasks):
        known = torch.cat([value[task] for value in truth.values()]).double()

        def whitened(theta: Tensor, d: int = len(known)) -> Tensor:
            z = dict(
                zip(
                    truth,
                    theta[None, :d].split([v.shape[-1] for v in truth.values()], -1),
                    strict=True,
                )
            )
            y0 = theta[d:].view(1, shots, components)
            states = solve(
                system.full(z), y0 if system.grid else y0.unbind(-1), system.times, substeps=4
            )
            return (
                system.observe(states)[:, :, 1:] / torch.tensor(system.noise, dtype=torch.float64)
            ).flatten()

        theta, h = torch.cat([known, measured[task].flatten()]), 1e-5
        moves = h * torch.eye(len(theta), dtype=torch.float64)
        slopes = torch.stack(
            [(whitened(theta + move) - whitened(theta - move)) / (2 * h) for move in moves]
        )
        prior = torch.cat([torch.zeros_like(known), spread**-2])
        rows.append(
            torch.linalg.inv(slopes @ slopes.T + torch.diag(prior)).diagonal()[: len(known)]
        )
    return torch.stack(rows)


@every_system
def test_the_cramer_rao_bound_is_that_of_finite_differences(name: str) -> None:
    system = SYSTEMS[name]()
    tasks = system.simulate(1, 3, seed=0, num_support=1 if system.grid else 2)
    support = tasks.episode().support
    assert_close(
        system.cramer_rao(support, tasks.true_latents),
        bound(system, support, tasks.true_latents),
        rtol=1e-3,
        atol=0.0,
    )


def test_the_cramer_rao_bound_goes_with_the_noise_and_shrinks_with_shots() -> None:
    system = DoublePendulum()
    tasks = system.simulate(5, 9, seed=0)
    few, many = (system.cramer_rao(tasks.episode(n).support, tasks.true_latents) for n in (2, 8))
    assert (many < few).all() and 0.1 < (many / few).log().mean().exp() < 0.5
    system.noise, system.start_noise = (
        tuple(2.0 * s for s in noise) for noise in (system.noise, system.start_noise)
    )
    assert_close(
        system.cramer_rao(tasks.episode(2).support, tasks.true_latents),
        4.0 * few,
        rtol=1e-4,
        atol=0.0,
    )


def test_the_cramer_rao_bound_of_a_system_that_one_can_solve_is_the_closed_form() -> None:
    system = Decay()
    system.start_noise = (1e-6,)  # the start is known: two latents, one linear regression
    tasks = system.simulate(4, 3, seed=0)
    support, truth = tasks.episode().support, {k: v.double() for k, v in tasks.true_latents.items()}
    rate, push, t = truth["rate"].unsqueeze(-1), truth["unknown"].unsqueeze(-1), system.times[1:]
    y0, decay = support.initial[..., 0].double().unsqueeze(-1), torch.exp(-rate * t)
    by_rate = -push / rate**2 * (1 - decay) - (y0 - push / rate) * t * decay
    by_push = (1 - decay) / rate
    slopes = torch.stack([by_rate, by_push.expand_as(by_rate)], -2).squeeze(1) / 0.01
    expected = torch.linalg.inv(slopes @ slopes.mT).diagonal(dim1=-2, dim2=-1)
    assert_close(system.cramer_rao(support, truth), expected, rtol=1e-3, atol=0.0)


def test_a_bound_from_nothing_is_refused_with_words() -> None:
    tasks = Pendulum().simulate(2, 2, seed=0)
    with pytest.raises(
        ValueError, match="a support with values; got values=None. Pass tasks.episode"
    ):
        Pendulum().cramer_rao(tasks.episode().support.simulation(), tasks.true_latents)
