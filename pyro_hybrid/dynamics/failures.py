"""SolverError: an integration that failed, with its cause, its place in the batch and its time."""

from __future__ import annotations

import math

from pyro.ops.integrator import register_exception_handler

__all__ = ["SolverError"]


class SolverError(RuntimeError):
    """An integration that failed.

    Arguments:
        cause: why it failed.
        index: place of the trajectory in the batch; its last two numbers are those of the task and the shot.
        time: when it failed.
        steps: number of steps taken before.
    """

    def __init__(
        self, cause: str, index: tuple[int, ...] = (), time: float = math.nan, steps: int = 0
    ) -> None:
        self.cause = cause
        self.index = index
        self.time = time
        self.steps = steps
        self.task = index[-2] if len(index) > 1 else (index[0] if index else 0)
        message = (
            cause  # Pyro raises it again with the whole message as the cause, and shapes after it
        )
        if not math.isnan(time):
            message = (
                f"{cause} in task {self.task} (batch index {index}) at t = {time:.4g} after {steps} steps. "
                "Shorten the segments, add substeps, or bound the neural term's output."
            )
        super().__init__(message)
        # To NUTS and HMC a diverging trajectory is a proposal to reject, not the end of the run.
        register_exception_handler("pyro_hybrid", _is_solver_error, warn_on_overwrite=False)


def _is_solver_error(error: Exception) -> bool:
    return isinstance(error, SolverError)
