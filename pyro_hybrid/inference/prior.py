"""SupportPrior, conditioned on a few trajectories of the same system, and UnconditionalPrior, deaf to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro
import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

from pyro_hybrid.beliefs.families import Family, FullNormal
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.errors import fail, require
from pyro_hybrid.evidence.gauss_newton import Belief, Linearised, Problem, Program
from pyro_hybrid.nets.encoders import SetEncoder, once
from pyro_hybrid.shapes import Natural, Stock

__all__ = ["Prior", "SupportPrior", "UnconditionalPrior"]


class Prior(nn.Module):
    """The common face: natural parameters of every task-level site, as distributions or as one Gaussian.

    Arguments:
        sites: one exponential family for each Pyro site, by name.
    """

    spread: Tensor

    def __init__(self, sites: Mapping[str, Family]) -> None:
        super().__init__()
        require(
            bool(sites),
            "at least one site",
            "none",
            "Name one: SupportPrior(encoder, omega=ph.families.LogNormal(1)).",
        )
        for name, family in sites.items():
            require(
                isinstance(family, Family),
                f"a family from ph.families for {name!r}",
                type(family).__name__,
                f"For example {name}=ph.families.Normal(2).",
                TypeError,
            )
        self.sites = dict(sites)
        self.base = nn.Parameter(torch.zeros(sum(f.n * f.k for f in sites.values())))
        self.register_buffer("spread", torch.ones(sum(f.n for f in sites.values())))
        self._program: Program | None = None

    def bind(self, program: Program) -> None:
        """Tell the prior which program to linearise; a HybridModel does so when the prior becomes its attribute."""
        object.__setattr__(self, "_program", program)

    @property
    def program(self) -> Program:
        """The program that this prior belongs to."""
        if self._program is None:
            fail(
                "a prior that belongs to a program",
                "one that doesn't",
                "Assign it in a HybridModel (self.prior = ...), or call prior.bind(program).",
            )
        return self._program

    def natural(self, support: Shots | None) -> dict[str, Natural]:
        """Natural parameters λ(S) of each site, ``(task, component, statistic)``; of the population where S is None."""
        return self._split(self.base)

    def forward(self, support: Shots | None) -> dict[str, Stock]:
        """The prior's distributions, one for each site."""
        return {
            name: self.sites[name].distribution(natural)
            for name, natural in self.natural(support).items()
        }

    def gaussian(self, support: Shots | None) -> tuple[Tensor, Tensor]:
        """Mean (task, d) and precision (task, d, d) of all sites in unconstrained coordinates."""
        mean, scale = (x.detach() for x in self.unconstrained(self.natural(support)))
        if support is not None and mean.dim() == 1:
            mean, scale = (x.expand(support.shape[0], -1) for x in (mean, scale))
        return mean, torch.diag_embed(scale.square().reciprocal())

    def tempered(self, belief: Belief, before: Tensor) -> Belief:
        """A belief whose evidence, beyond the precision before it, counts as ``spread`` says: see ph.calibrate."""
        weight = self.spread.double().reciprocal()
        evidence = weight.unsqueeze(-1) * (belief.precision - before) * weight
        return belief._replace(precision=before + evidence)

    def pieces(self, raw: Tensor) -> dict[str, Tensor]:
        """As many numbers as ``base`` has in the last axis, dealt out to the sites: ``(..., component, statistic)``."""
        pieces = raw.split([f.n * f.k for f in self.sites.values()], -1)
        return {
            name: piece.unflatten(-1, (f.n, f.k))
            for (name, f), piece in zip(self.sites.items(), pieces, strict=True)
        }

    def _split(self, raw: Tensor) -> dict[str, Natural]:
        return {name: self.sites[name].from_raw(piece) for name, piece in self.pieces(raw).items()}

    def unconstrained(self, naturals: Mapping[str, Natural]) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of all sites side by side, in unconstrained coordinates."""
        parts = [self.sites[name].gaussian(natural) for name, natural in naturals.items()]
        mean, scale = (torch.cat(part, -1) for part in zip(*parts, strict=True))
        return mean, scale


class UnconditionalPrior(Prior):
    """The same face, deaf to the support: one learned distribution for all tasks. Not identifiable, says the theory."""

    def __init__(self, encoder: SetEncoder | None = None, **sites: Family) -> None:
        super().__init__(sites)


class SupportPrior(Prior):
    r"""A factorised exponential family whose natural parameters come from a task's support trajectories.

    .. math:: p(z \mid S) \propto \exp \langle T(z), \lambda(S) \rangle

    Without ``evidence``, :math:`\lambda(S)` is the encoder's word: the purely amortised form. With it, the encoder only
    proposes; the program itself, linearised there, gives the support's evidence, which is added to what the
    population of tasks says (``base``). No gradient flows through it; the encoder is trained towards the result. So is
    the population, either way. Both by a factor whose value is zero, so that the ELBO stays the ELBO.

    Shots enter in a canonical order: the result doesn't depend on theirs, to the last bit.

    Arguments:
        encoder: reads the support.
        evidence: :class:`~pyro_hybrid.Linearised`, or None for the encoder alone.
        sites: one family for each Pyro site.

    >>> import pyro_hybrid as ph
    >>> prior = ph.SupportPrior(ph.SetEncoder(sensors=1, steps=3, features=8), omega=ph.families.LogNormal(1))
    >>> support = ph.Shots.from_tensors(torch.arange(3.0), torch.zeros(5, 4, 3, 1))
    >>> prior(support)["omega"].batch_shape, prior(support)["omega"].event_shape
    (torch.Size([5]), torch.Size([1]))
    """

    def __init__(
        self, encoder: SetEncoder, evidence: Linearised | None = None, **sites: Family
    ) -> None:
        super().__init__(sites)
        self.encoder, self.evidence = encoder, evidence
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(encoder.features, self.base.numel()))
        self._last: tuple[Shots, tuple[float, ...], Belief] | None = None

    def natural(self, support: Shots | None) -> dict[str, Natural]:
        if support is None:
            return super().natural(None)
        if self.evidence is None:
            return once(self, "natural", support, lambda: self._split(self.propose(support)))
        return handed_out(self.sites, self.belief(support))

    def forward(self, support: Shots | None) -> dict[str, Stock]:
        if support is not None and am_i_wrapped() and torch.is_grad_enabled():
            self._train_aside(support)
        return super().forward(support)

    def gaussian(self, support: Shots | None) -> tuple[Tensor, Tensor]:
        if support is None or self.evidence is None:
            return super().gaussian(support)
        belief = self.belief(support)
        return belief.mean, belief.precision

    def propose(self, support: Shots) -> Tensor:
        """What the encoder alone says, as raw numbers."""
        return self.head(self.encoder(support.sorted_shots))

    @torch.no_grad()
    def belief(self, support: Shots) -> Belief:
        """The support's posterior by computed evidence, with its full precision; the last one is remembered."""
        assert self.evidence is not None
        owner = self.program if isinstance(self.program, nn.Module) else self
        state = id(self.evidence), *_state([*owner.parameters(), *owner.buffers(), self.spread])
        if self._last is None or self._last[0] is not support or self._last[1] != state:
            with torch.random.fork_rng(
                range(torch.cuda.device_count())
            ):  # a remembered belief draws nothing either
                self._last = support, state, self._computed(support)
        return self._last[2]

    def _computed(self, support: Shots) -> Belief:
        assert self.evidence is not None
        mean, precision = super().gaussian(None)
        tasks = support.shape[0]
        problem = Problem(
            self.program,
            Episode(None, support.sorted_shots),
            self.sites,
            mean.expand(tasks, -1),
            precision.expand(tasks, -1, -1),
        )
        start = self.unconstrained(self._split(self.propose(support)))[0]
        return self.tempered(self.evidence(problem, start), problem.precision)

    def _train_aside(self, support: Shots) -> None:
        """Train the population, and the encoder where it only proposes, towards what is believed of these tasks."""
        proposed = self.unconstrained(self._split(self.propose(support)))
        targets = [self.unconstrained(self._split(self.base))]
        if self.evidence is None:
            mean, scale = (x.detach() for x in proposed)
        else:
            belief = self.belief(support)
            mean, scale = (
                belief.mean,
                belief.covariance.diagonal(dim1=-2, dim2=-1).sqrt().to(belief.mean.dtype),
            )
            targets.append(proposed)
        loss = torch.stack([_divergence(mean, scale, *target) for target in targets]).sum()
        pyro.factor("proposals", loss.detach() - loss)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_last": None}


