"""Checks of a data set, made before it reaches a program; a message names the task."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_hybrid.errors import fail, require, require_floating

__all__ = [
    "check_clocks",
    "check_initial",
    "check_inputs",
    "check_latents",
    "check_pieces",
    "check_rows",
    "check_times",
    "check_trajectories",
    "require_integer",
    "require_measured",
    "require_same_kind",
]

LARGEST = 1e15  # squares of thousands of these can still be added up in float32
_log = logging.getLogger(__name__)


def check_trajectories(
    times: Tensor, values: Tensor, num_support: int, observed: Tensor | None
) -> None:
    """Check a data set that comes from outside."""
    require_floating("times", times)
    require_floating("values", values)
    require_same_kind("times", times, "values", values)
    require(
        values.dim() == 4,
        "values with axes (task, shot, time, sensor)",
        f"{values.dim()} axes",
        "Add the missing axes with unsqueeze, and pad trajectories of different lengths.",
    )
    require(
        values.numel() > 0,
        "at least one task, shot, time and sensor",
        tuple(values.shape),
        "Check how the data were read.",
    )
    check_clocks(times, values.shape)
    check_times(times)
    _check_num_support(num_support, values.shape[1])
    if observed is not None:
        _check_observed(observed, values)
    require_measured("values", values, observed)
    _warn_of_constant_tasks(values, observed)


def check_initial(initial: Tensor, values: Tensor) -> None:
    """Check measured states, at the first time or at all times, against the values."""
    if isinstance(initial, tuple | list):
        fail(
            "initial states as one tensor (task, shot, component)",
            f"a {type(initial).__name__} of {len(initial)}",
            "Stack the components: torch.stack(initial, -1).",
            TypeError,
        )
    require_floating("initial", initial)
    require(
        initial.dtype == values.dtype,
        f"initial in {values.dtype}, as the values",
        initial.dtype,
        "Convert one.",
        TypeError,
    )
    axes = 3 if initial.dim() == 4 else 2
    shape = tuple(values.shape[:axes])
    require(
        initial.dim() == axes + 1 and tuple(initial.shape[:axes]) == shape and initial.numel() > 0,
        f"initial states of shape ({', '.join(map(str, shape))}, component)",
        tuple(initial.shape),
        "Give one state for each shot of each task, or one for each of its times.",
    )


def check_inputs(inputs: Tensor | None, values: Tensor) -> None:
    """Check known controls against the values."""
    if inputs is None:
        return
    require_floating("inputs", inputs)
    require_same_kind("values", values, "inputs", inputs)
    shape = tuple(values.shape[:3])
    require(
        inputs.dim() == 4 and tuple(inputs.shape[:3]) == shape and inputs.numel() > 0,
        f"inputs of shape ({', '.join(map(str, shape))}, input)",
        tuple(inputs.shape),
        "Give one value of each input for each time of each shot.",
    )
    require_measured("inputs", inputs)


def check_latents(true_latents: object, num_tasks: int) -> None:
    """Check latents that are known, by name."""
    if true_latents is None:
        return
    if not isinstance(true_latents, Mapping):
        fail(
            "true_latents, a mapping from names to tensors",
            type(true_latents).__name__,
            "Name them: true_latents={'omega': tensor}.",
            TypeError,
        )
    for name, value in true_latents.items():
        label = f"true_latents[{name!r}]"
        if not isinstance(value, Tensor) or value.dim() != 2 or len(value) != num_tasks:
            is_tensor = isinstance(value, Tensor)
            fail(
                f"{label}, a tensor of shape ({num_tasks}, component)",
                tuple(value.shape) if is_tensor else type(value).__name__,
                "Give one row for each task.",
            )
        is_wrong = ~torch.isfinite(value)
        require(
            not bool(is_wrong.any()),
            f"{label} without NaN or Inf",
            f"some in task {_numbers(is_wrong.any(1))}",
            "Leave out the latent, or the tasks in which it is unknown.",
        )


def check_rows(rows: object) -> None:
    """Check what selects tasks or shots of a data set."""
    if isinstance(rows, Tensor):
        require(
            rows.dim() == 1 and not rows.is_floating_point() and not rows.is_complex(),
            "a tensor of row numbers, or of True and False, with one axis",
            f"{rows.dtype} of shape {tuple(rows.shape)}",
            "Pass torch.tensor([0, 3]).",
            TypeError,
        )
        return
    if not isinstance(rows, slice):
        fail(
            "a slice or a tensor of rows",
            repr(rows),
            "One task is a data set too: tasks[3:4].",
            TypeError,
        )
    for bound in (rows.start, rows.stop, rows.step):
        require(
            bound is None or _is_integer(bound),
            "a slice with integer bounds",
            repr(rows),
            "Convert the bounds with int().",
            TypeError,
        )


def require_integer(name: str, value: object) -> None:
    """Require an integer, and no float or boolean that looks like one."""
    require(
        _is_integer(value),
        f"{name} to be an integer",
        repr(value),
        "Convert it with int().",
        TypeError,
    )


def require_measured(name: str, value: Tensor, mask: Tensor | None = None) -> None:
    """Require that every entry that counts is a number that can be squared; name the task of the first bad one."""
    is_bad = ~(value.abs() <= LARGEST)
    if mask is not None:
        is_bad = is_bad & mask
    if not is_bad.any():
        return
    where = tuple(is_bad.nonzero()[0].tolist())
    first = value[where].item()
    is_finite = abs(first) < float("inf")
    by_task = is_bad.flatten(1).any(1)
    fail(
        f"{name} of at most {LARGEST:.0e}, to be squared" if is_finite else f"finite {name}",
        f"{first:g} at index {where} ({int(is_bad.sum())} such entries, in task {_numbers(by_task)})",
        "Choose a larger unit, or mask wrong measurements."
        if is_finite
        else "Drop them, or pass observed= with False where a value is missing.",
    )


def check_pieces(pieces: int, values: Tensor, initial: object) -> None:
    """Refuse to cut trajectories into pieces that are none, or that have no start."""
    require_integer("pieces", pieces)
    require(
        isinstance(values, Tensor) and values.dim() == 4,
        "values of shape (task, shot, time, sensor)",
        tuple(getattr(values, "shape", ())),
        "Add the axes that are missing.",
    )
    num_times = values.shape[2]
    require(
        1 <= pieces <= num_times // 2,
        f"pieces from 1 to {num_times // 2}, half the number of times",
        pieces,
        "Cut trajectories into fewer pieces.",
    )
    require(
        not isinstance(initial, Tensor) or initial.dim() == 4,
        "measured states at all times, (task, shot, time, component), where pieces can start",
        f"those at the first time, {tuple(getattr(initial, 'shape', ()))}",
        "Pass the states at all times, or initial=None and sample the starts in the program.",
    )


def _check_num_support(num_support: int, num_shots: int) -> None:
    require_integer("num_support", num_support)
    require(
        1 <= num_support < num_shots,
        f"num_support from 1 to {num_shots - 1} (of {num_shots} shots)",
        num_support,
        "The support can't be empty, and the query needs a shot too.",
    )


def _check_observed(observed: object, values: Tensor) -> None:
    if not isinstance(observed, Tensor) or observed.dtype != torch.bool:
        fail(
            f"a boolean tensor of shape {tuple(values.shape)} as observed",
            f"{getattr(observed, 'dtype', type(observed).__name__)}",
            "Pass True where a value was observed.",
        )
    require(
        observed.shape == values.shape,
        f"a boolean tensor of shape {tuple(values.shape)} as observed",
        f"one of shape {tuple(observed.shape)}",
        "Pass True where a value was observed.",
    )
    by_task = observed.flatten(1).any(1)
    require(
        bool(by_task.all()),
        "an observation in every task",
        f"none in task {_numbers(~by_task)}",
        "Drop the task from values, observed and true_latents.",
    )


def _warn_of_constant_tasks(values: Tensor, observed: Tensor | None) -> None:
    highest, lowest = values, values
    if observed is not None:
        highest = values.where(observed, -torch.inf)
        lowest = values.where(observed, torch.inf)
    is_constant = (highest.amax((1, 2)) <= lowest.amin((1, 2))).all(-1)
    if bool(is_constant.any()):
        _log.warning(
            "Nothing ever changes in task %s. Such a task says little: check its sensors.",
            _numbers(is_constant),
        )


def check_clocks(times: Tensor, shape: tuple[int, ...]) -> None:
    """Check that times have an axis of time, and before it none, one of shots, or one of tasks and one of shots."""
    num_tasks, num_shots, num_times = shape[:3]
    fitting = ((num_times,), (num_shots, num_times), (num_tasks, num_shots, num_times))
    require(
        tuple(times.shape) in fitting,
        f"{num_times} times, of shape {fitting[0]}, {fitting[1]} or {fitting[2]}",
        tuple(times.shape),
        "Give all shots one clock, or each its own; swap axes of values if time isn't the third.",
    )


def check_times(times: Tensor) -> None:
    """Check that times are finite and strictly increasing."""
    require(
        bool(torch.isfinite(times).all()),
        "finite times",
        "NaN or Inf",
        "Drop those times and their values.",
    )
    require(
        bool((torch.diff(times) > 0).all()),
        "strictly increasing times",
        "unsorted or duplicate times",
        "Sort the times (and the values with them) and drop duplicates.",
    )


def require_same_kind(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require one dtype and one device."""
    require(
        value.dtype == other.dtype,
        f"{name} and {other_name} of one dtype",
        f"{value.dtype} and {other.dtype}",
        "Convert one of them.",
        TypeError,
    )
    require(
        value.device == other.device,
        f"{name} and {other_name} on one device",
        f"{value.device} and {other.device}",
        "Move one of them with .to(device).",
    )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(rows: Tensor) -> str:
    """List the numbers of the tasks for which ``rows`` is True."""
    numbers = rows.nonzero().squeeze(-1).tolist()
    listed = ", ".join(map(str, numbers[:5]))
    return listed + (f" and {len(numbers) - 5} others" if len(numbers) > 5 else "")
