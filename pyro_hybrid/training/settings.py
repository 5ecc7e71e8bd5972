"""Settings, the arguments of a training; and their description by value, which a resumed training must share."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.elbo import ELBO
from torch import nn

from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.errors import require
from pyro_hybrid.training.json_values import to_json
from pyro_hybrid.training.named_tensors import ADAM
from pyro_hybrid.training.schedule import (
    PenaltyWeight,
    Schedule,
    require_integer,
    require_number,
)

__all__ = ["Settings", "data_hash", "described", "identity", "penalty_weights_of"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of a training that a resumed one must share; see :func:`~pyro_hybrid.meta_train`."""

    schedule: Schedule
    batch_size: int
    seed: int
    segments_per_shot: int | None
    clip: float
    eval_every: int
    patience: int | None
    max_skips: int

    def __post_init__(self) -> None:
        require_integer("batch_size", self.batch_size)
        require(
            type(self.seed) is int and -(2**63) <= self.seed < 2**63,
            "seed to be an integer of 64 bits",
            repr(self.seed),
            "Pass seed=0, for example.",
        )
        require_integer("eval_every", self.eval_every)
        require_integer("max_skips", self.max_skips)
        if self.segments_per_shot is not None:
            require_integer("segments_per_shot", self.segments_per_shot)
        if self.patience is not None:
            require_integer("patience", self.patience)
        require_number(
            "clip",
            self.clip,
            0.0,
            math.inf,
            bounds="(]",
            remedy="4.0 shortens gradients beyond four times their usual length; inf shortens none.",
        )


def penalty_weights_of(
    model: nn.Module, changes: Mapping[str, PenaltyWeight] | None
) -> dict[str, PenaltyWeight]:
    """Return the schedules of all penalty weights of a model, those that are not changed being constant."""
    own = getattr(model, "penalty_weights", {})
    require(
        isinstance(own, dict),
        "a model whose penalty_weights is a dictionary, {name: number}",
        type(own).__name__,
        'Set self.penalty_weights = {"projection": 0.0}, for example, in its __init__.',
        TypeError,
    )
    for name in changes or {}:
        require(
            name in own,
            f"penalty weights that the model has, {', '.join(own) or 'of which there are none'}",
            repr(name),
            f"Add {name!r} to the dictionary penalty_weights of the model, and read the weight from it in forward.",
        )
    return {**own, **(changes or {})}


def identity(
    settings: Settings,
    *,
    model: nn.Module,
    guide: nn.Module,
    loss: object,
    tasks: Tasks,
    held_out: Tasks | None,
) -> dict[str, Any]:
    """Describe a training by value, in JSON: two trainings with equal descriptions are one."""
    description = described(settings)
    del description["class"]
    schedule = description.pop("schedule")
    del schedule["class"]
    roles = {"model": model, "guide": guide}
    return {
        **schedule,
        **description,
        "optimizer": described(ADAM),
        "loss": described(TraceMeanField_ELBO() if loss is None else loss),
        **{role: type(module).__qualname__ for role, module in roles.items()},
        "evidence": {
            f"{role}.{name}": described(part.evidence)
            for role, module in roles.items()
            for name, part in module.named_modules()
            if hasattr(part, "evidence")
        },
        "tasks": data_hash(tasks),
        "held_out": None if held_out is None else data_hash(held_out),
    }


def described(value: object) -> Any:
    """Describe a value in JSON: by its class and public configuration, never by its address."""
    if value is None or isinstance(value, bool | int | float | str):
        return to_json(value)
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    name = type(value).__qualname__
    if is_dataclass(value):
        return {"class": name} | {f.name: described(getattr(value, f.name)) for f in fields(value)}
    if inspect.isroutine(value) or isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, torch.Tensor | nn.Module):
        return name
    return {"class": name} | _configuration(value)


def _configuration(value: object) -> dict[str, Any]:
    """Describe the public attributes of an object that are numbers, strings or tuples of these."""
    configuration = {}
    for name, item in sorted(vars(value).items() if hasattr(value, "__dict__") else ()):
        # Pyro guesses an ELBO's max_plate_nesting in the first step; the loss doesn't depend on it.
        is_guessed = isinstance(value, ELBO) and name == "max_plate_nesting"
        is_plain = item is None or isinstance(item, bool | int | float | str | tuple | list)
        if is_plain and not is_guessed and not name.startswith("_"):
            configuration[name] = described(item)
    return configuration


def data_hash(tasks: Tasks) -> str:
    """Return a hash of the values of a data set."""
    digest = hashlib.sha256(str(tasks.num_support).encode())
    for name in ("times", "values", "initial", "states", "scored", "observed", "inputs"):
        part = getattr(tasks, name)
        if part is None:
            digest.update(f"no {name}".encode())
            continue
        digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
