"""Priors of a task's latents: a population, and what the support adds to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyro_hybrid.beliefs.belief import Belief, Factorized, Gaussian, rescale
from pyro_hybrid.beliefs.families import Family
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots, require_shots
from pyro_hybrid.errors import require
from pyro_hybrid.evidence.encoder import Encoder, Then
from pyro_hybrid.evidence.protocol import Evidence
from pyro_hybrid.programs.run import Program
from pyro_hybrid.shapes import Stock

__all__ = ["Prior", "SupportPrior", "UnconditionalPrior", "as_evidence", "update"]


class Prior(nn.Module):
    """A learned population of tasks: one exponential family for each site of the program.

    Arguments:
        families: the family of each Pyro site, by name.
    """

    interval_scale: Tensor

    def __init__(self, families: Mapping[str, Family]) -> None:
        super().__init__()
        require(
            bool(families),
            "at least one site",
            "none",
            "Name one: SupportPrior(evidence, omega=ph.families.LogNormal(1)).",
        )
        for name, family in families.items():
            require(
                isinstance(family, Family),
                f"a family from ph.families for {name!r}",
                type(family).__name__,
                f"For example {name}=ph.families.Normal(2).",
                TypeError,
            )
        self.families = dict(families)
        self.raw = nn.Parameter(torch.zeros(sum(f.n * f.k for f in families.values())))
        self.register_buffer("interval_scale", torch.ones(sum(f.n for f in families.values())))

    def population(self) -> Factorized:
        """Belief about any task, before anything was observed of it."""
        sizes = [family.n * family.k for family in self.families.values()]
        pieces = zip(self.families.items(), self.raw.split(sizes), strict=True)
        natural = {
            name: family.from_raw(piece.unflatten(-1, (family.n, family.k)))
            for (name, family), piece in pieces
        }
        return Factorized(self.families, natural)

    def belief(self, support: Shots | None, program: Program | None = None) -> Belief:
        """Belief about the tasks of a support; about any task if there is none."""
        return self.population()

    def forward(self, episode: Episode) -> dict[str, Stock]:
        """Distributions of the sites, given the support."""
        belief = episode.belief
        if belief is None:
            belief = self.belief(episode.support)
        return belief.distributions()

    @torch.enable_grad()
    def fit_population(self, mean: Tensor, scale: Tensor) -> None:
        r"""Set the population to the one nearest to what was inferred of many tasks.

        .. math:: \min_{\lambda_0} \sum_t \mathrm{KL}\bigl(\mathrm{Normal}(m_t, s_t) \,\|\, \lambda_0\bigr)

        Arguments:
            mean, scale: moments of each task in unconstrained coordinates, ``(task, d)``.
        """
        is_usable = torch.isfinite(mean + scale).all(-1)
        mean, scale = mean[is_usable].detach(), scale[is_usable].detach()
        optimizer = torch.optim.LBFGS([self.raw], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            total = _divergence(mean, scale, *self.population().moments()) / len(mean)
            total.backward()
            return total

        if len(mean):
            optimizer.step(loss)
            self.raw.grad = None

    def amortization_loss(self, support: Shots | None, belief: Belief) -> Tensor:
        """Loss that trains what no gradient of the ELBO reaches; zero where there is nothing to train."""
        return self.raw.new_zeros(())


class UnconditionalPrior(Prior):
    """One learned distribution for all tasks, whatever their support. The identifiability theorem doesn't cover it.

    Arguments:
        families: one family for each Pyro site.
    """

    def __init__(self, /, **families: Family) -> None:
        super().__init__(families)


class SupportPrior(Prior):
    r"""A population plus the evidence of a task's support trajectories.

    .. math:: p(z \mid S) \propto \exp \langle T(z), \lambda_0 + \eta(S) \rangle

    With an encoder, :math:`\eta` is learned. With :class:`~pyro_hybrid.GaussNewton` it is computed from the program,
    linearized on the support; no gradient flows through it. The order of shots doesn't matter, to the last bit.

    Arguments:
        evidence: how the support is read: an encoder such as :class:`~pyro_hybrid.SetEncoder`,
            :class:`~pyro_hybrid.GaussNewton`, or ``ph.Encoder(...).then(ph.GaussNewton(...))``.
        families: one family for each Pyro site.

    >>> import pyro_hybrid as ph
    >>> prior = ph.SupportPrior(ph.SetEncoder(1, 3), omega=ph.families.LogNormal(1))
    >>> support = ph.Shots.from_tensors(torch.arange(3.0), torch.zeros(5, 4, 3, 1))
    >>> prior.belief(support).distributions()["omega"].batch_shape
    torch.Size([5])
    """

    def __init__(self, evidence: Evidence | nn.Module, /, **families: Family) -> None:
        super().__init__(families)
        self.evidence: Evidence = as_evidence(evidence).bind(families)
        self.network = self.evidence.network

    def belief(self, support: Shots | None, program: Program | None = None) -> Belief:
        """Belief about the tasks of a support.

        Arguments:
            support: the shots that condition the prior, or None for the population.
            program: the program that explains them, which computed evidence linearizes.
        """
        population = self.population()
        if support is None:
            return population
        require_shots(support, "a support")
        before = population.detach().expand(support.shape[0])
        shots = support.sorted_shots
        after = update(before, self.evidence, shots, program, self.interval_scale)
        # The latents of the support's shots are not those of the query's.
        return after.without_shots() if isinstance(after, Gaussian) else after

    def amortization_loss(self, support: Shots | None, belief: Belief) -> Tensor:
        r"""Train the population, and an encoder that only proposes, towards what was inferred of these tasks.

        .. math:: \sum_t \mathrm{KL}\bigl(q_t \,\|\, \text{population}\bigr) + \mathrm{KL}\bigl(q_t \,\|\, \text{proposal}_t\bigr)

        in unconstrained coordinates, where every belief counts as a Normal with its mean and standard deviation.

        Arguments:
            support: the shots that conditioned the prior.
            belief: the result, :meth:`belief` of this support.
        """
        if support is None:
            return super().amortization_loss(support, belief)
        population = self.population()
        mean, scale = (x.detach() for x in belief.moments())
        loss = _divergence(mean, scale, *population.moments())
        if not isinstance(self.evidence, Then):
            return loss
        proposal = self.evidence.first.propose(population, support)
        return loss + _divergence(mean, scale, *proposal.moments())


def as_evidence(evidence: Evidence | nn.Module) -> Evidence:
    """Wrap a bare encoder; refuse what is no evidence."""
    if isinstance(evidence, Evidence) and not isinstance(evidence, nn.Module | type):
        return evidence
    require(
        isinstance(evidence, nn.Module),
        "evidence: an encoder, ph.GaussNewton(...), or ph.Encoder(...).then(ph.GaussNewton(...))",
        type(evidence).__name__,
        "Pass ph.SetEncoder(num_sensors, num_times) to begin with.",
        TypeError,
    )
    return Encoder(evidence)  # type: ignore[arg-type]


def update(
    before: Belief,
    evidence: Evidence,
    shots: Shots,
    program: Program | None,
    interval_scale: Tensor,
    given: Shots | None = None,
) -> Belief:
    """Add the evidence of some shots to a belief; intervals of computed evidence are scaled.

    Arguments:
        before: the belief before.
        evidence: how the shots are read.
        shots: the trajectories.
        program: the program that explains them.
        interval_scale: a factor for the standard deviation of each latent, 1 to leave it.
        given: the shots whose evidence ``before`` contains already.
    """
    after = before + evidence(before, shots, program, given=given)
    if isinstance(after, Gaussian):
        return rescale(after, before.gaussian(), interval_scale)
    return after


def _divergence(mean: Tensor, scale: Tensor, other_mean: Tensor, other_scale: Tensor) -> Tensor:
    ratio = (scale / other_scale).square()
    distance = ((mean - other_mean) / other_scale).square()
    return 0.5 * (ratio + distance - 1.0 - ratio.log()).sum()
