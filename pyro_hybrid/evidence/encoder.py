"""Learned evidence, and computed evidence that starts from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyro_hybrid.beliefs.belief import Belief, Factorized
from pyro_hybrid.beliefs.families import Family
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.errors import fail, require
from pyro_hybrid.evidence.protocol import Evidence
from pyro_hybrid.programs.run import Program

__all__ = ["Encoder", "IncrementNetwork", "Then"]


class IncrementNetwork(nn.Module):
    r"""Map trajectories to an increment of natural parameters.

    .. math:: \eta(x, S) = \mathrm{head}\bigl(\mathrm{encoder}(x), \mathrm{context}(S)\bigr)

    Arguments:
        encoder: maps shots to ``(task, features)``; its attribute ``num_features`` is their number.
        families: the family of each site.
        context: maps the shots that came before in the same way, or None.
    """

    def __init__(
        self, encoder: nn.Module, families: Mapping[str, Family], context: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.context = context
        self.families = dict(families)
        readers = [encoder] if context is None else [encoder, context]
        num_inputs = sum(int(getattr(reader, "num_features")) for reader in readers)  # noqa: B009 - a module attribute
        num_outputs = sum(family.n * family.k for family in families.values())
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(num_inputs, num_outputs))

    def forward(self, shots: Shots, given: Shots | None) -> dict[str, Tensor]:
        """Raw numbers of each site, ``(task, component, statistic)``."""
        features = self.encoder(shots)
        if self.context is not None:
            if given is None:
                fail(
                    "the support, which this encoder's evidence depends on",
                    "none",
                    "Pass an episode with a support.",
                )
            features = torch.cat([features, self.context(given)], -1)
        raw = self.head(features)
        sizes = [family.n * family.k for family in self.families.values()]
        pieces = zip(self.families.items(), raw.split(sizes, -1), strict=True)
        return {name: piece.unflatten(-1, (family.n, family.k)) for (name, family), piece in pieces}


@dataclass(frozen=True)
class Encoder:
    """Learned evidence: a network maps the shots to an increment; in a guide, it also gets the support's features.

    A task without scored values gets no evidence. The order of shots doesn't matter, to the last bit.

    Arguments:
        encoder: such as :class:`~pyro_hybrid.SetEncoder`.

    >>> import pyro_hybrid as ph
    >>> ph.Encoder(ph.SetEncoder(2, 50)).then(ph.GaussNewton(2)).second
    GaussNewton(num_iterations=2, segments=(), num_restarts=0, damping=0.001, max_step_sd=1.0)
    """

    encoder: nn.Module
    network: IncrementNetwork | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require(
            isinstance(self.encoder, nn.Module) and hasattr(self.encoder, "num_features"),
            "an encoder: a module with the attribute `num_features` that maps shots to (task, features)",
            type(self.encoder).__name__,
            "Pass ph.SetEncoder(num_sensors, num_times).",
            TypeError,
        )

    def bind(self, families: Mapping[str, Family], context: nn.Module | None = None) -> Encoder:
        """Return the encoder with a head for these families."""
        return Encoder(self.encoder, IncrementNetwork(self.encoder, families, context))

    def __call__(
        self,
        belief: Belief,
        shots: Shots,
        program: Program | None = None,
        *,
        start: Belief | None = None,
        given: Shots | None = None,
    ) -> Belief:
        """Return the increment of the shots, with gradients."""
        scored = (shots.whole or shots).scored
        is_informed = scored.flatten(1).any(1)[:, None, None]
        natural = self.propose(belief, shots, given).natural
        increments = {name: value.where(is_informed, 0.0) for name, value in natural.items()}
        return Factorized(belief.families, increments)

    def propose(self, belief: Belief, shots: Shots, given: Shots | None = None) -> Factorized:
        """Return the evidence alone, with gradients, as a belief that is proper even if nothing was observed."""
        network = self.network
        if network is None:
            fail(
                "an encoder that belongs to a prior or a guide",
                "one that doesn't",
                "Pass it to SupportPrior or AmortizedGuide, which give it a head for their latents.",
            )
        raw = network(shots.sorted_shots, given and given.sorted_shots)
        natural = {name: network.families[name].evidence(value) for name, value in raw.items()}
        return Factorized(belief.families, natural)

    def then(self, second: Evidence) -> Then:
        """Return computed evidence, such as Gauss-Newton, that starts at the mean of the encoder's own increment."""
        return Then(self, second)


@dataclass(frozen=True)
class Then:
    """Computed evidence that starts at the mean of an encoder's own increment.

    The belief before is not added to it: it would pull the start towards its mean, however well the encoder is trained.
    """

    first: Encoder
    second: Evidence

    def __post_init__(self) -> None:
        require(
            isinstance(self.first, Encoder) and self.second.network is None,
            "an encoder, and evidence that is computed from the program after it",
            f"{type(self.first).__name__} and {type(self.second).__name__}",
            "Let the encoder come first: ph.Encoder(...).then(ph.GaussNewton(...)).",
            TypeError,
        )

    @property
    def network(self) -> nn.Module | None:
        """The encoder's network."""
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
        """Return the computed increment of the shots."""
        proposal = self.first.propose(belief, shots, given)
        return self.second(belief, shots, program, start=proposal, given=given)

    def bind(self, families: Mapping[str, Family], context: nn.Module | None = None) -> Then:
        """Return both parts about the latents of these families."""
        return Then(self.first.bind(families, context), self.second.bind(families, context))
