"""How long one training step takes, against what one would write without this library.

    python tests/benchmarks/elbo_step.py [--batches 64 256 1024] [--rounds 15] [--device cuda] [--out FILE]

All rows run side by side, in turns, on one thread of one core, in the middle of a training: at its start networks are
flat, and adaptive solvers have it easy. Reported are medians, ratios of medians, and the error of each row's
trajectories against a reference solution, in units of the sensors' noise: equal times are worth little at unequal
errors. The rows of JAX need the extra ``bench``; without it they are left out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import rivals
import torch
import torchdiffeq
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import Tensor
from tqdm import tqdm

import pyro_hybrid as ph
from pyro_hybrid.beliefs.belief import Gaussian
from pyro_hybrid.dynamics.rk4 import seconds_compiling
from pyro_hybrid.programs.module import local_parameters

Step = Callable[[], float]
LEARNING_RATE = 1e-9  # an optimiser that works, and leaves the weights as they are
NAIVE = "Pyro SVI, torchdiffeq dopri5 1e-5 (naive)"
LONGER = 1 / 6  # step of the rows with longer steps, in the time of 1.7 observations


class Problem:
    """A batch, and the weights that all rows start from: those of a training that is under way."""

    def __init__(self, batch: int, warmup: int, device: str) -> None:
        torch.manual_seed(0)
        self.residual, self.encoder = rivals.residual(), rivals.Encoder()
        self._train(warmup)
        with torch.no_grad():  # next to no posterior noise, so that all rows have the same loss
            last = self.encoder.net[-1]
            last.weight[len(last.weight) // 2 :] = 0.0
            last.bias[len(last.weight) // 2 :] = -6.0
        self.episode = _queries(rivals.data(batch, seed=1)).to(device)
        self.device = device

    def _train(self, steps: int) -> None:
        episode = _queries(rivals.data(64 * 16))
        svi = ours(self.residual, self.encoder, rate=3e-3, step=LONGER)
        for i in tqdm(range(steps), desc="warming up", leave=False):
            with pyro.validation_enabled(False):
                svi.step(
                    _part(
                        episode,
                        torch.randint(0, 1024, (64,), generator=torch.Generator().manual_seed(i)),
                    )
                )

    def fresh(self) -> tuple[ph.Residual, rivals.Encoder]:
        """Copies of the weights, on the device."""
        pyro.clear_param_store()
        residual, encoder = rivals.residual(), rivals.Encoder()
        (
            residual.load_state_dict(self.residual.state_dict()),
            encoder.load_state_dict(self.encoder.state_dict()),
        )
        return residual.to(self.device), encoder.to(self.device)


def _queries(tasks: ph.Tasks) -> ph.Episode:
    return _part(tasks.episode(), torch.arange(len(tasks)))


def _part(episode: ph.Episode, index: Tensor) -> ph.Episode:
    query = episode.query
    shots = ph.Shots.from_tensors(query.times, query.values[index, :1], query.initial[index, :1])
    return ph.Episode(None, shots)


def ours(
    residual: ph.Residual, encoder: rivals.Encoder, rate: float = LEARNING_RATE, **options: object
) -> ph.SVI:
    """ph.SVI around ph.solve and ph.Residual."""
    model = rivals.Ours(residual, **options)
    with local_parameters():
        guide = rivals.Guide(encoder)
    return ph.SVI(
        model,
        guide,
        torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=rate, fused=True),
    )


def plain(problem: Problem, integrate: Callable[..., Tensor]) -> tuple[rivals.Plain, rivals.Guide]:
    """Somebody's program around somebody's integrator."""
    residual, encoder = problem.fresh()
    return rivals.Plain(rivals.PlainTerm(residual).to(problem.device), integrate), rivals.Guide(
        encoder
    )


def stock(model: PyroModule, guide: PyroModule, episode: ph.Episode) -> Step:
    """A step of Pyro's own SVI."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": LEARNING_RATE}), TraceMeanField_ELBO())
    store = pyro.get_param_store()
    state = store.get_state()

    def step() -> float:
        store.set_state(state)
        return svi.step(episode)

    return step


def library(svi: ph.SVI, episode: ph.Episode) -> Step:
    """This library's step, as meta_train takes it: validation was for the first one."""

    def step() -> float:
        with pyro.validation_enabled(False):
            return svi.step(episode)

    return step


def _steps() -> int:
    """Number of the longer steps."""
    return math.ceil((rivals.POINTS - 1) * rivals.STEP / LONGER)


