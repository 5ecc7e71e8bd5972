"""Run a user's program at given latents, and see what it predicts there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.dynamics.modes import nan_on_failure
from pyro_hybrid.programs.sites import is_random, random_sites, unwrap
from pyro_hybrid.programs.whiten import Whitened, whiten

__all__ = ["LatentMoments", "Observation", "Program", "Run", "run_at"]

Program = Callable[[Episode], object]


class Observation(NamedTuple):
    """The prediction of an observed site, what was measured, and which values count."""

    fn: Distribution
    value: Tensor
    mask: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean of the prediction."""
        return self.fn.mean

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the noise."""
        return self.fn.stddev

    @property
    def whitened(self) -> Whitened:
        """The value as a least-squares problem sees it."""
        return whiten(self.fn, self.value)


class LatentMoments(NamedTuple):
    """Mean and standard deviation that a program gives a latent."""

    mean: Tensor
    scale: Tensor


class Run(NamedTuple):
    """The observed sites of one run, and the moments of its other latents by name."""

    observations: list[Observation]
    latents: dict[str, LatentMoments]


def run_at(program: Program, episode: Episode, values: Mapping[str, Tensor]) -> Run:
    """Run a program with latents set to ``values`` and all other latents at their means.

    No handler outside sees the run, no random number is drawn, and a trajectory that diverges is NaN. Constants that
    the program makes on its way, such as ``torch.zeros(3)``, have the precision of the trajectories.

    Arguments:
        program: a Pyro program.
        episode: the trajectories.
        values: values of latent sites by name.
    """
    with (
        poutine.block(),
        nan_on_failure(),
        pyro.validation_enabled(False),
        default_dtype(episode.query.times.dtype),
        _AtMean(),
    ):
        conditioned = poutine.condition(program, data=dict(values))
        trace = poutine.trace(conditioned).get_trace(episode)
    observations = []
    latents = {}
    for name, site in random_sites(trace).items():
        if name in values:
            continue
        fn, mask = unwrap(site["fn"], site["mask"])
        if site["is_observed"]:
            mask = torch.as_tensor(mask, device=site["value"].device)
            observations.append(Observation(fn, site["value"], mask))
        else:
            latents[name] = LatentMoments(*torch.broadcast_tensors(fn.mean, fn.stddev))
    return Run(observations, latents)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of this dtype inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _AtMean(Messenger):
    """Set latents that nobody gave a value to their mean instead of drawing them."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_random(msg) or msg["is_observed"] or msg["value"] is not None:
            return
        fn, _ = unwrap(msg["fn"], None)
        msg["value"] = fn.mean.expand(msg["fn"].shape())
        msg["done"] = True
