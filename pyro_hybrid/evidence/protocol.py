"""Evidence: what trajectories add to a belief about their task's latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from pyro_hybrid.beliefs.belief import Belief
from pyro_hybrid.beliefs.families import Family
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.errors import require
from pyro_hybrid.programs.run import Program

__all__ = ["Evidence", "Fixed", "Then"]


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

    def propose(self, belief: Belief, shots: Shots) -> Belief | None:
        """Return the increment of the network alone, with gradients, if its result isn't the last word."""
        ...


@dataclass(frozen=True)
class Then:
    """Evidence that starts where other evidence ends: an encoder proposes, and Gauss-Newton goes on from there."""

    first: Evidence
    second: Evidence

    @property
    def network(self) -> nn.Module | None:
        return self.first.network

    def __call__(
        self,
        belief: Belief,
        shots: Shots,
        program: Program | None,
        *,
        start: Belief | None = None,
        given: Shots | None = None,
    ) -> Belief:
        proposal = belief + self.first(belief, shots, program, start=start, given=given)
        return self.second(belief, shots, program, start=proposal, given=given)

    def bind(self, families: Mapping[str, Family], context: nn.Module | None = None) -> Then:
        return Then(self.first.bind(families, context), self.second.bind(families, context))

    def propose(self, belief: Belief, shots: Shots) -> Belief | None:
        return self.first(belief, shots, None)

    def then(self, second: Evidence) -> Then:
        """Return evidence that goes on with ``second``."""
        return Then(self, second)

    def __post_init__(self) -> None:
        require(
            self.second.network is None,
            "evidence that is computed from the program after the first",
            type(self.second).__name__,
            "Let the encoder come first: ph.Encoder(...).then(ph.GaussNewton(...)).",
            TypeError,
        )


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

    def propose(self, belief: Belief, shots: Shots) -> Belief | None:
        return None
