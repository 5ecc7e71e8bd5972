"""check_hybrid_model: what the library asks of a Pyro program and its guide, contract by contract."""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pyro
import torch
from torch import nn

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.diagnostics.case import Broken, Case, Unchecked, settings
from pyro_hybrid.diagnostics.contracts import STAGES, Contract
from pyro_hybrid.errors import require
from pyro_hybrid.programs.module import local_parameters

__all__ = ["ContractError", "check_hybrid_model"]


class ContractError(ValueError):
    """A program that breaks contracts; ``failed`` says by name what was expected, what came, and what to do."""

    def __init__(self, message: str, failed: Mapping[str, str]) -> None:
        super().__init__(message)
        self.failed = dict(failed)


def check_hybrid_model(model: nn.Module, guide: nn.Module, episode: Episode) -> list[str]:
    """Check a Pyro program and its guide against everything that the library asks of them, in a few seconds.

    Nothing is changed: neither model, guide and episode nor the global random state. Where a program has to be a
    density it is in ``eval()`` mode: what only training prefers may be a factor in ``train()`` mode.

    Arguments:
        model, guide: the program and its guide, as for :func:`~pyro_hybrid.meta_train`.
        episode: a small batch, such as ``tasks[:3].episode()``, with two support and two query shots or more.

    Returns:
        A line for each contract: its name, what it says, and a remark, or why it couldn't be checked.

    Raises:
        ContractError: with every contract that doesn't hold. Where one of the first doesn't, those that build on them
            are not checked.
    """
    require(
        episode.query.values is not None
        and episode.support is not None
        and episode.query.times.dim() == 1,
        "an episode of whole trajectories with a query and a support",
        f"query: {type(episode.query.values).__name__}, support: {type(episode.support).__name__}, times: "
        f"{tuple(episode.query.times.shape)}",
        "Pass tasks[:3].episode().",
    )
    given, found = Case(model, guide, episode), list[_Found]()
    for stage in STAGES:
        found += [_found(contract, given) for contract in stage]
        if not all(one.holds for one in found):
            raise _error(found) from next((one.crash for one in found if one.crash), None)
    return [f"{one.name}: {one.text}" for one in found]


class _Found(NamedTuple):
    name: str
    text: str
    holds: bool = True
    crash: Exception | None = None


def _found(contract: Contract, given: Case) -> _Found:
    name, says = contract.__name__.replace("_", " "), (inspect.getdoc(contract) or "").rstrip(".")
    try:
        with _isolated():
            remark = contract(copy.deepcopy(given))
        return _Found(name, says + (f" ({remark})" if remark else ""))
    except Unchecked as reason:
        return _Found(name, f"not checked, {reason}")
    except Broken as finding:
        return _Found(name, f"{says}: {finding}", False)
    except Exception as error:  # whatever a user's program raises
        first = str(error).partition("\n")[0]
        return _Found(
            name,
            f"{says}: expected a run without error; got {type(error).__name__}: {first}",
            False,
            error,
        )


def _error(found: list[_Found]) -> ContractError:
    failed = {one.name: one.text for one in found if not one.holds}
    missing = sum(map(len, STAGES)) - len(found)
    later = f", and {missing} that build on them weren't checked" if missing else ""
    lines = "".join(f"\n- {name}. {text}" for name, text in failed.items())
    return ContractError(
        f"{len(failed)} of {len(found)} contracts don't hold{later}:{lines}", failed
    )


@contextmanager
def _isolated() -> Iterator[None]:
    """Inside: an empty store, validation, no warnings; afterwards all that is global is as before."""
    states, before = (random.getstate(), np.random.get_state()), settings()
    try:
        with (
            torch.random.fork_rng(range(torch.cuda.device_count())),
            pyro.get_param_store().scope(),
            pyro.validation_enabled(),
            local_parameters(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0]), np.random.set_state(states[1])
        torch.set_default_dtype(before.pop("dtype"))
        torch.set_num_threads(before.pop("threads"))
        torch.set_grad_enabled(before.pop("gradients"))
        pyro.settings.set(**before)
