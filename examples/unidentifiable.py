"""A model that fits perfectly, predicts perfectly, and whose numbers mean nothing.

Weights on springs, with friction of an unknown kind. Two programs explain the same data. One asks for the mass and
the stiffness of every spring; the other for their ratio. Both reach the noise, both predict trajectories that they
have never seen. But a mass twice as heavy on a spring twice as stiff moves in the same way, so the first program's
numbers are one choice among many, and nothing in its fit says so. The certificate does.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.nn import PyroParam

import pyro_hybrid as ph

POINTS, NOISE = 30, 0.01


class Spring(ph.HybridModel):
    """m x'' = -k x + m · something that depends on the speed."""

    def __init__(self, redundant: bool) -> None:
        super().__init__()
        physics = (
            {"mass": ph.families.LogNormal(1), "stiffness": ph.families.LogNormal(1, loc=1.5)}
            if redundant
            else {"rate": ph.families.LogNormal(1, loc=1.5)}
        )
        self.prior = ph.SupportPrior(encoder(), **physics, unknown=ph.families.Normal(1))
        self.residual = ph.Residual(inputs=1, latents=1, outputs=1, linear=True)
        self.noise = PyroParam(torch.tensor(0.1), dist.constraints.positive)
        self.redundant = redundant

    def forward(self, episode: ph.Episode) -> torch.Tensor:
        p = self.prior(episode)
        with episode.plate:
            if self.redundant:
                mass, stiffness = (
                    pyro.sample("mass", p["mass"]),
                    pyro.sample("stiffness", p["stiffness"]),
                )
                rate = stiffness / mass
            else:
                rate = pyro.sample("rate", p["rate"])
            friction = self.residual.given(pyro.sample("unknown", p["unknown"])[..., None, :])

            def field(t, state):
                place, speed = state
                return speed, -rate * place + friction(speed)

            shots = episode.query
            states = ph.solve(field, shots.initial.unbind(-1), shots.times)
            return pyro.sample(
                "x",
                dist.Normal(states, self.noise).mask(shots.scored).to_event(3),
                obs=shots.values,
            )


def encoder() -> ph.SetEncoder:
    return ph.SetEncoder(num_sensors=2, num_times=POINTS, num_features=32)


def springs(systems: int) -> ph.Tasks:
    """Springs with a friction that is not linear in the speed; 8 shots of each, of some wide, of some narrow."""
    mass, stiffness, drag = (
        0.5 + torch.rand(systems, 1),
        2.0 + 6.0 * torch.rand(systems, 1),
        torch.rand(systems, 1),
    )
    wide = 10.0 ** -torch.rand(systems, 1)
    start = (
        wide * (2.0 * torch.rand(systems, 8) - 1.0),
        wide * (2.0 * torch.rand(systems, 8) - 1.0),
    )
    times = 0.1 * torch.arange(POINTS)
    states = ph.solve(
        lambda t, s: (s[1], -stiffness / mass * s[0] - drag * s[1] * (0.3 + s[1].abs())),
        start,
        times,
    )
    values = states + NOISE * torch.randn_like(states)
    truth = {"mass": mass, "stiffness": stiffness, "rate": stiffness / mass, "drag": drag}
    return ph.Tasks.from_trajectories(times, values, num_support=4, true_latents=truth)


def asked_for(tasks: ph.Tasks, redundant: bool) -> ph.Tasks:
    """The same tasks, with the truth of what the program asks for."""
    names = ("mass", "stiffness", "drag") if redundant else ("rate", "drag")
    asked = {name: tasks.true_latents[name] for name in names}
    return dataclasses.replace(tasks, true_latents=asked)


def train(
    redundant: bool, tasks: ph.Tasks, steps: int, seed: int = 0
) -> tuple[Spring, ph.AmortizedGuide]:
    """Both programs in the same way: first in steps, then in segments, then whole trajectories."""
    torch.manual_seed(seed)
    model = Spring(redundant)
    guide = ph.AmortizedGuide(model, encoder())
    ph.meta_train(
        model,
        guide,
        tasks,
        num_steps=steps,
        batch_size=32,
        learning_rate=5e-3,
        seed=seed,
        segments_per_shot=8,
        curriculum={0.0: 1, 0.3: 5, 0.6: None},
        average_last=0.2,
    )
    return model, guide


def prediction_error(model: Spring, tasks: ph.Tasks) -> float:
    """Typical error of trajectories never seen, their latents from the support alone, in noises."""
    episode = tasks.episode()
    error = (ph.predict(model, episode, 50)["x"].mean(0) - episode.query.values)[:, :, 1:] / NOISE
    return float(error.square().mean((1, 2, 3)).sqrt().median())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--systems", type=int, default=1000, help="springs to learn from (default: 1000)"
    )
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default: 2000)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of data, initial weights and training (default: 0)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/unidentifiable"),
        help="folder for figures (default: out/unidentifiable)",
    )
    parser.add_argument(
        "--fast", action="store_true", help="a tiny run that shows the way, not the result"
    )
    choice = parser.parse_args()
    systems, steps = (30, 6) if choice.fast else (choice.systems, choice.steps)
    choice.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(choice.seed)
    tasks, held_out = springs(systems + 100).split(100)

    figure, numbers = Figure(figsize=(7.5, 3), layout="constrained"), {}
    for redundant, axis in zip((True, False), figure.subplots(1, 2), strict=True):
        began = time.perf_counter()
        name, site = ("mass and stiffness", "mass") if redundant else ("their ratio", "rate")
        model, guide = train(redundant, tasks, steps, choice.seed)
        certificate = ph.certify(model, guide, asked_for(tasks, redundant), seed=choice.seed)
        certificate.plot().savefig(
            choice.out / f"{'refused' if redundant else 'certified'}.png", dpi=110
        )

        # What nobody can look at with real data: the truth.
        true = held_out.true_latents[site]
        found = ph.draws(model, guide, held_out.episode(), 100)[site].mean(0)
        r = float(ph.mcc(found, true).linear_r[0])
        axis.plot(true, found, ".", color="#c0392b" if redundant else "#2a6fbb", ms=4)
        axis.set(
            xlabel=f"true {site}",
            ylabel="recovered",
            title=f"{name}: {certificate.verdict}, R = {r:.2f}",
        )
        error = prediction_error(model, held_out)
        numbers[name] = {
            "prediction_error_in_noises": round(error, 3),
            "linear_r": round(r, 4),
            "seconds": round(time.perf_counter() - began, 1),
            "certificate": certificate.to_dict(),
        }
        print(
            f"\n=== a program that asks for {name} ===\nIt predicts trajectories that it has never seen to "
            f"{error:.1f} standard deviations of the noise.\n"
            f"Linear R of the recovered {site} with the true one: {r:.2f}\n\n{certificate}"
        )
    figure.savefig(choice.out / "recovered.png", dpi=130)
    (choice.out / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"\nfigures and metrics.json are in {choice.out}/")


if __name__ == "__main__":
    main()
