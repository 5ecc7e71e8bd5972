"""APHYNITY on the damped pendulum of its own paper: ``python docs/results/aphynity.py`` writes ``aphynity.json``.

25 sequences of one pendulum, 40 steps of 0.5, without noise; as known physics once the pendulum without friction and
once with it; judged on 25 others. Published, as the log MSE of the held-out sequences and the error of the parameters:
-7.86 ± 0.60 and 4.0%, and -8.31 ± 0.30 and 0.39% (Yin et al., 2021, https://arxiv.org/abs/2010.04456). Initial states
are drawn as in the authors' code, https://github.com/yuan-yin/APHYNITY. The error of the parameters, as there, is the
mean over those of the physics, of ω² and not of ω. The paper doesn't say which logarithm it uses: ``implied`` computes
the error of the equations alone with parameters that are off by as much as the published ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import pyro
import torch
from torch import Tensor

import pyro_hybrid as ph
from pyro_hybrid.dynamics.slopes import Field
from pyro_hybrid.programs.module import local_parameters

FRICTION = 0.2
CURRICULUM = {
    0.0: 2,
    0.2: 5,
    0.5: 10,
    0.8: 20,
}  # in steps: states are measured at all times, without noise


class Undamped(ph.systems.System):
    """A damped pendulum whose friction is unknown; the neural force changes both slopes, as in the paper."""

    physics = {"omega": ph.families.LogNormal(1, loc=-0.5, scale=0.4)}
    unknown = ("friction",)
    inputs = (1.5, 1.5)
    outputs = 2
    points = 40
    noise = start_noise = (0.0, 0.0)
    names = ("angle", "speed")
    step = 0.5

    def __init__(self, period: float) -> None:
        omega = 2.0 * math.pi / period
        self.ranges = {
            "omega": (omega, omega),
            "friction": (FRICTION, FRICTION),
            "radius": (1.3, 2.3),
            "angle": (-1.0, 1.0),
            "speed": (-1.0, 1.0),
        }

    def known(
        self, physics: Mapping[str, Tensor], force: Callable[..., tuple[Tensor, Tensor]]
    ) -> Field:
        def field(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            angle, speed = state
            turn, push = force(angle, speed)
            return speed + turn, push - physics["omega"] ** 2 * angle.sin() - physics.get(
                "friction", 0.0
            ) * speed

        return field

    def truth(self, unknown: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda angle, speed: (torch.zeros_like(angle), -unknown[..., 0] * speed)

    def initial(self, draw: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        angle, speed = draw("angle"), draw("speed")
        size = draw("radius") / torch.hypot(angle, speed)
        return size * angle, size * speed


class Damped(Undamped):
    """A damped pendulum whose friction is known except for its parameter."""

    physics = {**Undamped.physics, "friction": ph.families.LogNormal(1, loc=-2.3, scale=0.4)}


def sequences(choice: argparse.Namespace, seed: int) -> ph.Tasks:
    """Simulate 25 sequences of one system, and a support, which is not used."""
    return Undamped(choice.period).simulate(1, 26, seed, num_support=1)


def implied(choice: argparse.Namespace, percent: float) -> dict[str, float]:
    """Compute log10 MSE of the damped pendulum's equations with wrong parameters: of the best and the worst signs.

    Arguments:
        choice: the options.
        percent: error of ω² and of the friction.
    """
    shots = sequences(choice, 2 * choice.seed + 1).episode().query
    system = Damped(choice.period)
    errors = []
    for sign_of_omega, sign_of_friction in itertools.product((1.0, -1.0), repeat=2):
        squared = 1.0 + 0.01 * percent * sign_of_omega
        friction = FRICTION * (1.0 + 0.01 * percent * sign_of_friction)
        physics = {
            "omega": torch.tensor(2.0 * math.pi / choice.period * math.sqrt(squared)),
            "friction": torch.tensor(friction),
        }
        field = system.known(physics, no_force)
        start = shots.measured_initial.unbind(-1)
        states = ph.solve(field, start, shots.times, substeps=choice.substeps)
        errors.append(float((states - shots.values).square().mean().log10()))
    return {"percent": percent, "best": round(min(errors), 3), "worst": round(max(errors), 3)}


def no_force(angle: Tensor, speed: Tensor) -> tuple[Tensor, Tensor]:
    """Return a neural force of zero."""
    return torch.zeros_like(angle), torch.zeros_like(speed)


def least(choice: argparse.Namespace) -> float:
    """Compute the error of ω² at the minimum of the objective, in %.

    It isn't zero, because friction isn't orthogonal to gravity along the true states.
    """
    angle, speed = sequences(choice, 2 * choice.seed).episode().query.values.unbind(-1)
    credited = FRICTION * (speed * angle.sin()).sum() / angle.sin().square().sum()
    return 100.0 * float(credited) / (2.0 * math.pi / choice.period) ** 2


def run(system: Undamped, choice: argparse.Namespace) -> dict[str, object]:
    """Train on one set of sequences, and score another."""
    train = sequences(choice, 2 * choice.seed)
    held_out = sequences(choice, 2 * choice.seed + 1)
    torch.manual_seed(choice.seed)
    model = ph.models.OriginalAPHYNITY(
        system, growth=choice.growth, width=choice.width, substeps=choice.substeps
    )
    fit = ph.meta_train(
        model,
        model.guide(),
        train,
        num_steps=choice.steps,
        batch_size=1,
        seed=choice.seed,
        learning_rate=choice.learning_rate,
        curriculum=CURRICULUM,
        progress=False,
    )
    episode = held_out.episode()
    with torch.no_grad(), local_parameters():
        states = model.trajectories(episode)
        norm = model.squared_norm(episode.query.times, states)
        parameters = {name: float(value) for name, value in model.physics().items()}
    square = (states - episode.query.values).square()
    return {
        "log10_mse": round(float(square.mean().log10()), 3),
        "log10_mse_median_sequence": round(float(square.mean((-2, -1)).median().log10()), 3),
        "parameters": parameters,
        "error_percent": {
            name: round(100.0 * (value / system.ranges[name][0] - 1.0), 3)
            for name, value in parameters.items()
        },
        "error_percent_of_omega_squared": round(
            100.0 * ((parameters["omega"] / system.ranges["omega"][0]) ** 2 - 1.0), 3
        ),
        "norm": float(norm),
        "lambda": float(model.constraint.weight),
        "seconds": round(fit.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, initial weights and training")
    parser.add_argument(
        "--period", type=float, default=6.0, help="T0 of the undamped pendulum, for small angles"
    )
    parser.add_argument("--steps", type=int, default=5000, help="training steps")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="its peak")
    parser.add_argument("--growth", type=float, default=100.0, help="of lambda: the paper's tau_2")
    parser.add_argument("--width", type=int, default=32, help="of the two hidden layers")
    parser.add_argument(
        "--substeps", type=int, default=3, help="steps of RK4 between two observations"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_suffix(".json"), help="file of the numbers"
    )
    choice = parser.parse_args()
    torch.set_num_threads(1)
    numbers = {
        "error_percent_of_omega_squared_at_the_minimum": round(least(choice), 3),
        "undamped": run(Undamped(choice.period), choice),
        "damped": run(Damped(choice.period), choice),
        "log10_mse_implied_by_published_error": implied(choice, 0.39),
        "settings": {name: value for name, value in vars(choice).items() if name != "out"}
        | {"curriculum": list(CURRICULUM.items())},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "pyro_hybrid": ph.__version__,
        },
    }
    choice.out.write_text(json.dumps(numbers, indent=2) + "\n")
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
