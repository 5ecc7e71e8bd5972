"""Find by experiment which parts of a program are trained as networks, and which attribute is its noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.dynamics.modes import skip_integration
from pyro_hybrid.programs.module import HybridModel, local_parameters
from pyro_hybrid.programs.run import run_at
from pyro_hybrid.training.unexplained import assign
from pyro_hybrid.training.weight_slopes import trained_weights

__all__ = ["find_network", "find_noise"]

CHANGE = 1.5  # factor by which a parameter is changed to see what follows


def find_network(model: HybridModel) -> nn.Module | None:
    """Return the part of a model that has weights to train, beside its prior; several parts as one; or None."""
    parts = {
        name: part
        for name, part in model.named_children()
        if part is not model.prior and trained_weights(part)
    }
    if len(parts) > 1:
        return nn.ModuleDict(parts)
    return next(iter(parts.values()), None)


@torch.no_grad()
def find_noise(model: HybridModel, tasks: Tasks) -> str | None:
    """Return the name of the parameter to which the noise of the only observed site is proportional, or None."""
    names = [name.removesuffix("_unconstrained") for name, _ in model.named_parameters()]
    for name in names:
        if "." in name or not isinstance(value := getattr(model, name), Tensor):
            continue
        before = _noise_of(model, tasks)
        with local_parameters():
            original = value.clone()
            assign(model, name, CHANGE * original)
            after = _noise_of(model, tasks)
            assign(model, name, original)
        is_proportional = [
            torch.allclose(b, CHANGE * a, rtol=1e-4) for a, b in zip(before, after, strict=True)
        ]
        if len(before) == 1 and is_proportional[0] and value.numel() in (1, before[0].shape[-1]):
            return name
    return None


def _noise_of(model: HybridModel, tasks: Tasks) -> list[Tensor]:
    """Standard deviations of the observations, with every latent at its prior mean."""
    episode = tasks[:2].episode()
    with local_parameters(), skip_integration():
        belief = model.prior.population().expand(episode.query.shape[0])
        values = belief.constrained(belief.moments()[0])
        sites = run_at(model, episode, values).observations
        return [site.scale.clone() for site in sites]  # which may be the parameter itself
