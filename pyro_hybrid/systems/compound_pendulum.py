"""The yardstick of the real double pendulum: classical models, fitted by least squares and run open loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy  # its parts are imported when they are used
import torch
from torch import Tensor

from pyro_hybrid.data.segments import truncate
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.dynamics.modes import nan_on_failure
from pyro_hybrid.dynamics.slopes import Field
from pyro_hybrid.dynamics.solve import solve
from pyro_hybrid.errors import fail, require
from pyro_hybrid.shapes import State

__all__ = ["HORIZONS", "RODS", "compound", "fitted", "median_errors", "open_loop", "point_mass"]

HORIZONS = (0.05, 0.1, 0.2, 0.4, 1.0)  # seconds
RODS = 450.5 / 589.0  # length of the lower arm over that of the upper one, in pixels

Model = Callable[[Tensor, Tensor], Field]


def compound(parameters: Tensor, scale: Tensor) -> Field:
    r"""The double pendulum of two rigid bodies with linear friction in the joints, in units of the upper's inertia.

    .. math::
        \ddot\theta_1 + b\cos\Delta\,\ddot\theta_2 + b\sin\Delta\,\dot\theta_2^2 + p_1\sin\theta_1
            &= -c_1\dot\theta_1 + c_2(\dot\theta_2 - \dot\theta_1) \\
        b\cos\Delta\,\ddot\theta_1 + a\ddot\theta_2 - b\sin\Delta\,\dot\theta_1^2 + p_2\sin\theta_2
            &= -c_2(\dot\theta_2 - \dot\theta_1), \qquad \Delta = \theta_1 - \theta_2

    Arguments:
        parameters: :math:`a, b, p_1, p_2, c_1, c_2`.
        scale: how many times as fast the task's clock runs, ``(task, 1)``. Gravity goes with its square.
    """
    a, b, p1, p2, c1, c2 = parameters.unbind(-1)
    p1, p2, c1, c2 = p1 * scale**2, p2 * scale**2, c1 * scale, c2 * scale

    def field(t: Tensor, state: State) -> State:
        upper, lower, speed1, speed2 = state
        sin, cos = b * (upper - lower).sin(), b * (upper - lower).cos()
        torque = c2 * (speed2 - speed1)
        push1 = torque - c1 * speed1 - sin * speed2.square() - p1 * upper.sin()
        push2 = -torque + sin * speed1.square() - p2 * lower.sin()
        inertia = a - cos.square()
        return speed1, speed2, (a * push1 - cos * push2) / inertia, (push2 - cos * push1) / inertia

    return field


def point_mass(parameters: Tensor, scale: Tensor) -> Field:
    """Two point masses on the arms without friction: g over the upper arm's length, and the lower mass's share."""
    gravity, share = parameters.unbind(-1)
    none, lever = torch.zeros_like(gravity), share * RODS
    return compound(torch.stack([lever * RODS, lever, gravity, lever * gravity, none, none]), scale)


STARTS: dict[Model, tuple[float, ...]] = {
    compound: (0.3, 0.4, 110.0, 40.0, 0.1, 0.1),
    point_mass: (110.0, 0.5),
}


def fitted(model: Model, tasks: Tasks, stages: Sequence[float] = (0.1, 0.2)) -> Tensor:
    """Parameters of :func:`compound` or :func:`point_mass` by least squares, open loop over all the tasks' windows.

    The scales are those of the truth and the initial states as measured. The errors are those of both angles in the
    first seconds of each window, in ``stages``: each begins with the parameters that the one before ended with.
    """
    require(
        model in STARTS,
        "compound or point_mass",
        model,
        "Fit another model with scipy.optimize.least_squares.",
    )
    best = np.log(STARTS[model])
    for seconds in stages:

        def errors(logs: np.ndarray, seconds: float = seconds) -> np.ndarray:
            states, observed = open_loop(model, torch.from_numpy(np.exp(logs)), tasks, seconds)
            return (
                (states[..., :2] - observed).flatten().nan_to_num(10.0).clamp(-10.0, 10.0).numpy()
            )

        best = scipy.optimize.least_squares(errors, best).x
    return torch.from_numpy(np.exp(best))


def open_loop(
    model: Model, parameters: Tensor, tasks: Tasks, seconds: float = torch.inf
) -> tuple[Tensor, Tensor]:
    """Predicted states from the measured initial ones, and the observed angles, ``(task, shot, time, ...)``."""
    if tasks.true_latents is None or "scale" not in tasks.true_latents:
        fail(
            "tasks with the scale of their clocks in true_latents",
            list(tasks.true_latents or ()),
            "Make them with Recordings.tasks(...).",
        )
    shots = tasks.shots().double()
    steps = min(seconds / float(shots.times[1] - shots.times[0]), float(len(shots.times)))
    few = truncate(shots, max(1, round(steps)))
    initial = few.measured_initial.unbind(-1)
    with nan_on_failure():
        states = solve(
            model(parameters, tasks.true_latents["scale"].double()), initial, few.times, substeps=2
        )
    return states, tasks.values[:, :, : len(few.times)].double()


def median_errors(
    predicted: Tensor, observed: Tensor, times: Tensor, horizons: Sequence[float] = HORIZONS
) -> Tensor:
    """The median over all windows of the angles' error at each horizon: root mean square of the two, in rad.

    Arguments:
        predicted, observed: ``(..., time, component)``, the two angles first.
        times: ``(time,)``, the first that of the initial state.
        horizons: times after it. A prediction that diverged counts as infinitely wrong.
    """
    clock = times - times[0]
    index = [int((clock - horizon).abs().argmin()) for horizon in horizons]
    require(
        all(
            k > 0 and abs(float(clock[k]) - h) < 1e-4 for k, h in zip(index, horizons, strict=True)
        ),
        f"observations at the horizons {tuple(horizons)}",
        f"times up to {float(clock[-1]):.4g}",
        "Make windows that are long enough, with a step that divides the horizons.",
    )
    error = (
        (predicted[..., index, :2] - observed[..., index, :2])
        .square()
        .mean(-1)
        .sqrt()
        .flatten(0, -2)
    )
    return error.nan_to_num(torch.inf, torch.inf).median(0).values
