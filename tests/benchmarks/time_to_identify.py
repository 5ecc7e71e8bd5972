"""How long until a forced, damped pendulum is identified: wall-clock to a held-out linear R of 0.9 on all four latents.

    python tests/benchmarks/time_to_identify.py [--rows library naive numpyro] [--seed 0] [--budget 1800] [--out FILE]

The same model, encoders, starting weights, data and optimiser, three ways: this library as one would use it, on segments
and with shorter ones first; a plain Pyro program around torchdiffeq's dopri5, on whole trajectories; and numpyro with RK4
in a scan, on whole trajectories. One thread. Compilation and set-up count; looking at the held-out tasks doesn't, whose R
is read from the support alone. A row that hasn't arrived when its budget is spent says so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from elbo_step import one_thread
from meta_rivals import Naive, standardise
from torch import Tensor

import pyro_hybrid as ph

ENOUGH, BATCH, RATE = 0.9, 48, 3e-3


class Enough(Exception):
    """Identified, or out of time."""


@dataclass
class Watch:
    """A clock that stands still while somebody looks at the held-out tasks, and remembers what they saw."""

    truth: Tensor
    budget: float
    every: int
    seconds: float = 0.0
    looks: list[dict[str, object]] = field(default_factory=list)
    reached: float | None = None

    def start(self) -> None:
        self.since = time.perf_counter()

    def __call__(self, step: int, estimate: Callable[[], Tensor]) -> None:
        """After a step; ``estimate`` reads the held-out supports."""
        if (step + 1) % self.every and time.perf_counter() - self.since + self.seconds < self.budget:
            return
        self.seconds += time.perf_counter() - self.since
        r = ph.mcc(estimate(), self.truth).linear_r
        self.looks.append({"step": step + 1, "seconds": round(self.seconds, 2), "linear_r": r.round(4).tolist()})
        print(f"  step {step + 1:>6}, {self.seconds:7.1f} s, linear R {[round(float(x), 3) for x in r]}", flush=True)
        if float(r.min()) >= ENOUGH:
            self.reached = self.seconds
        if self.reached or self.seconds >= self.budget:
            raise Enough
        self.start()


@torch.no_grad()
def read(prior: ph.SupportPrior, support: ph.Episode) -> Tensor:
    """Prior means in unconstrained coordinates, (task, latent)."""
    return prior.gaussian(support)[0]


def library(model: ph.models.MetaHybridVAE, guide: ph.AmortizedGuide, train: ph.Tasks, support: ph.Episode,
            watch: Watch, options: argparse.Namespace) -> None:
    """Segments of one step, then of more."""
    ph.meta_train(model, guide, train, steps=options.steps, batch_size=options.batch, learning_rate=options.rate,
                  seed=options.seed, curriculum=options.curriculum, segments=options.segments, progress=False,
                  callback=lambda step, fit: watch(step, lambda: read(model.prior, support)))


def naive(model: ph.models.MetaHybridVAE, guide: ph.AmortizedGuide, train: ph.Tasks, support: ph.Episode,
          watch: Watch, options: argparse.Namespace) -> None:
    """torchdiffeq's dopri5 on whole trajectories."""
    rival = Naive(model)
    ph.meta_train(rival, rival.guide(guide), train, steps=options.steps, batch_size=BATCH, learning_rate=RATE,
                  seed=options.seed, curriculum={0.0: None}, progress=False,
                  callback=lambda step, fit: watch(step, lambda: read(rival.prior, support)))


def numpyro(model: ph.models.MetaHybridVAE, guide: ph.AmortizedGuide, train: ph.Tasks, support: ph.Episode,
            watch: Watch, options: argparse.Namespace) -> None:
    """RK4 in a scan on whole trajectories."""
    import jax
    import meta_rivals_jax as rival

    standardise(model, guide, train)
    start = rival.weights(model, guide)
    svi, update = rival.stepper(start, rival.schedule(RATE, options.steps))
    batches, state = train.batches(BATCH, options.seed), None
    for step in range(options.steps):
        batch = rival.batch(next(batches))
        state = svi.init(jax.random.PRNGKey(options.seed), *batch) if state is None else state
        state, loss = update(state, batch)
        float(loss)
        watch(step, lambda: torch.tensor(rival.prior_mean(start | svi.get_params(state), support.query.numpy()).__array__()))


ROWS = {"library": library, "naive": naive, "numpyro": numpyro}


def race(row: str, options: argparse.Namespace) -> dict[str, object]:
    """One row, from the start."""
    print(row, flush=True)
    system = ph.systems.Pendulum()
    train, held_out = system.simulate(options.tasks + 300, 8, options.seed).split(300)
    torch.manual_seed(options.seed)
    model = ph.models.MetaHybridVAE(system, latents=4, linear=False, noise=10.0)
    truth = torch.cat([held_out.truth[name] for name in (*system.physics, "unknown")], -1)
    watch = Watch(truth, options.budget, options.every[row])
    watch.start()
    try:
        ROWS[row](model, model.guide(), train, held_out.episode().support, watch, options)
    except Enough:
        pass
    return {"seconds": watch.reached and round(watch.reached, 1), "spent": round(watch.seconds, 1), "looks": watch.looks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=3000, help="what the learning rate's schedule is laid out for")
    parser.add_argument("--budget", type=float, default=1800.0, help="seconds for each row")
    parser.add_argument("--curriculum", type=lambda text: eval(text), default={0.0: 1})
    parser.add_argument("--segments", type=lambda x: eval(x), default=8)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/time_to_identify.json"))
    options = parser.parse_args()
    options.every = {"library": 100, "naive": 10, "numpyro": 50}
    one_thread()
    found = {row: race(row, options) for row in options.rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"seed": options.seed, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