def handed_out(sites: Mapping[str, Family], belief: Belief) -> dict[str, Natural]:
    """The declared families' members with the right marginals."""
    covariance, dtype, at, naturals = belief.covariance, belief.mean.dtype, 0, {}
    for name, family in sites.items():
        part = slice(at, at + family.n)
        mean, block = belief.mean[..., part], covariance[..., part, part]
        if isinstance(family, FullNormal):
            naturals[name] = family.from_precision(mean, torch.linalg.inv(block).to(dtype))
        else:
            naturals[name] = family.from_gaussian(
                mean, block.diagonal(dim1=-2, dim2=-1).sqrt().to(dtype)
            )
        at += family.n
    return naturals


def _state(tensors: Sequence[Tensor]) -> tuple[float, ...]:
    """What changes when a tensor does: a fused optimizer's steps leave its version as it was, but not its norm."""
    norms = torch.stack([torch.linalg.vector_norm(x.detach().double()) for x in tensors])
    return *(float(x._version) for x in tensors), *norms.tolist()


def _divergence(mean: Tensor, scale: Tensor, to_mean: Tensor, to_scale: Tensor) -> Tensor:
    ratio = (scale / to_scale).square()
    return 0.5 * (ratio + ((mean - to_mean) / to_scale).square() - 1.0 - ratio.log()).sum()
