"""How long until a forced, damped pendulum is identified: wall-clock to a held-out linear R of 0.9 on all four latents.

    python tests/benchmarks/time_to_identify.py [--rows library ...] [--seed 0] [--budget 1800] [--out FILE]

The same model, encoders, starting weights, data and optimiser, four ways:

    library          eight segments of one step of each shot at a time, supports then read with computed evidence
    encoder alone    the same training, supports read by the encoder, as the two below have to
    naive            a plain Pyro program around torchdiffeq's dopri5, on whole trajectories
    numpyro          RK4 in a scan, on whole trajectories; needs the extra ``bench``

One thread. Set-up, compilation and reading the held-out supports count; comparing them with the truth doesn't. A row
that hasn't arrived when its budget or its steps are spent says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from elbo_step import machine, one_thread
from meta_rivals import Naive, standardise
from torch import Tensor, nn

import pyro_hybrid as ph

ENOUGH, BATCH, RATE, SEGMENTS = 0.9, 48, 3e-3, 8
STEPS = {
    "library": 1500,
    "encoder alone": 3000,
    "naive": 4000,
    "numpyro": 4000,
}  # of the learning rate's schedule
EVERY = {"library": 100, "encoder alone": 50, "naive": 25, "numpyro": 50}  # steps between two looks


class Enough(Exception):
    """Identified, or out of time."""


@dataclass
class Watch:
    """A clock that stands still while estimates are compared with the truth, and remembers what came out."""

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
        if (
            step + 1
        ) % self.every and time.perf_counter() - self.since + self.seconds < self.budget:
            return
        found = estimate()
        self.seconds += time.perf_counter() - self.since
        r = ph.mcc(found, self.truth).linear_r
        self.looks.append(
            {"step": step + 1, "seconds": round(self.seconds, 2), "linear_r": r.round(4).tolist()}
        )
        print(
            f"  step {step + 1:>6}, {self.seconds:7.1f} s, linear R {[round(float(x), 3) for x in r]}",
            flush=True,
        )
        if float(r.min()) >= ENOUGH:
            self.reached = self.seconds
        if self.reached or self.seconds >= self.budget:
            raise Enough
        self.start()


@dataclass
class Entry:
    """What every row gets."""

    model: ph.models.MetaHybridVAE
    guide: ph.AmortizedGuide
    train: ph.Tasks
    support: ph.Shots
    watch: Watch
    steps: int
    seed: int

    def fit(
        self, model: nn.Module, guide: nn.Module, read: Callable[[], Tensor], **settings: object
    ) -> None:
        """Train, with a look from time to time."""
        ph.meta_train(
            model,
            guide,
            self.train,
            num_steps=self.steps,
            batch_size=BATCH,
            learning_rate=RATE,
            seed=self.seed,
            progress=False,
            callback=lambda step, fit: self.watch(step, read),
            **settings,
        )


@torch.no_grad()
def read(
    model: ph.HybridModel, support: ph.Shots, evidence: ph.GaussNewton | None = None
) -> Tensor:
    """Compute prior means in unconstrained coordinates, (task, latent).

    Arguments:
        model: its prior reads the support with an encoder.
        support: the shots to read.
        evidence: evidence that goes on from the encoder's, or None for the encoder alone.
    """
    belief = model.prior.belief(support, model)
    if evidence is not None:
        population = model.prior.population().expand(support.shape[0])
        shots = support.sorted_shots
        belief = population + evidence(population, shots, model, start=belief)
    return belief.moments()[0]


def library(entry: Entry, evidence: ph.GaussNewton | None = None) -> None:
    entry.fit(
        entry.model,
        entry.guide,
        lambda: read(entry.model, entry.support, evidence),
        curriculum={0.0: 1},
        segments_per_shot=SEGMENTS,
    )


def naive(entry: Entry) -> None:
    rival = Naive(entry.model)
    entry.fit(
        rival,
        rival.guide(entry.guide),
        lambda: read(rival, entry.support),
        curriculum={0.0: None},
    )


def numpyro(entry: Entry) -> None:
    import jax
    import meta_rivals_jax as rival

    standardise(entry.model, entry.guide, entry.train)
    start, support = rival.weights(entry.model, entry.guide), entry.support.values.numpy()
    svi, update = rival.stepper(start, rival.schedule(RATE, entry.steps))
    batches, state = entry.train.batches(BATCH, entry.seed), None

    def estimate() -> Tensor:
        return torch.from_numpy(np.array(rival.prior_mean(start | svi.get_params(state), support)))

    for step in range(entry.steps):
        batch = rival.batch(next(batches))
        state = svi.init(jax.random.PRNGKey(entry.seed), *batch) if state is None else state
        state, loss = update(state, batch)
        float(loss)
        entry.watch(step, estimate)


ROWS: dict[str, Callable[[Entry], None]] = {
    "library": lambda entry: library(entry, ph.GaussNewton(1, segments=(7, 7))),
    "encoder alone": library,
    "naive": naive,
    "numpyro": numpyro,
}


def race(row: str, options: argparse.Namespace) -> dict[str, object]:
    """One row, from the start."""
    print(row, flush=True)
    system = ph.systems.Pendulum()
    train, held_out = system.simulate(options.tasks + 300, 8, options.seed).split(300)
    torch.manual_seed(options.seed)
    model = ph.models.MetaHybridVAE(system, latents=4, linear=False, noise=10.0)
    truth = torch.cat([held_out.true_latents[name] for name in (*system.physics, "unknown")], -1)
    watch = Watch(truth, options.budget, EVERY[row])
    watch.start()
    with contextlib.suppress(Enough):
        ROWS[row](
            Entry(
                model,
                model.guide(),
                train,
                held_out.episode().support,
                watch,
                STEPS[row],
                options.seed,
            )
        )
    return {
        "seconds": watch.reached and round(watch.reached, 1),
        "spent": round(watch.seconds, 1),
        "schedule": STEPS[row],
        "looks": watch.looks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--budget", type=float, default=1800.0, help="seconds for each row")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/time_to_identify.json"))
    options = parser.parse_args()
    one_thread()
    found = {row: race(row, options) for row in options.rows}
    written = {
        "seed": options.seed,
        "tasks": options.tasks,
        "enough": ENOUGH,
        "settings": machine(),
        "rows": found,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(written, indent=2) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
