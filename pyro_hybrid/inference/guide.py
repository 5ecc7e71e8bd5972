"""AmortizedGuide: the prior's belief plus the evidence of the query."""

from __future__ import annotations

from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_hybrid.beliefs.belief import Belief, Gaussian
from pyro_hybrid.beliefs.quadratic import Quadratic
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.dynamics.modes import skip_integration
from pyro_hybrid.errors import fail
from pyro_hybrid.evidence.protocol import Evidence
from pyro_hybrid.evidence.settings import encoder_of
from pyro_hybrid.inference.prior import Prior, SupportPrior, as_evidence, update
from pyro_hybrid.programs.run import run_at
from pyro_hybrid.shapes import Stock

__all__ = ["AmortizedGuide"]


class AmortizedGuide(nn.Module):
    r"""A Pyro guide over all latent sites of a program.

    .. math:: q(z \mid S, x) \propto \exp \langle T(z), \lambda(S) + \eta(x, S) \rangle

    With an encoder, :math:`\eta` is learned, and the latents of shots (such as initial states) keep their prior. With
    :class:`~pyro_hybrid.GaussNewton`, :math:`\eta` is computed from the program, and the latents of shots are drawn
    from their Gaussian posterior given the task's. If no value is scored, the guide is the prior.

    Arguments:
        model: the program, whose attribute ``prior`` is a :class:`~pyro_hybrid.SupportPrior` or an
            :class:`~pyro_hybrid.UnconditionalPrior`.
        evidence: how the query is read: an encoder, :class:`~pyro_hybrid.GaussNewton`, or one after the other.
    """

    def __init__(self, model: nn.Module, evidence: Evidence | nn.Module) -> None:
        super().__init__()
        prior = getattr(model, "prior", None)
        if not isinstance(prior, Prior):
            fail(
                "a model whose attribute `prior` is a SupportPrior or an UnconditionalPrior",
                f"{type(model).__name__} with prior = {type(prior).__name__}",
                "Pass the model, and assign self.prior in its __init__.",
                TypeError,
            )
        self.model = model
        own = encoder_of(prior.evidence) if isinstance(prior, SupportPrior) else None
        context = None if own is None else own.encoder
        self.evidence: Evidence = as_evidence(evidence).bind(prior.families, context)
        self.network = self.evidence.network

    @property
    def prior(self) -> Prior:
        """The model's prior."""
        return self.model.prior  # type: ignore[return-value]

    def belief(self, episode: Episode) -> Belief:
        """Belief about the tasks given support and query."""
        before = episode.belief
        if before is None:
            before = self.prior.belief(episode.support, self.model)
        if episode.query.values is None:
            return before
        before = before.expand(episode.query.shape[0])
        scale = self.prior.interval_scale
        return update(
            before, self.evidence, episode.query, self.model, scale, given=episode.support
        )

    def forward(self, episode: Episode) -> dict[str, Tensor]:
        """Sample every latent site of the program."""
        belief = self.belief(episode)
        plate = episode.plate
        with plate:
            values = {name: pyro.sample(name, fn) for name, fn in belief.distributions().items()}
        if isinstance(belief, Gaussian) and belief.shots is not None:
            given = belief.shots_given(belief.unconstrained(values))
            with plate:
                return values | _sample_shots(given, belief)
        latents = self._prior_of_shots(episode, values)
        with plate:
            return values | {name: pyro.sample(name, fn) for name, fn in latents.items()}

    def _prior_of_shots(self, episode: Episode, values: dict[str, Tensor]) -> dict[str, Stock]:
        """Distributions that the program itself gives the latents of shots."""
        query = episode.query
        if query.values is None:  # what would be observed isn't a latent
            query = replace(query, values=torch.zeros(query.scored.shape).to(query.times))
        values = {name: value.detach() for name, value in values.items()}
        with torch.no_grad(), skip_integration():
            latents = run_at(self.model, Episode(None, query), values).latents
        return {name: dist.Normal(*moments).to_event(2) for name, moments in latents.items()}


def _sample_shots(given: Quadratic, belief: Gaussian) -> dict[str, Tensor]:
    """Sample the latents of shots site by site, each given the sites before it."""
    sizes = belief.shot_sizes or {}
    draws = {}
    for name, size in sizes.items():
        marginal = given.marginal(size)
        factor = _root(marginal.covariance)
        fn = dist.MultivariateNormal(
            marginal.mean.to(belief.dtype), scale_tril=factor.to(belief.dtype)
        )
        draws[name] = pyro.sample(name, fn.to_event(1))
        given = given.condition(draws[name].double())
    return draws


def _root(covariance: Tensor) -> Tensor:
    """Cholesky factor; that of the diagonal if rounding has left the matrix indefinite."""
    root, failed = torch.linalg.cholesky_ex(covariance)
    deviations = covariance.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    return torch.where((failed > 0)[..., None, None], torch.diag_embed(deviations), root)
