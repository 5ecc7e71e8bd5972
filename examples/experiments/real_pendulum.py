"""Real double pendulum: point masses are known, the rest is neural, and a classical fit is the rival.

Tasks are windows of the recorded runs, with clocks that run s times as fast: gravity goes with s², friction with s, so
that the relative truth is known. Each task's latents are inferred from four windows of half a second, and windows of a
second are predicted from their measured initial states. The rival is the compound pendulum with linear friction, six
parameters by least squares on the same runs, which is told s. Both are judged by median errors on the same windows of
unseen runs; intervals of the ratio resample stretches of the recordings, since windows of two tasks may overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from experiments.identify import known_latents
from experiments.real_learned import (
    FAST,
    SUPPORT,
    Rivals,
    Settings,
    cut_tasks,
    fit_rivals,
    train,
)
from experiments.real_report import JOINTS, figure, table
from experiments.run import Choice, Result, Run, digits
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.dynamics.modes import nan_on_failure
from pyro_hybrid.dynamics.slopes import Field
from pyro_hybrid.dynamics.solve import solve
from pyro_hybrid.errors import fail, require
from pyro_hybrid.fitting.posterior import Posterior
from pyro_hybrid.models import MetaHybridVAE
from pyro_hybrid.programs.module import local_parameters
from pyro_hybrid.scores.mcc import mcc
from pyro_hybrid.systems import RecordedDoublePendulum, Recordings, ibm_double_pendulum
from pyro_hybrid.systems.compound_pendulum import HORIZONS, compound, open_loop, point_mass
from pyro_hybrid.systems.real_double_pendulum import FRAMES

__all__ = [
    "HELD_OUT_RUNS",
    "LEARNED_RUNS",
    "damping",
    "errors",
    "figure",
    "intervals",
    "judge",
    "predict_windows",
    "runs",
    "split_runs",
    "stretches",
    "table",
]

LEARNED_RUNS = tuple(range(10))
HELD_OUT_RUNS = (10, 11, 12, 13)  # IBM's archive goes on to run 20, which no result here uses
STRETCH = 2.0  # seconds of a recording that are resampled together


def runs(choice: Choice) -> list[Run]:
    """List a run for each seed."""
    return [Run(str(seed), partial(_run, seed, choice)) for seed in choice.seeds]


def split_runs(recordings: Recordings) -> tuple[Recordings, Recordings]:
    """Return the runs to learn from and the runs to judge on, by number; other runs are not used."""
    missing = {*LEARNED_RUNS, *HELD_OUT_RUNS} - set(recordings.runs)
    require(
        not missing,
        f"recordings of runs {[*LEARNED_RUNS, *HELD_OUT_RUNS]}",
        f"none of runs {sorted(missing)}",
        "Put their files into the folder given as --data.",
    )
    return (
        Recordings({run: recordings.states[run] for run in LEARNED_RUNS}),
        Recordings({run: recordings.states[run] for run in HELD_OUT_RUNS}),
    )


def _run(seed: int, choice: Choice) -> Result:
    learned, held_out = split_runs(ibm_double_pendulum(choice.data))
    settings = FAST if choice.fast else Settings()
    rivals = fit_rivals(learned, settings)
    posterior, fit = train(learned, rivals, seed, settings)
    return {
        "seed": seed,
        "learned from runs": learned.runs,
        "judged on runs": held_out.runs,
        **settings._asdict(),
        "training_seconds": round(fit.seconds, 1),
        **judge(posterior, held_out, rivals, seed, settings),
    }


def judge(
    posterior: Posterior, recordings: Recordings, rivals: Rivals, seed: int, settings: Settings
) -> Result:
    """Compute the errors of all models on the same windows, and compare the latents with the clock."""
    num_windows = SUPPORT + settings.queries
    windows = cut_tasks(recordings, settings.judged, num_windows, seed, points=101)
    clock = known_latents(windows)["scale"]
    predictions, latents = predict_windows(posterior.model, windows)
    hybrid = errors(predictions, windows)
    classical = {
        "compound": _errors_of_rival(compound, rivals.compound, windows),
        "point_mass": _errors_of_rival(point_mass, rivals.point_mass, windows),
    }
    places = stretches(recordings, settings, seed)[:, SUPPORT:].flatten()
    low, high = intervals(hybrid, classical["compound"], places, settings.resamples)
    ratio = hybrid.median(0).values / classical["compound"].median(0).values
    friction = damping(posterior.model, latents, windows)
    return {
        "hybrid": _numbers(hybrid.median(0).values),
        **{name: _numbers(error.median(0).values) for name, error in classical.items()},
        "ratio": _numbers(ratio),
        "ratio_low": _numbers(low),
        "ratio_high": _numbers(high),
        "stretches": len(places.unique()),
        "query_windows": len(hybrid),
        **_clock_scores(latents, clock),
        **_friction_scores(friction, clock),
        "clock": clock.flatten().tolist(),
        "gravity": latents["gravity"].flatten().tolist(),
        "neural": latents["unknown"].flatten().tolist(),
        "friction": friction.T.tolist(),
        "rival_parameters": _numbers(rivals.compound),
        "share": digits(rivals.point_mass[1]),
    }


def _errors_of_rival(rival: Callable[..., Field], parameters: Tensor, windows: Tasks) -> Tensor:
    states, _ = open_loop(rival, parameters, windows)
    return errors(states[:, SUPPORT:], windows)


@torch.no_grad()
def predict_windows(model: MetaHybridVAE, windows: Tasks) -> tuple[Tensor, dict[str, Tensor]]:
    """Predict the query windows, with latents inferred from the first 0.5 s of the support windows alone.

    Returns:
        States of the query windows, and means of the latents.
    """
    points = model.system.points
    support = truncated(windows, points).episode().support
    with local_parameters():
        belief = model.prior.belief(support, model)
    latents = {name: fn.mean for name, fn in belief.distributions().items()}
    query = windows.episode().query
    field = model.system.known({"gravity": latents["gravity"]}, model.force(latents["unknown"]))
    with nan_on_failure():
        states = solve(field, query.measured_initial.unbind(-1), query.times)
    return states, latents


def truncated(windows: Tasks, points: int) -> Tasks:
    """Keep the first times of windows, with four support windows."""
    return Tasks.from_trajectories(
        windows.times[:points],
        windows.values[:, :, :points].contiguous(),
        initial=measured_states(windows)[:, :, :points].contiguous(),
        num_support=SUPPORT,
    )


def measured_states(windows: Tasks) -> Tensor:
    """Return the measured states of windows at all times."""
    if windows.states is None:
        fail("windows with measured states", "none", "Cut them with Recordings.tasks.")
    return windows.states


def errors(states: Tensor, windows: Tasks) -> Tensor:
    """Compute the root mean square of both angles' errors at each horizon, (window, horizon).

    An error is infinite where the trajectory diverged.
    """
    step = float(windows.times[1])
    index = [round(horizon / step) for horizon in HORIZONS]
    residuals = states[..., index, :2] - windows.values[:, SUPPORT:, index]
    error = residuals.square().mean(-1).sqrt()
    return error.nan_to_num(torch.inf, torch.inf).flatten(0, 1).double()


def stretches(recordings: Recordings, settings: Settings, seed: int) -> Tensor:
    """Find the stretch of the run that each window begins in, (task, shot).

    Recordings of a clock and the run's number are cut in the same way as those of the pendulum.
    """
    clocks = {}
    for run, states in recordings.states.items():
        time = torch.arange(len(states), dtype=torch.float64) / FRAMES
        number = torch.full_like(time, 0.01 * run)
        constant = torch.full_like(time, 0.01)
        clocks[run] = torch.stack([0.01 * time, number, constant, torch.zeros_like(time)], -1)
    num_windows = SUPPORT + settings.queries
    windows = cut_tasks(Recordings(clocks), settings.judged, num_windows, seed, points=101)
    start = windows.values[:, :, 0]
    run = (100.0 * start[..., 1]).round().long()
    return run * 1000 + (100.0 / STRETCH * start[..., 0]).long()


def intervals(
    ours: Tensor, theirs: Tensor, places: Tensor, num_resamples: int
) -> tuple[Tensor, Tensor]:
    """Compute 95% intervals of the ratio of medians; windows that begin in one place are resampled together.

    Arguments:
        ours, theirs: errors, (window, horizon).
        places: the place that each window begins in, (window,).
        num_resamples: number of resamples.
    """
    generator = torch.Generator().manual_seed(0)
    names, index = places.unique(return_inverse=True)
    num_places = len(names)
    ratios = []
    for _ in range(num_resamples):
        drawn = torch.randint(num_places, (num_places,), generator=generator)
        repeats = torch.bincount(drawn, minlength=num_places)
        rows = torch.arange(len(ours)).repeat_interleave(repeats[index])
        ratios.append(ours[rows].median(0).values / theirs[rows].median(0).values)
    probabilities = torch.tensor([0.025, 0.975], dtype=ours.dtype)
    low, high = torch.stack(ratios).quantile(probabilities, 0)
    return low, high


@torch.no_grad()
def damping(model: MetaHybridVAE, latents: dict[str, Tensor], windows: Tasks) -> Tensor:
    """Compute the rate at which each joint is damped in the tasks' query windows, per second, (task, joint).

    A rate is the mean over states, weighted with the square of the joint's speed, which gives the loss of energy.
    """
    system = model.system
    states = measured_states(windows)[:, SUPPORT:].flatten(1, 2).unbind(-1)
    require(
        isinstance(system, RecordedDoublePendulum),
        "a model of the recorded double pendulum",
        type(system).__name__,
        "Train it with real_learned.train.",
        TypeError,
    )
    force = model.force(latents["unknown"])(*system.felt(latents["gravity"], states))
    squared_speeds = states[2].square(), (states[3] - states[2]).square()
    rates = []
    for unit, rate, weight in zip(system.UNITS[2:], force[2:], squared_speeds, strict=True):
        rates.append(unit * (rate * weight).sum(-1) / weight.sum(-1))
    return torch.stack(rates, -1)


def _clock_scores(latents: dict[str, Tensor], clock: Tensor) -> Result:
    """Score how well gravity and the neural latent determine the clock."""
    log_gravity = latents["gravity"].log()
    log_clock = clock.log()
    physics = mcc(log_gravity, log_clock)
    neural = mcc(latents["unknown"], clock)
    return {
        "log_gravity_strong": round(physics.strong, 5),
        "log_gravity_linear_r": round(float(physics.linear_r[0]), 5),
        "log_gravity_slope": round(float(slope(log_clock, log_gravity)), 4),
        "clock_relative_sd": digits((0.5 * log_gravity - log_clock).std()),
        "neural_strong": round(neural.strong, 4),
        "neural_linear_r": round(float(neural.linear_r[0]), 4),
    }


def _friction_scores(friction: Tensor, clock: Tensor) -> Result:
    """Score the trend of friction: its correlation with the clock, and the exponent at the mean, which is one in truth."""
    scores: Result = {}
    for joint, rate in zip(JOINTS, friction.T, strict=True):
        correlation = torch.corrcoef(torch.stack([rate, clock[:, 0]]))[0, 1]
        exponent = slope(clock[:, 0] / clock.mean(), rate / rate.mean())
        scores[f"{joint}_friction"] = {
            "mean": digits(rate.mean()),
            "r": digits(correlation),
            "exponent": digits(exponent),
        }
    return scores


def slope(x: Tensor, y: Tensor) -> Tensor:
    """Fit the slope of a line through points."""
    offset = x.flatten() - x.mean()
    return (offset * y.flatten()).sum() / offset.square().sum()


def _numbers(values: Tensor) -> list[float | None]:
    return [digits(value) for value in values]