def jax_rows(problem: Problem) -> dict[str, Callable[[], Step]]:
    """The rows of numpyro, where it is installed."""
    if problem.device != "cpu" or any(
        importlib.util.find_spec(name) is None for name in ("numpyro", "diffrax")
    ):
        return {}
    import rivals_jax

    episode = problem.episode
    batch = (
        episode.query.times.numpy(),
        episode.query.initial[:, 0].numpy(),
        episode.query.values[:, 0].numpy(),
    )
    start = rivals_jax.weights(*problem.fresh())
    ways = {
        "numpyro, scan rk4": rivals_jax.scan_rk4,
        "numpyro, diffrax dopri5 1e-5": rivals_jax.adaptive,
        "numpyro, scan rk4, longer steps": rivals_jax.scan_longer(_steps()),
    }
    return {
        name: lambda way=way: rivals_jax.stepper(start, way, LEARNING_RATE, batch)
        for name, way in ways.items()
    }


def rows(problem: Problem) -> dict[str, Callable[[], Step]]:
    """Name to a function that sets the row up."""

    def mine(**options: object) -> Step:
        return library(ours(*problem.fresh(), **options), problem.episode)

    return {
        NAIVE: lambda: stock(*plain(problem, rivals.dopri5), problem.episode),
        "Pyro SVI, torchdiffeq rk4": lambda: stock(*plain(problem, rivals.rk4), problem.episode),
        "Pyro SVI, own rk4 loop": lambda: stock(*plain(problem, rivals.plain_rk4), problem.episode),
        "pyro_hybrid": lambda: mine(),
        "pyro_hybrid, compiled": lambda: mine(compile=True),
        "pyro_hybrid, longer steps": lambda: mine(step=LONGER),
        "pyro_hybrid, longer steps, compiled": lambda: mine(step=LONGER, compile=True),
        **jax_rows(problem),
    }


def interleaved(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of every step, the rows taking turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(rounds), desc="measuring", leave=False):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def bound(batch: int, evaluations: int, rounds: int = 50) -> float:
    """Milliseconds of the arithmetic alone: three products a layer and one sigmoid a unit, at every evaluation."""
    features, width = (rivals.INPUTS + 1) * (rivals.LATENTS + 1), rivals.WIDTH
    u, h, out = (torch.randn(n, batch) for n in (features, width, rivals.LATENTS + 1))
    first, hidden, last = (
        torch.randn(width, features),
        torch.randn(width, width),
        torch.randn(len(out), width),
    )

    def evaluation() -> None:
        for weight, x, y in ((first, u, h), (hidden, h, h), (last, h, out)):
            weight @ x, weight.T @ y, y @ x.T
        h.sigmoid(), h.sigmoid()

    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        evaluation()
        times.append(time.perf_counter() - start)
    return 1e3 * evaluations * statistics.median(times)


