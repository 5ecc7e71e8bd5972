"""SVI: a pyro.infer.SVI for models that own their parameters."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer import SVI as PyroSVI
from pyro.infer import TraceMeanField_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.errors import require
from pyro_hybrid.inference.prior import Prior
from pyro_hybrid.programs.module import local_parameters, require_local, with_belief

__all__ = ["SVI"]


class SVI(PyroSVI):
    """A ``pyro.infer.SVI`` for models that own their parameters.

    Underneath, the ELBO is an ``nn.Module`` over model and guide, stepped by one torch optimizer.

    Arguments:
        model, guide: each an ``nn.Module``, such as a HybridModel and an AmortizedGuide.
        optim: a torch optimizer over their parameters, or a ``pyro.optim`` one, whose class and options are taken.
        loss: a Pyro ELBO.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        optim: torch.optim.Optimizer | PyroOptim,
        loss: Any = None,
    ) -> None:
        require_local(model=model, guide=guide)
        self.model, self.guide = model, guide
        self.elbo = (TraceMeanField_ELBO() if loss is None else loss)(model, guide)
        self.optim = _torchs(optim, self.parameters()) if isinstance(optim, PyroOptim) else optim

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter of model and guide, once."""
        return [p for p in self.elbo.parameters() if p.requires_grad]

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with its gradients left on the parameters."""
        self.optim.zero_grad(set_to_none=True)
        with local_parameters():
            loss = self._loss(*args, **kwargs)
            if loss.requires_grad:
                loss.backward()
        return loss.detach()

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One gradient step; returns the loss."""
        loss = self.backward(*args, **kwargs)
        self.optim.step()
        return float(loss)

    @torch.no_grad()
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss, with no step taken."""
        with local_parameters():
            return float(self._loss(*args, **kwargs))

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The negative ELBO, plus a loss of value zero that trains what no gradient of the ELBO reaches."""
        if not args or not isinstance(args[0], Episode):
            return self.elbo(*args, **kwargs)
        episode = with_belief(self.model, args[0])
        loss = self.elbo(episode, *args[1:], **kwargs)
        prior = getattr(self.model, "prior", None)
        if episode.belief is None or not isinstance(prior, Prior):
            return loss
        auxiliary = prior.amortization_loss(episode.support, episode.belief)
        # In this order, the value that is added is exactly zero.
        return loss + (auxiliary - auxiliary.detach())


def _torchs(optim: Any, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer that a ``pyro.optim`` one would make for each parameter, for all of them."""
    require(
        type(optim) is PyroOptim
        and isinstance(optim.pt_optim_args, dict)
        and not optim.pt_clip_args,
        "a pyro.optim optimizer with a dictionary of options only",
        type(optim).__name__ + " with more",
        "Pass a torch optimizer with a schedule of torch's beside it; meta_train clips and schedules itself.",
    )
    return optim.pt_optim_constructor(parameters, **optim.pt_optim_args)
