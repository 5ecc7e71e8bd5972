"""HybridModel: a Pyro program that owns its parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.nn.module import _PyroModuleMeta
from torch import nn

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.errors import fail, require

__all__ = ["HybridModel", "local_parameters", "require_local", "with_belief"]


def local_parameters() -> Any:
    """Pyro with parameters that belong to module instances, for the length of a ``with`` block."""
    return pyro.settings.context(module_local_params=True)


def require_local(**modules: object) -> None:
    """Refuse what would keep its parameters in Pyro's global store, or can't keep any."""
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
                not isinstance(part, PyroModule) or hasattr(part._pyro_context, "param_state"),
                f"a {role} whose parameters belong to it",
                f"{type(part).__name__}, which shares them by name",
                "Derive it from ph.HybridModel, or build it under pyro.settings.context(module_local_params=True).",
            )


class _Local(_PyroModuleMeta):
    """Builds the whole of an instance, the modules inside it too, with parameters of its own."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        with local_parameters():
            return super().__call__(*args, **kwargs)


class HybridModel(PyroModule, metaclass=_Local):
    """A PyroModule whose parameters belong to the instance, not to Pyro's global store, where names collide.

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
