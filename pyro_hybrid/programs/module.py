"""HybridModel, a Pyro program that owns its parameters; the only file that uses private names of Pyro."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.nn.module import _PyroModuleMeta
from torch import nn

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.errors import fail, require

__all__ = [
    "HybridModel",
    "local_parameters",
    "one_thread",
    "owns_parameters",
    "require_local",
    "with_belief",
]

_process = threading.RLock()  # Pyro's settings and handlers belong to the process, not to a thread


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Refuse other threads while this block runs; the thread that runs it may enter again."""
    if not _process.acquire(blocking=False):
        fail(
            "programs that run in one thread at a time, since Pyro's settings belong to the process",
            f"a call from thread {threading.current_thread().name!r} during one of another thread",
            "Use processes instead of threads, or hold a lock of your own around every call.",
            RuntimeError,
        )
    try:
        yield
    finally:
        _process.release()


@contextlib.contextmanager
def local_parameters() -> Iterator[None]:
    """Run Pyro with parameters that belong to module instances, in one thread at a time."""
    with one_thread(), pyro.settings.context(module_local_params=True):
        yield


def owns_parameters(module: PyroModule) -> bool:
    """Tell whether a module was built with parameters of its own, by a private attribute of Pyro."""
    return hasattr(module._pyro_context, "param_state")


def require_local(**modules: object) -> None:
    """Refuse modules whose parameters live in Pyro's global store, or can't be trained."""
    for role, module in modules.items():
        if not isinstance(module, nn.Module):
            fail(
                f"a {role} that is an nn.Module, to own its parameters",
                type(module).__name__,
                "Derive it from ph.HybridModel and write it in forward.",
                TypeError,
            )
        for part in module.modules():
            require(
                not isinstance(part, PyroModule) or owns_parameters(part),
                f"a {role} whose parameters belong to it",
                f"{type(part).__name__}, which shares them by name",
                "Derive it from ph.HybridModel, or build it under "
                "pyro.settings.context(module_local_params=True).",
            )
        for name, parameter in module.named_parameters():
            require(
                not parameter.is_inference(),
                f"a {role} whose parameters can be trained",
                f"{name}, which was made inside torch.inference_mode",
                f"Build the {role} outside of inference_mode.",
                RuntimeError,
            )


class _LocalModule(_PyroModuleMeta):
    """Build an instance, and the modules inside it, with parameters of its own."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        require(
            not torch.is_inference_mode_enabled(),
            f"a {cls.__name__} that is built outside of torch.inference_mode",
            "a call inside it, where parameters can't be trained or changed",
            "Build the model first; run it inside the mode.",
            RuntimeError,
        )
        with local_parameters():
            return super().__call__(*args, **kwargs)


class HybridModel(PyroModule, metaclass=_LocalModule):
    """A PyroModule whose parameters belong to the instance, not to Pyro's global store.

    Write the model in ``forward(self, episode)``. If its attribute ``prior`` is a :class:`~pyro_hybrid.SupportPrior`,
    the belief given the support is computed once, before the program runs, and passed on as ``episode.belief``.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with local_parameters():
            if args and isinstance(args[0], Episode):
                args = (self.with_belief(args[0]), *args[1:])
            return super().__call__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        with local_parameters():
            super().__setattr__(name, value)

    def with_belief(self, episode: Episode) -> Episode:
        """Compute the belief of the tasks' latents given the support, unless the episode has one already."""
        prior = getattr(self, "prior", None)
        belief = getattr(prior, "belief", None)
        if episode.support is None or episode.belief is not None or belief is None:
            return episode
        return replace(episode, belief=belief(episode.support, self))


def with_belief(program: object, episode: Episode) -> Episode:
    """Compute the belief of an episode if the program has a prior for it."""
    return program.with_belief(episode) if isinstance(program, HybridModel) else episode
