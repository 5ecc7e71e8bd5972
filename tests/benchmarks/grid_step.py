"""How long one training step takes on a grid, against what one would write without this library.

    python tests/benchmarks/grid_step.py [--batches 16 64 256] [--rounds 15] [--device cuda] [--out FILE]

Advection and diffusion on 20 points, of which the diffusion is known; the neural term is called at every inner point.
All rows run side by side, in turns, on one thread of one core, in the middle of a training. Reported are medians,
ratios of medians, the losses, which must agree, and the error of each way of integrating, in float64 and in units of
the sensors' noise. Explicit steps are limited by stability here: the longest of ``--steps`` show where it ends.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import grid_rivals
import numpy as np
import pyro
import rivals
import torch
import torchdiffeq
from elbo_step import LEARNING_RATE, Step, interleaved, library, machine, one_thread, stock, table
from torch import Tensor
from tqdm import tqdm

import pyro_hybrid as ph
from pyro_hybrid.dynamics.rk4 import seconds_compiling
from pyro_hybrid.dynamics.solve import failures_as_values
from pyro_hybrid.programs.module import local_parameters

SYSTEM = ph.systems.AdvectionDiffusion()
DIFFRAX = "numpyro, diffrax dopri5 1e-5"
LONGER = (
    1 / 15
)  # step of the rows with longer steps, 3.3 observations each: stable up to a diffusion of 0.107


def trained(steps: int) -> tuple[ph.Residual, rivals.Encoder]:
    """The weights that all rows start from: those of a training that is under way."""
    torch.manual_seed(0)
    residual, encoder, episode = (
        grid_rivals.residual(),
        grid_rivals.encoder(),
        grid_rivals.queries(1024),
    )
    svi = ours(residual, encoder, rate=3e-3)
    for i in tqdm(range(steps), desc="warming up", leave=False):
        index = torch.randint(0, 1024, (16,), generator=torch.Generator().manual_seed(i))
        with pyro.validation_enabled(False):
            svi.step(grid_rivals.part(episode, index))
    with torch.no_grad():  # next to no posterior noise, so that all rows have the same loss
        last = encoder.net[-1]
        last.weight[len(last.weight) // 2 :] = 0.0
        last.bias[len(last.weight) // 2 :] = -12.0
    return residual, encoder


class Problem:
    """A batch, and weights to start from."""

    def __init__(
        self, batch: int, weights: tuple[ph.Residual, rivals.Encoder], device: str
    ) -> None:
        self.residual, self.encoder = weights
        self.episode = grid_rivals.queries(batch, seed=1).to(device)
        self.device = device

    def fresh(self) -> tuple[ph.Residual, rivals.Encoder]:
        """Copies of the weights, on the device."""
        pyro.clear_param_store()
        residual, encoder = grid_rivals.residual(), grid_rivals.encoder()
        (
            residual.load_state_dict(self.residual.state_dict()),
            encoder.load_state_dict(self.encoder.state_dict()),
        )
        return residual.to(self.device), encoder.to(self.device)


def ours(
    residual: ph.Residual,
    encoder: rivals.Encoder,
    rate: float = LEARNING_RATE,
    size: int = grid_rivals.SIZE,
    **options: object,
) -> ph.SVI:
    """ph.SVI around ph.solve and ph.Residual."""
    model = grid_rivals.Ours(residual, size, **options)
    with local_parameters():
        guide = grid_rivals.Guide(encoder)
    return ph.SVI(
        model,
        guide,
        torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=rate, fused=True),
    )


def plain(
    problem: Problem, integrate: Callable[..., Tensor]
) -> tuple[grid_rivals.Plain, grid_rivals.Guide]:
    """Somebody's program around somebody's integrator."""
    residual, encoder = problem.fresh()
    return grid_rivals.Plain(
        grid_rivals.PlainTerm(residual).to(problem.device), integrate
    ), grid_rivals.Guide(encoder)


def jax_rows(problem: Problem) -> dict[str, Callable[[], Step]]:
    """The rows of numpyro, where it is installed."""
    if problem.device != "cpu" or any(
        importlib.util.find_spec(name) is None for name in ("numpyro", "diffrax")
    ):
        return {}
    import rivals_jax

    start = rivals_jax.weights(*problem.fresh())
    number = math.ceil(float(problem.episode.query.times[-1]) / LONGER - 1e-4)
    ways = {
        "numpyro, scan rk4": rivals_jax.scan_rk4,
        DIFFRAX: rivals_jax.adaptive,
        "numpyro, scan rk4, longer steps": rivals_jax.scan_longer(number),
    }
    return {
        name: lambda way=way: grid_rivals.numpyro_stepper(
            start, way, LEARNING_RATE, problem.episode
        )
        for name, way in ways.items()
    }


def rows(problem: Problem) -> dict[str, Callable[[], Step]]:
    """Name to a function that sets the row up."""

    def mine(**options: object) -> Step:
        return library(ours(*problem.fresh(), **options), problem.episode)

    return {
        "Pyro SVI, torchdiffeq dopri5 1e-5 (naive)": lambda: stock(
            *plain(problem, rivals.dopri5), problem.episode
        ),
        "Pyro SVI, torchdiffeq rk4": lambda: stock(*plain(problem, rivals.rk4), problem.episode),
        "pyro_hybrid": lambda: mine(),
        "pyro_hybrid, compiled": lambda: mine(compile=True),
        "pyro_hybrid, longer steps": lambda: mine(step=LONGER),
        "pyro_hybrid, longer steps, compiled": lambda: mine(step=LONGER, compile=True),
        **jax_rows(problem),
    }


@torch.no_grad()
def errors(problem: Problem, steps: list[float]) -> dict[str, float | None]:
    """Root mean square error of trajectories, in units of the sensors' noise; None where steps are unstable.

    With the learned term, and with diffusions spread over the system's whole range.
    """
    residual, encoder = problem.fresh()
    mean, episode = encoder(problem.episode.query.values)[0].double(), problem.episode.double()
    low, high = SYSTEM.ranges["diffusion"]
    diffusion, z = torch.linspace(low, high, len(mean)).to(mean).unsqueeze(1), mean[:, 1:]
    plain = grid_rivals.plain_field(
        grid_rivals.PlainTerm(residual).double().to(problem.device), diffusion, z
    )
    field = SYSTEM.known({"diffusion": diffusion}, residual.double().given(z[:, None, None, :]))
    start, times = episode.query.initial, episode.query.times

    def reference(field: grid_rivals.Field, y: Tensor, times: Tensor) -> Tensor:
        return torchdiffeq.odeint(field, y, times, method="dopri8", rtol=1e-10, atol=1e-10)

    with failures_as_values():
        paths = {
            "dopri5 1e-5": rivals.dopri5(plain, start[:, 0], times).transpose(0, 1),
            "rk4": ph.solve(field, start, times)[:, 0],
        }
        paths |= {f"rk4, step {s:g}": ph.solve(field, start, times, step=s)[:, 0] for s in steps}
    exact = reference(plain, start[:, 0], times).transpose(0, 1)
    error = {
        name: float((path - exact).square().mean().sqrt()) / SYSTEM.noise[0]
        for name, path in paths.items()
    }
    return {name: float(f"{e:.3g}") if e < 1e3 else None for name, e in error.items()}


def longest_stable() -> float:
    """The step beyond which rk4 blows up where diffusion is fastest."""
    fastest = (
        4.0 * math.sin(math.pi * (SYSTEM.size - 2) / (2 * SYSTEM.size - 2)) ** 2
    )  # of the grid's modes
    return 2.785 * SYSTEM.width**2 / (fastest * SYSTEM.ranges["diffusion"][1])


def measure(
    batch: int, weights: tuple[ph.Residual, rivals.Encoder], options: argparse.Namespace
) -> dict[str, object]:
    """One column of the table."""
    problem = Problem(batch, weights, options.device)
    steps, losses, first, compiling = {}, {}, {}, {}
    for name, build in tqdm(rows(problem).items(), desc=f"setting up B = {batch}", leave=False):
        before, start = seconds_compiling(), time.perf_counter()
        steps[name] = build()
        losses[name] = steps[name]() / batch
        steps[name]()
        first[name], compiling[name] = time.perf_counter() - start, seconds_compiling() - before
    times = interleaved(steps, options.rounds, options.device)
    medians = {name: statistics.median(t) for name, t in times.items()}
    naive, values = next(iter(medians.values())), list(losses.values())
    return {
        "batch": batch,
        "median_ms": {name: round(t, 2) for name, t in medians.items()},
        "quartiles_ms": {
            name: [round(q, 2) for q in np.quantile(t, (0.25, 0.75))] for name, t in times.items()
        },
        "times_faster_than_naive": {name: round(naive / t, 2) for name, t in medians.items()},
        "times_faster_than_diffrax": {
            name: round(medians[DIFFRAX] / t, 2)
            for name, t in medians.items()
            if DIFFRAX in medians
        },
        "loss_per_task": {name: round(loss, 3) for name, loss in losses.items()},
        "largest_difference_of_losses": float(
            f"{(max(values) - min(values)) / abs(values[0]):.2g}"
        ),
        "seconds_before_the_second_step": {name: round(s, 1) for name, s in first.items()},
        "seconds_compiling": {name: round(s, 1) for name, s in compiling.items() if s},
        "bound_ms": {},
        "error_in_noise_sds": errors(problem, options.steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--rounds", type=int, default=15, help="how often each row takes its turn")
    parser.add_argument(
        "--warmup", type=int, default=300, help="training steps before anything is measured"
    )
    parser.add_argument(
        "--steps",
        type=float,
        nargs="+",
        default=[0.03, 0.04, 0.05, 0.06, LONGER, 0.07, 0.08],
        help="step lengths whose errors are reported",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/grid_step.json"))
    options = parser.parse_args()
    one_thread()
    columns, weights = [], trained(options.warmup)
    for batch in options.batches:
        columns.append(measure(batch, weights, options))
        print(table(columns[-1]), flush=True)
    settings = machine(options.device) | {
        "rounds": options.rounds,
        "warmup_steps": options.warmup,
        "step": LONGER,
        "longest_stable_step": round(longest_stable(), 4),
        "width": grid_rivals.WIDTH,
        "points": grid_rivals.POINTS,
        "size": grid_rivals.SIZE,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"settings": settings, "columns": columns}, indent=2) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
