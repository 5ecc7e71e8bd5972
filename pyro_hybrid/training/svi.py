"""SVI: a pyro.infer.SVI for models that own their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from pyro.infer import SVI as PyroSVI
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.elbo import ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.errors import fail, require
from pyro_hybrid.inference.prior import Prior
from pyro_hybrid.programs.module import local_parameters, require_local, with_belief

__all__ = ["SVI", "OwnedOptim"]


class OwnedOptim(PyroOptim):
    """A torch optimizer over parameters that modules own, in the form that Pyro's SVI expects.

    Arguments:
        optimizer: the torch optimizer; it holds all parameters already.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(type(optimizer), dict(optimizer.defaults))
        self.optimizer = optimizer

    def __call__(self, params: Iterable[nn.Parameter], *args: Any, **kwargs: Any) -> None:
        """Take one step of the optimizer, over its own parameters."""
        self.optimizer.step(*args, **kwargs)

    def get_state(self) -> dict[str, Any]:
        """Return the state dictionary of the torch optimizer."""
        return self.optimizer.state_dict()

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary into the torch optimizer."""
        self.optimizer.load_state_dict(state_dict)


class SVI(PyroSVI):
    """A ``pyro.infer.SVI`` for models that own their parameters.

    One torch optimizer updates all parameters of model and guide. To add a loss to the ELBO, or to compute something
    once before it, override :meth:`differentiable_loss`.

    If the model is in ``train()`` mode, :meth:`step`, :meth:`backward` and ``loss_and_grads`` set ``is_training`` of the
    episode, so that the program adds its penalties. :meth:`evaluate_loss` and ``loss`` clear it.

    Arguments:
        model, guide: each an ``nn.Module``, such as a HybridModel and an AmortizedGuide.
        optim: a torch optimizer over their parameters, or a ``pyro.optim`` one, whose class and options are taken.
        loss: a Pyro ELBO with a differentiable loss, by default ``TraceMeanField_ELBO()``; or a function of model, guide
            and their arguments that returns a differentiable loss.
        num_samples: number of posterior traces that :meth:`run` draws (deprecated by Pyro).
        num_steps: number of gradient steps that :meth:`run` takes (deprecated by Pyro).
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        optim: torch.optim.Optimizer | PyroOptim,
        loss: ELBO | Callable[..., Tensor] | None = None,
        *,
        num_samples: int = 0,
        num_steps: int = 0,
    ) -> None:
        require_local(model=model, guide=guide)
        self.objective = _differentiable(TraceMeanField_ELBO() if loss is None else loss)
        self.num_particles = int(getattr(loss, "num_particles", 1))
        self.optimizer = _torch_optimizer(optim, [*model.parameters(), *guide.parameters()])
        super().__init__(  # type: ignore[no-untyped-call]
            model,
            guide,
            OwnedOptim(self.optimizer),
            loss=self._loss,
            loss_and_grads=self._loss_and_grads,
            num_samples=num_samples,
            num_steps=num_steps,
        )

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of model and guide that are trained, each once."""
        parameters = [*self.model.parameters(), *self.guide.parameters()]
        distinct = {id(parameter): parameter for parameter in parameters}
        return [parameter for parameter in distinct.values() if parameter.requires_grad]

    def differentiable_loss(
        self, model: nn.Module, guide: nn.Module, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the negative ELBO of one step, with gradients, and with the penalties if ``is_training`` is set.

        The belief given the support is computed once, for program and guide. A loss of value zero trains what no
        gradient of the ELBO reaches.
        """
        if not args or not isinstance(args[0], Episode):
            return self.objective(model, guide, *args, **kwargs)
        episode = with_belief(model, args[0])
        loss = self.objective(model, guide, episode, *args[1:], **kwargs)
        prior = getattr(model, "prior", None)
        if episode.belief is None or not isinstance(prior, Prior):
            return loss
        auxiliary = prior.amortization_loss(episode.support, episode.belief)
        # In this order, the value that is added is exactly zero.
        return loss + (auxiliary - auxiliary.detach())

    def _loss(self, model: nn.Module, guide: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        with local_parameters():
            args = _with_is_training(args, is_training=False)
            return self.differentiable_loss(model, guide, *args, **kwargs)

    def _loss_and_grads(
        self, model: nn.Module, guide: nn.Module, *args: Any, **kwargs: Any
    ) -> Tensor:
        with local_parameters():
            if model.training:
                args = _with_is_training(args, is_training=True)
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
            if loss.requires_grad:
                loss.backward()
        return loss.detach()

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss and leave its gradients, and no earlier ones, on the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the negative ELBO without penalties, and take no step."""
        with torch.no_grad():
            return float(self.loss(self.model, self.guide, *args, **kwargs))

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one gradient step and return the loss before it."""
        loss = self.backward(*args, **kwargs)
        self.optim(self.parameters())
        return float(loss)

    def run(self, *args: Any, **kwargs: Any) -> SVI:
        """Take ``num_steps`` gradient steps, then draw ``num_samples`` posterior traces, if any."""
        if self.num_samples > 0:
            with local_parameters():
                super().run(*args, **kwargs)  # type: ignore[no-untyped-call]
            return self
        for _ in range(self.num_steps):
            self.step(*args, **kwargs)
        return self


def _with_is_training(args: tuple[Any, ...], *, is_training: bool) -> tuple[Any, ...]:
    """Set or clear ``is_training`` of the episode, if the first argument is one."""
    if not args or not isinstance(args[0], Episode):
        return args
    return (replace(args[0], is_training=is_training), *args[1:])


def _differentiable(loss: object) -> Callable[..., Tensor]:
    """Return a function of model, guide and their arguments whose value has gradients."""
    if isinstance(loss, ELBO) and hasattr(loss, "differentiable_loss"):
        objective: Callable[..., Tensor] = loss.differentiable_loss
        return objective
    if isinstance(loss, ELBO | type) or not callable(loss):
        fail(
            "a Pyro ELBO with a differentiable loss, or a function",
            f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__,
            "Pass an instance, such as pyro.infer.Trace_ELBO() or TraceMeanField_ELBO().",
            TypeError,
        )
    return loss


def _torch_optimizer(
    optim: torch.optim.Optimizer | PyroOptim, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return a torch optimizer: the given one, or that of a ``pyro.optim`` one for all parameters that are trained."""
    if isinstance(optim, torch.optim.Optimizer):
        return optim
    if not isinstance(optim, PyroOptim):
        fail(
            "a torch or a pyro.optim optimizer",
            type(optim).__name__,
            'Pass pyro.optim.Adam({"lr": 0.01}), for example.',
            TypeError,
        )
    build: Any = optim.pt_optim_constructor
    options: Any = optim.pt_optim_args
    require(
        type(optim) is PyroOptim and isinstance(options, dict) and not optim.pt_clip_args,
        "a pyro.optim optimizer with a dictionary of options only",
        f"{type(optim).__name__} with more",
        "Pass a torch optimizer with a torch schedule beside it; meta_train clips and schedules itself.",
    )
    distinct = {id(parameter): parameter for parameter in parameters if parameter.requires_grad}
    optimizer: torch.optim.Optimizer = build(list(distinct.values()), **options)
    return optimizer
