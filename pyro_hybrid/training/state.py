"""LoopState, everything that a training carries from one step to the next, as one object that is written and read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hybrid.errors import require
from pyro_hybrid.training.fit import Fit, fit_from_json
from pyro_hybrid.training.json_values import from_json, to_json
from pyro_hybrid.training.named_tensors import (
    Parameters,
    copied,
    model_tensors,
    optimizer_tensors,
    require_like,
    require_optimizer_like,
    set_model_tensors,
    set_optimizer_tensors,
    trained_names,
)
from pyro_hybrid.training.storage import REMEDY, CheckpointError, Stored

__all__ = ["Counters", "LoopState"]


@dataclass
class Counters:
    """The numbers of a training, by name.

    Attributes:
        step: number of steps that are done.
        gradient_norm: running mean of the gradient's norm; 0 before the first step.
        consecutive_skips: number of steps, up to now, that were skipped in a row.
        looks_without_improvement: number of looks at the held-out tasks since the best one.
        best_loss: of the held-out tasks at the best look.
        num_averaged: number of steps in the mean of the parameters.
        last_failure: the last error of a solver or of a density, in words.
    """

    step: int = 0
    gradient_norm: float = 0.0
    consecutive_skips: int = 0
    looks_without_improvement: int = 0
    best_loss: float = math.inf
    num_averaged: int = 0
    last_failure: str = ""


@dataclass
class LoopState:
    """The state of a training between two steps.

    Attributes:
        fit: the record so far.
        counters: numbers by name.
        parameters: parameters and buffers of model and guide, as of the last :meth:`capture`.
        optimizer: the optimizer's moments by parameter, as of the last :meth:`capture`.
        last_good: parameters and buffers before the last step of fifty whose loss was finite.
        best: parameters and buffers at the best look at the held-out tasks; empty before.
        average: the mean of the trained parameters over the last steps; empty before.
        task_visits: number of steps that drew each task.
    """

    fit: Fit
    counters: Counters
    parameters: Parameters
    optimizer: Parameters
    last_good: Parameters
    task_visits: Tensor
    best: Parameters = field(default_factory=dict)
    average: Parameters = field(default_factory=dict)

    @classmethod
    def initial(cls, model: nn.Module, guide: nn.Module, num_tasks: int) -> LoopState:
        """Return the state before the first step."""
        tensors = model_tensors(model, guide)
        visits = torch.zeros(num_tasks, dtype=torch.long)
        return cls(Fit(), Counters(), tensors, {}, copied(tensors), visits)

    def capture(self, model: nn.Module, guide: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take in parameters and optimizer as they are now."""
        self.parameters = model_tensors(model, guide)
        self.optimizer = optimizer_tensors(optimizer, trained_names(model, guide))

    def restore(self, model: nn.Module, guide: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put parameters and optimizer back to what they were at the last :meth:`capture`."""
        set_model_tensors(model, guide, self.parameters)
        set_optimizer_tensors(optimizer, trained_names(model, guide), self.optimizer)
        devices = {name: value.device for name, value in trained_names(model, guide).items()}
        self.average = {name: value.to(devices[name]) for name, value in self.average.items()}

    def stored(self, about: Mapping[str, Any], *, finished: bool) -> Stored:
        """Return the content of a checkpoint; a finished training keeps its parameters and its record alone."""
        weights = copied(self.parameters, to_cpu=True)
        if finished:
            return Stored(weights, {"fit": to_json(self.fit)}, dict(about))
        groups = {
            "optimizer": self.optimizer,
            "last_good": self.last_good,
            "best": self.best,
            "average": self.average,
            "tasks": {"visits": self.task_visits},
        }
        tensors = {
            f"{group}/{name}": value
            for group, named in groups.items()
            for name, value in named.items()
        }
        numbers = {"fit": to_json(self.fit), "counters": to_json(self.counters)}
        return Stored(weights, numbers, dict(about), copied(tensors, to_cpu=True))

    @classmethod
    def from_stored(
        cls, stored: Stored, source: Path, *, model: nn.Module, guide: nn.Module, num_tasks: int
    ) -> LoopState:
        """Build the state from an unfinished checkpoint, if all of it fits; nothing is changed."""
        whose = f"{source} to be a checkpoint"
        fit = fit_from_json(stored.state.get("fit"), source)
        counters = from_json(
            Counters, stored.state.get("counters"), f"{source} with counters", CheckpointError
        )
        groups = _grouped(stored.training, source)
        own = model_tensors(model, guide)
        trained = trained_names(model, guide)
        require_like(own, stored.weights, whose)
        require_like(own, groups["last_good"], f"{whose} with a last good state")
        require_like(own if groups["best"] else {}, groups["best"], f"{whose} with a best state")
        has_average = counters.num_averaged > 0
        require_like(trained if has_average else {}, groups["average"], f"{whose} with an average")
        require_optimizer_like(trained, groups["optimizer"], whose)
        visits = {"visits": torch.zeros(num_tasks, dtype=torch.long)}
        require_like(visits, groups["tasks"], f"{whose} with visits of tasks")
        _require_consistent(counters, fit, source)
        return cls(
            fit=fit,
            counters=counters,
            parameters=stored.weights,
            optimizer=groups["optimizer"],
            last_good=groups["last_good"],
            task_visits=groups["tasks"]["visits"],
            best=groups["best"],
            average=groups["average"],
        )


def _grouped(tensors: Parameters, source: Path) -> dict[str, Parameters]:
    groups: dict[str, Parameters] = {
        name: {} for name in ("optimizer", "last_good", "best", "average", "tasks")
    }
    for full_name, value in tensors.items():
        group, _, name = full_name.partition("/")
        require(
            group in groups,
            f"{source} with tensors of {', '.join(groups)}",
            full_name,
            REMEDY,
            CheckpointError,
        )
        groups[group][name] = value
    return groups


def _require_consistent(counters: Counters, fit: Fit, source: Path) -> None:
    whole_numbers = [
        counters.step,
        counters.consecutive_skips,
        counters.looks_without_improvement,
        counters.num_averaged,
    ]
    require(
        min(whole_numbers) >= 0
        and counters.gradient_norm >= 0.0
        and math.isfinite(counters.gradient_norm)
        and not math.isnan(counters.best_loss),
        f"{source} with counters of 0 or more",
        counters,
        REMEDY,
        CheckpointError,
    )
    require(
        counters.step == len(fit.loss),
        f"{source} with a history of {counters.step} steps",
        len(fit.loss),
        REMEDY,
        CheckpointError,
    )