@torch.no_grad()
def errors(problem: Problem) -> dict[str, float]:
    """Root mean square error of each integrator's trajectories, in units of the sensors' noise."""
    residual, encoder = problem.fresh()
    mean = encoder(problem.episode.query.values)[0]
    rate, z = (2.0 * mean[:, :1]).exp(), mean[:, 1:]
    start, times = problem.episode.query.initial[:, 0], problem.episode.query.times
    plain = rivals.PlainTerm(residual).to(problem.device)

    def states(integrate: Callable[..., Tensor], exact: bool = False) -> Tensor:
        net, kind = (plain.double(), torch.float64) if exact else (plain.float(), torch.float32)

        def field(t: Tensor, y: Tensor) -> Tensor:
            return torch.cat(
                [y[:, 1:], -rate.to(kind) * y[:, :1].sin() + net(t, y, z.to(kind))], -1
            )

        return integrate(field, start.to(kind), times.to(kind)).double()

    def longer(field: Callable[..., Tensor], y: Tensor, times: Tensor) -> Tensor:
        def split(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return field(t, torch.cat(state, -1)).split(1, -1)

        parts = tuple(y.split(1, -1))
        return ph.solve(split, parts, times, step=LONGER)[:, 0].transpose(0, 1)

    def reference(field: Callable[..., Tensor], y: Tensor, times: Tensor) -> Tensor:
        return torchdiffeq.odeint(field, y, times, method="dopri8", rtol=1e-9, atol=1e-9)

    exact, noise = states(reference, exact=True), ph.systems.Pendulum().noise[0]
    ways = {"dopri5 1e-5": rivals.dopri5, "rk4": rivals.plain_rk4, "rk4, longer steps": longer}
    return {
        name: float((states(way) - exact).square().mean().sqrt()) / noise
        for name, way in ways.items()
    }


def evidence(problem: Problem, compile: bool) -> Step:
    """Compute evidence of all four latents from the same trajectories: one iteration of ph.GaussNewton."""
    residual, encoder = problem.fresh()
    model = rivals.Ours(residual, step=LONGER, compile=compile)
    families = {"log_omega": ph.families.Normal(1), "unknown": ph.families.Normal(rivals.LATENTS)}
    with torch.no_grad():
        mean = encoder(problem.episode.query.values)[0]
    belief = Gaussian.around(families, mean, 1.0)

    def step() -> float:
        with pyro.validation_enabled(False):
            increment = ph.GaussNewton(1)(belief, problem.episode.query, model)
            return float((belief + increment).moments()[0].sum())

    return step


def measure(batch: int, options: argparse.Namespace) -> dict[str, object]:
    """One column of the table."""
    problem = Problem(batch, options.warmup, options.device)
    steps, losses, first, compiling = {}, {}, {}, {}
    chosen = {name: build for name, build in rows(problem).items() if options.only in name}
    for name, build in tqdm(chosen.items(), desc=f"setting up B = {batch}", leave=False):
        before, start = seconds_compiling(), time.perf_counter()
        steps[name] = build()
        losses[name] = steps[name]() / batch
        steps[name]()
        first[name], compiling[name] = time.perf_counter() - start, seconds_compiling() - before
    extra = {f"evidence{', compiled' if c else ''}": evidence(problem, c) for c in (False, True)}
    for step in extra.values():
        step(), step()
    times = interleaved(steps | extra, options.rounds, options.device)
    medians = {name: statistics.median(t) for name, t in times.items()}
    naive = medians.get(NAIVE)
    evaluations = {"rk4": 4 * (rivals.POINTS - 1), "rk4, longer steps": 4 * _steps() + 1}
    return {
        "batch": batch,
        "median_ms": {name: round(t, 2) for name, t in medians.items()},
        "quartiles_ms": {
            name: [round(q, 2) for q in np.quantile(t, (0.25, 0.75))] for name, t in times.items()
        },
        "times_faster_than_naive": {name: round(naive / medians[name], 2) for name in steps}
        if naive
        else {},
        "loss_per_task": {name: round(loss, 4) for name, loss in losses.items()},
        "seconds_before_the_second_step": {name: round(s, 1) for name, s in first.items()},
        "seconds_compiling": {name: round(s, 1) for name, s in compiling.items() if s},
        "bound_ms": {}
        if options.device != "cpu"
        else {n: round(bound(batch, k), 2) for n, k in evaluations.items()},
        "error_in_noise_sds": {name: float(f"{e:.3g}") for name, e in errors(problem).items()},
    }


def machine(device: str = "cpu") -> dict[str, object]:
    """On what it was measured."""
    name = (
        torch.cuda.get_device_name()
        if device != "cpu"
        else platform.processor() or platform.machine()
    )
    versions = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name)
        for name in ("torch", "pyro-ppl", "jax", "numpyro", "diffrax")
        if importlib.util.find_spec(name.removesuffix("-ppl"))
    }
    return {"device": name, "threads": torch.get_num_threads(), "versions": versions}


def one_thread(threads: int = 1) -> None:
    """One thread on one core, for torch and JAX alike; or a few."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def table(column: dict[str, dict[str, float]]) -> str:
    """One batch size, to read in a terminal."""
    lines = [f"B = {column['batch']}: {'row':<44}{'ms':>9}{'naive / row':>13}{'loss':>12}"]
    for name, ms in column["median_ms"].items():
        ratio = column["times_faster_than_naive"].get(name)
        lines.append(
            f"{'':>8}{name:<44}{ms:>9.1f}{ratio or '':>13}{column['loss_per_task'].get(name, ''):>12}"
        )
    lines += [f"{'':>8}{'bound, ' + name:<44}{ms:>9.1f}" for name, ms in column["bound_ms"].items()]
    return "\n".join([*lines, f"{'':>8}errors in noise sds: {column['error_in_noise_sds']}"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=15, help="how often each row takes its turn")
    parser.add_argument(
        "--warmup", type=int, default=300, help="training steps before anything is measured"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="leave out rows without this text in their name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/elbo_step.json"))
    options = parser.parse_args()
    one_thread(options.threads)
    columns = []
    for batch in options.batches:
        columns.append(measure(batch, options))
        print(table(columns[-1]), flush=True)
    settings = machine(options.device) | {
        "rounds": options.rounds,
        "warmup_steps": options.warmup,
        "step": LONGER,
        "points": rivals.POINTS,
        "width": rivals.WIDTH,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"settings": settings, "columns": columns}, indent=2) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
