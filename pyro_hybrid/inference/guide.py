"""AmortizedGuide: the prior's natural parameters plus the query's evidence."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.dynamics.solve import standing_still
from pyro_hybrid.errors import require
from pyro_hybrid.evidence.gauss_newton import Belief, Linearised, Problem, observed
from pyro_hybrid.inference.prior import Prior, SupportPrior, handed_out
from pyro_hybrid.nets.encoders import SetEncoder
from pyro_hybrid.shapes import Natural, Stock

__all__ = ["AmortizedGuide"]


class AmortizedGuide(nn.Module):
    r"""A Pyro guide over all latent sites of a program.

    .. math:: q(z \mid S, x) \propto \exp \langle T(z), \lambda(S) + \eta(x, S) \rangle

    With ``evidence``, :math:`\eta` is computed from the program, linearised where the encoder points or, without one,
    around the prior's mean, and the latents of shots (initial states) are drawn from their Gaussian posterior given the
    task's. Without, the encoder says :math:`\eta`, and the shots' latents keep their prior. Where nothing is observed
    the guide is the prior.

    Arguments:
        prior: the model's own prior.
        encoder: reads the query; not needed with ``evidence``.
        evidence: :class:`~pyro_hybrid.Linearised`, or None for the encoder alone. It can be set after a training with
            the encoder, and trains no encoder itself.
    """

    def __init__(
        self, prior: Prior, encoder: SetEncoder | None = None, evidence: Linearised | None = None
    ) -> None:
        super().__init__()
        require(
            encoder is not None or evidence is not None,
            "an encoder or evidence=ph.Linearised(...)",
            "neither",
            "Pass what the query should be read with.",
        )
        self.prior, self.encoder, self.evidence = prior, encoder, evidence
        if encoder is not None:
            features = encoder.features * (2 if isinstance(prior, SupportPrior) else 1)
            self.head = nn.Sequential(nn.SiLU(), nn.Linear(features, prior.base.numel()))

    def natural(self, episode: Episode) -> dict[str, Natural]:
        """Natural parameters λ(S) + η(x, S) of each site."""
        if episode.query.values is None:
            return self.prior.natural(episode.support)
        if self.evidence is not None:
            return handed_out(self.prior.sites, self._computed(episode)[1])
        return self._learned(episode)

    def forward(self, episode: Episode) -> dict[str, Tensor]:
        """Sample every latent site of the program."""
        computed = None
        if episode.query.values is None or self.evidence is None:
            naturals = self.natural(episode)
        else:
            computed = self._computed(episode)
            naturals = handed_out(self.prior.sites, computed[1])
        plate = episode.plate
        with plate:
            values = {
                name: pyro.sample(name, self.prior.sites[name].distribution(natural))
                for name, natural in naturals.items()
            }
        shots = {} if computed else self._prior_shots(episode, values)
        with plate:
            if computed:
                return values | self._shots(values, *computed)
            return values | {name: pyro.sample(name, fn) for name, fn in shots.items()}

    def _learned(self, episode: Episode) -> dict[str, Natural]:
        assert self.encoder is not None
        features = self.encoder(episode.query.sorted_shots)
        if isinstance(self.prior, SupportPrior):
            assert episode.support is not None
            features = torch.cat([features, self.prior.encoder(episode.support.sorted_shots)], -1)
        naturals = self.prior.natural(episode.support)
        some = (episode.query.whole or episode.query).scored.flatten(1).any(-1)[..., None, None]
        return {
            name: naturals[name] + self.prior.sites[name].evidence(piece).where(some, 0.0)
            for name, piece in self.prior.pieces(self.head(features)).items()
        }

    @torch.no_grad()
    def _computed(self, episode: Episode) -> tuple[Problem, Belief]:
        assert self.evidence is not None
        mean, precision = self.prior.gaussian(episode.support)
        mean, precision = (
            mean.expand(episode.query.shape[0], -1),
            precision.expand(episode.query.shape[0], -1, -1),
        )
        problem = Problem(
            self.prior.program, Episode(None, episode.query), self.prior.sites, mean, precision
        )
        start = (
            mean if self.encoder is None else self.prior.unconstrained(self._learned(episode))[0]
        )
        return problem, self.prior.tempered(self.evidence(problem, start), precision)

    def _shots(
        self, values: dict[str, Tensor], problem: Problem, belief: Belief
    ) -> dict[str, Tensor]:
        """Latents of shots, site by site, each given the task's and the sites before it."""
        if not problem.m:
            return {}
        task = torch.cat(
            [self.prior.sites[name].unconstrained(value) for name, value in values.items()], -1
        )
        mean, precision = belief.shots_given(task)
        drawn = {}
        for name, size in problem.sizes.items():
            covariance = torch.linalg.inv(precision)[..., :size, :size]
            fn = dist.MultivariateNormal(
                mean[..., :size], scale_tril=_root(covariance).to(mean.dtype)
            ).to_event(1)
            drawn[name] = pyro.sample(name, fn)
            away, cross = drawn[name] - mean[..., :size], precision[..., size:, :size]
            precision = precision[..., size:, size:]
            if precision.shape[-1]:
                shift = torch.linalg.solve(
                    precision, cross @ away.unsqueeze(-1).to(cross.dtype)
                ).squeeze(-1)
                mean = mean[..., size:] - shift.to(mean.dtype)
        return drawn

    def _prior_shots(self, episode: Episode, values: dict[str, Tensor]) -> dict[str, Stock]:
        """What the program itself says of its shots' latents."""
        program = getattr(self.prior, "_program", None)
        if program is None:
            return {}
        episode, values = (
            Episode(None, episode.query),
            {name: value.detach() for name, value in values.items()},
        )
        with torch.no_grad(), standing_still():
            free = single = observed(program, episode, values)[1]
            if (
                episode.query.values is None
            ):  # what would be observed is free too, but it has a time axis
                one = {
                    name: value.reshape(-1, *value.shape[-2:])[0] for name, value in values.items()
                }
                single = observed(program, episode, one)[1]
        return {
            name: dist.Normal(*site).to_event(2)
            for name, site in free.items()
            if episode.query.values is not None or single[name].dim() == 4
        }


def _root(covariance: Tensor) -> Tensor:
    """Its Cholesky factor; where rounding has cost it its positive definiteness, that of its diagonal."""
    root, failed = torch.linalg.cholesky_ex(0.5 * (covariance + covariance.mT))
    spread = covariance.diagonal(dim1=-2, dim2=-1).abs().sqrt()
    return torch.where((failed > 0)[..., None, None], torch.diag_embed(spread), root)
