"""Checks of data, made before they reach a program; a message names the task."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.errors import fail, require, require_floating

__all__ = [
    "check_episode",
    "check_initial",
    "check_latents",
    "check_rows",
    "check_trajectories",
    "require_integer",
    "require_measured",
]

LARGEST = 1e15  # squares of thousands of these can still be added up in float32
_log = logging.getLogger(__name__)


def check_trajectories(
    times: Tensor, values: Tensor, num_support: int, observed: Tensor | None
) -> None:
    """Check a data set that comes from outside."""
    require_floating("times", times)
    require_floating("values", values)
    _require_same_kind("times", times, "values", values)
    require(
        values.dim() == 4,
        "values with axes (task, shot, time, sensor)",
        f"{values.dim()} axes",
        "Add the missing axes with unsqueeze, or stack trajectories of equal length.",
    )
    require(
        times.dim() == 1 and len(times) == values.shape[2],
        f"{values.shape[2]} times, as many as values has",
        tuple(times.shape),
        "Pass times of shape (time,); swap axes if time isn't the third.",
    )
    _check_times(times)
    require(
        values.numel() > 0 and len(times) > 1,
        "at least one task, shot, sensor and two times",
        tuple(values.shape),
        "Check how the data were read.",
    )
    _check_num_support(num_support, values.shape[1])
    if observed is not None:
        _check_observed(observed, values)
    require_measured("values", values, observed)
    _warn_of_constant_tasks(values)


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


def check_episode(episode: object) -> Episode:
    """Check a batch that may have been put together by hand, and put zeros where nothing was observed."""
    if not isinstance(episode, Episode):
        fail(
            "an Episode",
            f"a {type(episode).__name__}",
            "Pass tasks.episode(), or ph.Episode(None, shots) for shots without a support.",
            TypeError,
        )
    query = _check_shots("query", episode.query)
    support = episode.support
    if support is None:
        return episode if query is episode.query else replace(episode, query=query)
    support = _check_shots("support", support)
    num_tasks = query.shape[0]
    require(
        support.values is not None and support.shape[0] == num_tasks,
        f"a support of the same {num_tasks} tasks",
        f"one of {support.shape[0]}" + (" without values" if support.values is None else ""),
        "Condition each task on trajectories of its own.",
    )
    if query is episode.query and support is episode.support:
        return episode
    return replace(episode, support=support, query=query)


def _check_shots(role: str, shots: object) -> Shots:
    if not isinstance(shots, Shots):
        fail(
            f"Shots as the {role} of an episode",
            f"a {type(shots).__name__}",
            "Pass tasks.episode(), or build them with ph.Shots.from_tensors.",
            TypeError,
        )
    num_tasks, num_shots = shots.shape
    require(
        num_tasks > 0 and num_shots > 0,
        f"a {role} of one task and one shot or more",
        f"{num_tasks} and {num_shots}",
        "Pass at least one task with one shot.",
    )
    require_floating("times", shots.times)
    require(
        shots.times.dim() in (1, 2),
        "times of shape (time,) or (shot, time)",
        tuple(shots.times.shape),
        "Give all shots one clock, or each its own.",
    )
    _check_times(shots.times)
    is_used = shots.scored | shots.observed
    if shots.initial is not None:
        _check_part("initial", shots.initial, shots, None)
    values = shots.values
    if values is None:
        return shots
    _check_part(role, values, shots, is_used)
    num_times = shots.times.shape[-1]
    require(
        values.dim() == 4 and values.shape[2] == num_times,
        f"a {role} (task, shot, time, sensor) of {num_times} times",
        tuple(values.shape),
        "Give one value for each time; swap axes if time isn't the third.",
    )
    for name, mask in (("observed", shots.observed), ("scored", shots.scored)):
        require(
            mask.dtype == torch.bool and mask.shape == values.shape,
            f"{name}, a boolean tensor of the values' shape {tuple(values.shape)}",
            f"{mask.dtype} of shape {tuple(mask.shape)}",
            "Build shots with ph.Shots.from_tensors.",
        )
    if bool(torch.isfinite(values).all()):
        return shots
    return replace(shots, values=values.where(is_used, 0.0))


def _check_part(name: str, part: Tensor, shots: Shots, is_used: Tensor | None) -> None:
    require_floating(name, part)
    _require_same_kind("times", shots.times, name, part)
    require_measured(name, part, is_used)
    require(
        part.shape[:2] == shots.shape,
        f"{name} of {shots.shape[0]} tasks and {shots.shape[1]} shots, as the masks",
        tuple(part.shape),
        "Give every part of an episode the same tasks and shots.",
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


def _warn_of_constant_tasks(values: Tensor) -> None:
    ranges = values.amax((1, 2)) - values.amin((1, 2))
    is_constant = (ranges == 0.0).all(-1)
    if bool(is_constant.any()):
        _log.warning(
            "Nothing ever changes in task %s. Such a task says little: check its sensors.",
            _numbers(is_constant),
        )


def _check_times(times: Tensor) -> None:
    require(
        bool(torch.isfinite(times).all()),
        "finite times",
        "NaN or Inf",
        "Drop those times and their values.",
    )
    require(
        times.shape[-1] > 1,
        "at least two times",
        times.shape[-1],
        "Add time points: a motion needs two or more.",
    )
    require(
        bool((torch.diff(times) > 0).all()),
        "strictly increasing times",
        "unsorted or duplicate times",
        "Sort the times (and the values with them) and drop duplicates.",
    )


def _require_same_kind(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
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
