"""The tables and figures of docs/calibration.md: one program, read in two ways.

    python docs/results/calibration.py           # under a minute

Damped springs, x'' = -rate x - drag x'. An encoder that was trained for a short while reads them, or computed evidence
does, or that with restarts. Writes images/calibration_*.png, results/calibration_*.txt and results/calibration.json.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import arviz
import pyro
import pyro.distributions as dist
import torch

import pyro_hybrid as ph

ROOT = Path(__file__).parents[2]
POINTS, NOISE, SEED = 25, 0.05, 0


class Spring(ph.HybridModel):
    """x'' = -rate x - drag x', both known to be positive."""

    def __init__(self, evidence: ph.GaussNewton | None) -> None:
        super().__init__()
        reader = ph.Encoder(encoder())
        self.prior = ph.SupportPrior(
            reader if evidence is None else reader.then(evidence),
            rate=ph.families.LogNormal(1),
            drag=ph.families.LogNormal(1),
        )

    def forward(self, episode: ph.Episode) -> torch.Tensor:
        p = self.prior(episode)
        query = episode.query
        with episode.plate:
            rate = pyro.sample("rate", p["rate"])
            drag = pyro.sample("drag", p["drag"])
            states = ph.solve(
                lambda t, s: (s[1], -rate * s[0] - drag * s[1]),
                query.measured_initial.unbind(-1),
                query.times,
            )
            x = dist.Normal(states, NOISE).mask(query.scored)
            return pyro.sample("x", x.to_event(3), obs=query.values)


def encoder() -> ph.SetEncoder:
    return ph.SetEncoder(num_sensors=2, num_times=POINTS, num_features=32)


def springs(systems: int) -> ph.Tasks:
    """Simulate springs of all strengths, four shots of each, their starts measured without noise."""
    rate = (0.4 * torch.randn(systems, 1) + 1.0).exp()
    drag = (0.5 * torch.randn(systems, 1) - 1.0).exp()
    start = (torch.randn(systems, 4), torch.randn(systems, 4))
    times = 0.15 * torch.arange(POINTS)
    states = ph.solve(lambda t, s: (s[1], -rate * s[0] - drag * s[1]), start, times)
    noise = NOISE * torch.randn_like(states)
    noise[:, :, 0] = 0.0
    return ph.Tasks.from_trajectories(
        times, states + noise, num_support=1, true_latents={"rate": rate, "drag": drag}
    )


def train(computed: bool, tasks: ph.Tasks, steps: int) -> tuple[Spring, ph.AmortizedGuide]:
    """Train a program whose evidence is computed, or learned by encoders alone."""
    torch.manual_seed(SEED)
    evidence = ph.GaussNewton(3) if computed else None
    model = Spring(evidence)
    guide = ph.AmortizedGuide(model, evidence or encoder())
    ph.meta_train(
        model, guide, tasks, num_steps=steps, batch_size=32, learning_rate=5e-3, seed=SEED
    )
    return model, guide


def suspects(
    found: ph.CalibrationReport, model: Spring, guide: ph.AmortizedGuide, tasks: ph.Tasks
) -> list[dict]:
    """Compare draws with the truth, unknown for real data, of those springs whose weights are not reliable."""
    suspicious = (~torch.from_numpy(found.pareto_k.is_reliable)).nonzero()[:, 0]
    if not len(suspicious):
        return []
    drawn = ph.draws(model, guide, tasks[suspicious].episode(), 999)
    return [
        {"spring": int(row)}
        | {
            name: {
                "truth": round(float(tasks.true_latents[name][row]), 3),
                "mean": round(float(values[:, i].mean()), 3),
                "sd": round(float(values[:, i].std()), 3),
            }
            for name, values in drawn.items()
        }
        for i, row in enumerate(suspicious)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="a tiny run, for a test of the way")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs", help="writes images/ and results/ there"
    )
    choice = parser.parse_args()
    images, results = choice.out / "images", choice.out / "results"
    images.mkdir(parents=True, exist_ok=True), results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    began, simulations = time.perf_counter(), 12 if choice.fast else 1000
    tasks, held_out = springs(24 if choice.fast else 400).split(12 if choice.fast else 100)
    numbers: dict[str, object] = {}

    def check(name: str, model: Spring, guide: ph.AmortizedGuide) -> None:
        found = ph.check_calibration(model, guide, held_out, simulations=simulations, seed=SEED)
        if name != "restarts":
            found.plot().savefig(images / f"calibration_{name}.png", dpi=100)
        (results / f"calibration_{name}.txt").write_text(f"{found}\n")
        numbers[name] = found.to_dict()
        if name != "encoder":
            numbers[f"{name}_suspects"] = suspects(found, model, guide, held_out)

    check("encoder", *train(False, tasks, 1 if choice.fast else 300))
    model, guide = train(True, tasks, 1 if choice.fast else 100)
    check("computed", model, guide)
    restarts = ph.GaussNewton(5, num_restarts=8)
    posterior = ph.compute_evidence(ph.Posterior(model, guide), restarts, restarts)
    check("restarts", posterior.model, posterior.guide)
    numbers |= {
        "seed": SEED,
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "arviz": arviz.__version__,
            "pyro_hybrid": ph.__version__,
        },
    }
    (results / "calibration.json").write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
