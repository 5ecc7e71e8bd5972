"""fix_gauge: spread the points of a model's gauge over the states that training tasks visit."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.data.tasks import Tasks, require_tasks
from pyro_hybrid.dynamics.modes import Solution, record_solutions, skip_integration
from pyro_hybrid.errors import require
from pyro_hybrid.nets.gauge import Gauge
from pyro_hybrid.programs.run import run_at

__all__ = ["fix_gauge"]

LOWEST_RANK, RANK_RANGE = 0.05, 0.9  # beyond, in the tails, few points would outweigh all others
LEAST_DISTINCT = 64  # points that are no mirror images of each other
NODES = (0.0, 0.1679061842, 0.5287617831, 0.6010186554, 0.9115893077)  # Chebyshev's, positive half


@torch.no_grad()
def fix_gauge(model: nn.Module, tasks: Tasks, num_points: int | None = None) -> None:
    """Let the physics explain all it can, exactly, where training came only near to it.

    Places the points of the model's :class:`~pyro_hybrid.Gauge`. The program runs on all trajectories with every latent
    at its prior mean; components of the state, and time, are spread evenly over the middle nine tenths of their
    values, independently of each other. What comes after a trajectory's last observation is padding and doesn't count.
    Fields on a grid are taken as they begin. Call it after training, with training tasks.

    Arguments:
        model: a program with a Gauge, changed in place.
        tasks: where its trajectories start.
        num_points: the largest number of points; by default 1024, or 512 fields on a grid.
    """
    gauge = _gauge_of(model)
    require_tasks(tasks)
    require(
        num_points is None or isinstance(num_points, int) and 1 <= num_points <= gauge.capacity,
        f"num_points from 1 to {gauge.capacity}",
        num_points,
        "Leave num_points out for the most.",
    )
    size = num_points or gauge.capacity
    previous_size = int(gauge.num_points)
    gauge.clear()
    shots = tasks.shots()
    try:
        solution = _solution_at_means(model, Episode(None, shots), gauge)
        points = _first_fields(solution, size) if gauge.grid else _spread(solution, shots, size)
    except BaseException:
        gauge.num_points.fill_(previous_size)
        raise
    gauge.place(*points)


def _gauge_of(model: nn.Module) -> Gauge:
    gauges = [module for module in model.modules() if isinstance(module, Gauge)]
    require(
        len(gauges) == 1,
        "a model with one ph.Gauge",
        f"{type(model).__name__} with {len(gauges)}",
        "Assign it in __init__ (self.gauge = ph.Gauge(components)) and call it in forward.",
    )
    return gauges[0]


def _solution_at_means(model: nn.Module, episode: Episode, gauge: Gauge) -> Solution:
    """Run a program with every latent at its prior mean; its last solution that has the gauge's components."""
    with record_solutions() as solutions:
        if gauge.grid:
            with skip_integration():
                run_at(model, episode, {})
        else:
            run_at(model, episode, {})
    fitting = [x for x in solutions if x.states.shape[-1] == gauge.components]
    require(
        bool(fitting),
        f"a program that calls ph.solve with a state of {gauge.components} components",
        f"states of {[x.states.shape[-1] for x in solutions]} components",
        "Give the Gauge as many components as the state has.",
    )
    return fitting[-1]


def _first_fields(solution: Solution, size: int) -> tuple[Tensor, Tensor]:
    fields = solution.states[..., 0, :].flatten(0, -2)[:size]
    return solution.times.flatten()[:1].expand(len(fields)), fields


def _spread(solution: Solution, shots: Shots, size: int) -> tuple[Tensor, Tensor]:
    """Spread time and the components of the state evenly over their ranks."""
    times, states = solution
    is_padding = _is_padding(times, shots)
    is_finite = (states.isfinite().all(-1) | is_padding).all(-1, keepdim=True)
    is_visited = is_finite & ~is_padding
    ordered = states[is_visited].sort(0).values
    require(
        len(ordered) > 0,
        "trajectories that stay finite where latents are at their prior means",
        "none",
        "Train the model first.",
    )
    even = _even_points(size, ordered.shape[-1]).to(ordered.device)
    rank = (LOWEST_RANK + RANK_RANGE * even).to(ordered.dtype)
    index = (rank[:, 1:] * (len(ordered) - 1)).round().long()
    visited_times = times.expand(is_visited.shape)[is_visited]
    start, end = visited_times.min(), visited_times.max()
    return start + rank[:, 0] * (end - start), ordered.gather(0, index)


def _even_points(size: int, num_components: int) -> Tensor:
    """Points of the unit cube of time and components, ``(at most size, 1 + component)``, whose means are integrals.

    If nine or more per axis are affordable, they form a grid: integrals of smooth functions then have next to no error.
    Otherwise they are quasi-random.

    References:
        Sur les quadratures (Tchebychef, 1874): nodes of equal weight, exact for polynomials of degree nine
    """
    num_axes = 1 + num_components
    num_panels = int((size + 0.5) ** (1.0 / num_axes)) // 9
    if num_panels == 0:
        return _mirrored_points(size, num_components)
    half = torch.tensor(NODES, dtype=torch.float64)
    nodes = 0.5 + 0.5 * torch.cat([-half[1:].flip(0), half])
    axis = (nodes + torch.arange(num_panels).unsqueeze(-1)).flatten() / num_panels
    return torch.cartesian_prod(*[axis] * num_axes)


def _mirrored_points(size: int, num_components: int) -> Tensor:
    """Quasi-random points, ``(size, 1 + component)``, with the mirror images of each in the components.

    Friction is odd in a velocity and gravity is not, so that their products average to zero where components are
    independent. Mirrored points get this right at any size.
    """
    num_mirrors = min(num_components, int(math.log2(max(1, size // LEAST_DISTINCT))))
    engine = torch.quasirandom.SobolEngine(1 + num_components, scramble=True, seed=0)
    points = engine.draw(-(-size // 2**num_mirrors))
    for i in range(num_mirrors):
        image = points.clone()
        image[:, 1 + i] = 1.0 - image[:, 1 + i]
        points = torch.cat([points, image])
    return points[:size]


def _is_padding(times: Tensor, shots: Shots) -> Tensor:
    """Tell times of a solution after the last observation of their trajectory, ``(task, shot, time)``."""
    # A program may count time from each start, so that only the time since then can be compared.
    elapsed = times - times[..., :1]
    clock = shots.expanded_times
    is_observed = shots.observed.any(-1)
    duration = (clock - clock[..., :1]).where(is_observed, -torch.inf).amax(-1, keepdim=True)
    return elapsed > duration
