"""Evidence: what trajectories add to a belief about their task's latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from pyro_hybrid.beliefs.belief import Belief
from pyro_hybrid.beliefs.families import Family
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.programs.run import Program

__all__ = ["Evidence", "Fixed"]


@runtime_checkable
class Evidence(Protocol):
    """An algorithm that reads trajectories; settings are frozen values that compare by value.

    Attributes:
        network: the neural network that it reads with, or None.
    """

    @property
    def network(self) -> nn.Module | None: ...

    def __call__(
        self,
        belief: Belief,
        shots: Shots,
        program: Program | None,
        *,
        start: Belief | None = None,
        given: Shots | None = None,
    ) -> Belief:
        """Return the increment that the shots add to ``belief``; both are natural parameters.

        Arguments:
            belief: the belief before, ``(task, ...)``.
            shots: the trajectories.
            program: the program that explains them; an encoder can do without.
            start: where an iteration begins, if not at ``belief``.
            given: the shots whose evidence ``belief`` contains already; an encoder may look at them.
        """
        ...

    def bind(self, families: Mapping[str, Family], context: nn.Module | None = None) -> Evidence:
        """Return the same evidence about the latents of these families.

        Arguments:
            families: the family of each site.
            context: an encoder of the shots that will be ``given``, or None.
        """
        ...


@dataclass(frozen=True, eq=False)
class Fixed:
    """Evidence that was computed before: the same increment, whatever the shots.

    Arguments:
        increment: natural parameters, ``(task, ...)``.
    """

    increment: Belief

    @property
    def network(self) -> nn.Module | None:
        return None

    def __call__(
        self,
        belief: Belief,
        shots: Shots,
        program: Program | None,
        *,
        start: Belief | None = None,
        given: Shots | None = None,
    ) -> Belief:
        return self.increment

    def bind(self, families: Mapping[str, Family], context: nn.Module | None = None) -> Fixed:
        return self
