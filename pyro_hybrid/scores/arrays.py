"""Convert latents to matrices, and refuse what cannot be scored."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_hybrid.errors import fail, require

__all__ = [
    "Array",
    "Latents",
    "convert_like",
    "flatten_data",
    "require_enough_tasks",
    "to_matrix",
    "to_same_tasks",
    "to_varying_matrix",
]

Array = NDArray[np.float64]
Latents = TypeVar("Latents", Tensor, NDArray[Any])


def to_matrix(name: str, value: object) -> Array:
    """Return ``value`` as a finite float64 matrix of axes (task, component)."""
    array = _to_float64(name, value)
    require(
        array.ndim == 2 and array.size > 0,
        f"{name} of shape (tasks, components)",
        f"shape {array.shape}",
        "Pass one row per task, pooled over tasks; turn a single latent into a column with [:, None].",
    )
    invalid = np.argwhere(~np.isfinite(array))
    if len(invalid):
        row, column = invalid[0].tolist()
        fail(
            f"finite {name}",
            f"{array[row, column]} in task {row}, component {column} ({len(invalid)} such entries)",
            "Drop these tasks from both sides, or find out why inference failed on them.",
        )
    return array


def to_varying_matrix(name: str, value: Tensor | NDArray[Any]) -> Array:
    """Return ``value`` as a matrix whose columns all vary by more than the rounding of their own precision."""
    array = to_matrix(name, value)
    is_single = value.dtype in (torch.float32, np.float32)
    epsilon = 1e-7 if is_single else 1e-16
    rounding = 8 * epsilon * np.abs(array).max(0)
    with np.errstate(over="ignore"):
        constant = np.flatnonzero(np.ptp(array, axis=0) <= rounding)
    require(
        not len(constant),
        f"every component of {name} to vary over tasks",
        f"component {constant.tolist()} constant over {len(array)} tasks",
        "Its correlation is undefined: drop the column, or take latents that respond to the support.",
    )
    return array


def to_same_tasks(name: str, value: Any, other_name: str, other: Any) -> tuple[Array, Array]:
    """Return both arguments as matrices of the same tasks, of which there are enough."""
    matrix = to_varying_matrix(name, value)
    other_matrix = to_varying_matrix(other_name, other)
    require(
        len(matrix) == len(other_matrix),
        f"one row per task in both {name} and {other_name}",
        f"{len(matrix)} and {len(other_matrix)} rows",
        "Pass both for the same tasks, in the same order.",
    )
    widest = max(matrix.shape[1], other_matrix.shape[1])
    require_enough_tasks(f"{name} and {other_name}", len(matrix), widest)
    return matrix, other_matrix


def flatten_data(data: Tensor | NDArray[Any], num_tasks: int) -> Array:
    """Return observations as a matrix with one row per task."""
    array = _to_float64("data", data)
    require(
        array.ndim > 0 and len(array) == num_tasks,
        f"data of {num_tasks} tasks, those of the estimate",
        f"shape {array.shape}",
        "Pass what each task's latents were recovered from, one entry per task.",
    )
    return to_matrix("data", array.reshape(num_tasks, -1))


def require_enough_tasks(name: str, num_tasks: int, num_components: int) -> None:
    """Require that each half of the tasks overdetermines a linear map with an intercept."""
    least = 2 * (num_components + 1) + 1
    require(
        num_tasks >= least,
        f"at least {least} tasks in {name} for {num_components} components",
        f"{num_tasks} tasks",
        "Pool more held-out tasks; never score one task at a time.",
    )


def convert_like(template: Latents, values: Array) -> Latents:
    """Return ``values`` in the type, precision and place of ``template``; integers become double."""
    if isinstance(template, Tensor):
        dtype = template.dtype if template.is_floating_point() else torch.float64
        return torch.as_tensor(values, dtype=dtype, device=template.device)
    is_floating = np.issubdtype(template.dtype, np.floating)
    return values.astype(template.dtype if is_floating else np.float64)


def _to_float64(name: str, value: object) -> Array:
    if not isinstance(value, Tensor | np.ndarray):
        fail(
            f"{name} to be a torch tensor or a numpy array",
            type(value).__name__,
            _conversion(name, value),
            TypeError,
        )
    if isinstance(value, Tensor):
        is_real = not value.is_complex()
    else:
        is_real = value.dtype.kind in "biuf"
    require(
        is_real,
        f"{name} to hold real numbers",
        f"dtype {value.dtype}",
        f"Convert the entries to float64, and drop columns of {name} that hold anything else.",
        TypeError,
    )
    if isinstance(value, Tensor):
        return value.detach().cpu().double().numpy()
    return value.astype(np.float64)


def _conversion(name: str, value: object) -> str:
    """Return advice on how to make an array of ``value``."""
    if hasattr(value, "to_numpy"):  # a frame or a series of pandas
        return f"Convert it: {name}.to_numpy()."
    if hasattr(value, "true_latents"):  # a data set
        return 'Pass the latents themselves, such as tasks.true_latents["omega"].'
    if isinstance(value, dict):
        return f"Pass one matrix: torch.cat(list({name}.values()), -1)."
    return f"Convert it: torch.as_tensor({name})."
