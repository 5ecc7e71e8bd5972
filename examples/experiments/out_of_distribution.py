"""Predictions out of distribution: initial states, or latents, beyond the ranges of the training.

Every initial component is drawn from above its range, by up to half of that range's radius; every latent from above
its range, by up to a quarter of it. Errors are relative, as in ``long_horizon``, and medians over systems. R is that of
the linear map to the truth, which is estimated within the ranges and applied beyond them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.identify import true_latents
from experiments.long_horizon import relative
from experiments.run import Choice, Result, Run, digits, slug
from experiments.settings import CASES, MODELS
from experiments.tables import grouped, markdown, panels, spread
from experiments.trained import Trained, exactly, trained
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.systems import System

__all__ = ["figure", "runs", "table", "widen_ranges"]

WHERE = ("within", "initial states beyond", "latents beyond")


def runs(choice: Choice) -> list[Run]:
    """List a run for each seed, system and model."""
    return [
        Run(slug(system, model, seed), partial(_run, system, model, seed, choice))
        for seed in choice.seeds
        for system in CASES
        for model in MODELS
    ]


def _run(system: str, model: str, seed: int, choice: Choice) -> Result:
    found, tasks = trained(system, model, seed, choice), 24 if choice.fast else 200
    made = [widen_ranges(CASES[system].system(), where) for where in WHERE]
    sets = [one.simulate(tasks, 8, 30_000 + seed) for one in made]
    clear = [exactly(one, tasks, 8, 30_000 + seed) for one in made]
    out: Result = {"system": system, "model": model, "seed": seed, "where": WHERE}
    out["error"] = [
        digits(_error(found, one[:100], other[:100]))
        for one, other in zip(sets, clear, strict=True)
    ]
    out["r"] = [round(value, 4) for value in _mapped(found, sets)]
    return out


def widen_ranges(system: System, where: str) -> System:
    """Change the ranges of a system to those beyond them."""
    latents, ranges = {*system.physics, *system.unknown}, dict(system.ranges)
    for name, (low, high) in system.ranges.items():
        if where == "initial states beyond" and name not in latents:
            ranges[name] = (high, high + 0.25 * (high - low))
        if where == "latents beyond" and name in latents:
            ranges[name] = (high, high + 0.25 * (high - low))
    system.ranges = ranges  # type: ignore[misc]  # of this instance alone
    return system


def _error(found: Trained, tasks: Tasks, clear: Tasks) -> Tensor:
    exact = clear.episode().query
    return relative(found.predicted(tasks.episode(), exact.initial), torch.as_tensor(exact.values))


def _mapped(found: Trained, sets: Sequence[Tasks]) -> list[float]:
    """Compute R, the mean over latents, of the linear map that is estimated within the ranges."""
    estimates, truths = zip(
        *((found.latents(tasks), true_latents(found, tasks)) for tasks in sets), strict=True
    )
    ones = [torch.cat([z, torch.ones(len(z), 1)], -1) for z in estimates]
    half = len(ones[0]) // 2
    matrix = torch.linalg.lstsq(ones[0][:half], truths[0][:half]).solution
    spread = truths[0].var(0)
    return [
        float(
            (1.0 - (z @ matrix - truth)[half * (k == 0) :].square().mean(0) / spread)
            .clamp(min=0.0)
            .sqrt()
            .mean()
        )
        for k, (z, truth) in enumerate(zip(ones, truths, strict=True))
    ]


def table(results: Sequence[Result]) -> str:
    """Tabulate a row for each system and model: errors, and R, within and beyond the ranges."""
    rows = [
        [
            system,
            model,
            str(len(found)),
            *(spread([one["error"][k] for one in found]) for k in range(3)),
            *(spread([one["r"][k] for one in found], 3) for k in range(3)),
        ]
        for (system, model), found in grouped(results, "system", "model").items()
    ]
    header = [f"{score}, {where}" for score in ("error", "R") for where in WHERE]
    return markdown(["system", "model", "seeds", *header], rows)


def figure(results: Sequence[Result]) -> Figure:
    """Plot errors within and beyond the ranges: a dot for each seed."""
    drawn, axes = panels(
        [system for (system,) in grouped(results, "system")], MODELS, "median error, in sd"
    )
    for one in results:
        at = MODELS.index(one["model"])
        places = [k + 0.11 * (at - 2.5) for k in range(3)]
        axes[one["system"]].semilogy(places, one["error"], "o", ms=4, alpha=0.8, color=f"C{at}")
        axes[one["system"]].set_xticks(
            range(3), ("within", "initial states\nbeyond", "latents\nbeyond"), fontsize=8
        )
        axes[one["system"]].set_xlim(-0.45, 2.45)
    return drawn
