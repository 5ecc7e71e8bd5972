"""Check what the library asks of a Pyro program and its guide, contract by contract."""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pyro
import torch
from torch import nn

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.diagnostics import invariance_contracts as invariance
from pyro_hybrid.diagnostics import structure_contracts as structure
from pyro_hybrid.diagnostics import use_contracts as use
from pyro_hybrid.diagnostics.case import (
    BrokenContract,
    Case,
    UncheckableContract,
    global_settings,
)
from pyro_hybrid.errors import fail, require
from pyro_hybrid.programs.module import local_parameters

__all__ = ["STAGES", "Contract", "ContractError", "check_hybrid_model"]

Contract = Callable[[Case], str | None]

WHOLE = "whole trajectories"

# Contracts of one stage take those of the stages before for granted.
STAGES: tuple[tuple[Contract, ...], ...] = (
    (structure.parameters, structure.copies),
    (structure.runs,),
    (structure.latents, structure.plates, structure.observation, structure.double),
    (
        invariance.untouched,
        invariance.mask,
        use.elbo,
        use.gradients,
        invariance.seed,
        invariance.support_order,
        invariance.query_order,
        invariance.tasks,
        use.simulation,
        invariance.particles,
        use.predictive,
        invariance.condition,
        use.nuts,
        use.segments,
        use.one_task,
        use.one_shot,
        invariance.state_dict,
        use.arviz,
    ),
)


class ContractError(ValueError):
    """Error of a program that breaks contracts.

    Attributes:
        failed: by name of the contract, what was expected, what came, and what to do.
    """

    def __init__(self, message: str, failed: Mapping[str, str]) -> None:
        super().__init__(message)
        self.failed = dict(failed)


class _Outcome(NamedTuple):
    """Result of one contract."""

    name: str
    text: str
    holds: bool = True
    crash: Exception | None = None


def check_hybrid_model(model: nn.Module, guide: nn.Module, episode: Episode) -> list[str]:
    """Check a Pyro program and its guide against everything that the library asks of them, in a few seconds.

    Nothing is changed: neither model, guide and episode nor the global random state. Where a program has to be a
    density it runs in ``eval()`` mode, with an episode whose ``is_training`` isn't set; penalties are factors where it
    is set.

    Arguments:
        model, guide: the program and its guide, as for :func:`~pyro_hybrid.meta_train`.
        episode: a small batch, such as ``tasks[:3].episode()``, with two support and two query shots or more.

    Returns:
        A line for each contract: its name, its text, and a remark, or why it could not be checked.

    Raises:
        ContractError: with every contract that does not hold. Where one of the first does not, those that build on them
            are not checked.
    """
    _check_episode(episode)
    case = Case(model, guide, episode)
    outcomes: list[_Outcome] = []
    for stage in STAGES:
        outcomes += [_check(contract, case) for contract in stage]
        if not all(outcome.holds for outcome in outcomes):
            crashes = [outcome.crash for outcome in outcomes if outcome.crash]
            raise _error(outcomes) from (crashes[0] if crashes else None)
    return [f"{outcome.name}: {outcome.text}" for outcome in outcomes]


def _check_episode(episode: object) -> None:
    if not isinstance(episode, Episode):
        fail(
            "an episode (ph.Episode)",
            type(episode).__name__,
            "Pass a small batch of the data set: tasks[:3].episode().",
            TypeError,
        )
    query = _kind(episode.query)
    support = _kind(episode.support)
    require(
        query == support == WHOLE,
        "an episode of whole trajectories with a query and a support",
        f"query: {query}, support: {support}",
        "Pass tasks[:3].episode().",
    )


def _kind(shots: Shots | None) -> str:
    if shots is None:
        return "none"
    if shots.is_segmented:
        return "segments"
    return "no values" if shots.values is None else WHOLE


def _check(contract: Contract, case: Case) -> _Outcome:
    name = contract.__name__.replace("_", " ")
    text = (inspect.getdoc(contract) or "").rstrip(".")
    try:
        with _isolated():
            remark = contract(copy.deepcopy(case))
    except UncheckableContract as reason:
        return _Outcome(name, f"not checked, {reason}")
    except BrokenContract as finding:
        return _Outcome(name, f"{text}: {finding}", holds=False)
    except Exception as error:  # a user's program may raise anything
        first_line = str(error).partition("\n")[0]
        message = f"expected a run without error; got {type(error).__name__}: {first_line}"
        return _Outcome(name, f"{text}: {message}", holds=False, crash=error)
    return _Outcome(name, f"{text} ({remark})" if remark else text)


def _error(outcomes: Sequence[_Outcome]) -> ContractError:
    failed = {outcome.name: outcome.text for outcome in outcomes if not outcome.holds}
    num_skipped = sum(map(len, STAGES)) - len(outcomes)
    skipped = f", and {num_skipped} that build on them weren't checked" if num_skipped else ""
    lines = [f"{len(failed)} of {len(outcomes)} contracts don't hold{skipped}:"]
    lines += [f"- {name}. {text}" for name, text in failed.items()]
    return ContractError("\n".join(lines), failed)


@contextmanager
def _isolated() -> Iterator[None]:
    """Provide an empty store, validation and no warnings; restore all global state afterwards."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    settings = global_settings()
    devices = range(torch.cuda.device_count())
    try:
        with (
            torch.random.fork_rng(devices),
            pyro.get_param_store().scope(),
            pyro.validation_enabled(),
            local_parameters(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_default_dtype(settings.pop("dtype"))
        torch.set_num_threads(settings.pop("threads"))
        torch.set_grad_enabled(settings.pop("gradients"))
        pyro.settings.set(**settings)
