"""A program's weights as meta-parameters: each task's ELBO as a deterministic function of some of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torch.func import functional_call

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.errors import require
from pyro_hybrid.identifiability.meta_parameters import Losses, Shapes, require_few
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.inference.prior import SupportPrior
from pyro_hybrid.programs.module import local_parameters, require_local

__all__ = ["Weights", "weights_of"]


class Weights(NamedTuple):
    """A program's parameters as :func:`meta_parameters` takes them: ``meta_parameters(**weights._asdict())``."""

    losses: Losses
    at: Tensor
    names: Shapes
    given: str


def weights_of(
    model: nn.Module,
    guide: nn.Module,
    episode: Episode,
    parameters: Sequence[str] | None = None,
    *,
    particles: int = 10,
    seed: int = 0,
) -> Weights:
    r"""Each task's negative ELBO as a function of some of a program's parameters, always with the same random numbers.

    .. math:: L_t(\varphi) = \frac1K \sum_k \log q(z_k \mid S_t, x_t) - \log p_\varphi(x_t, z_k \mid S_t)

    All other parameters are held fixed, the guide's too unless they are named (``"guide.head"``), and computed evidence
    stays what it was: what could be undone by changing both is not seen.

    Arguments:
        model, guide: a Pyro program and its guide, which own their parameters; they are copied.
        episode: the tasks.
        parameters: names of parameters or of modules; by default all that the model trains, but for what in its prior
            reads the support.
        particles: number K of draws from the guide.
        seed: of these draws.
    """
    require_local(model=model, guide=guide)
    require(
        particles >= 1,
        "particles of 1 or more",
        particles,
        "Ten are a start; noise bends the loss.",
    )
    elbo = TraceMeanField_ELBO(
        num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1
    )
    module = copy.deepcopy(elbo(model, guide)).double()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    chosen = _chosen(module, trained, parameters)
    shapes, sizes = (
        {_short(name): tuple(p.shape) for name, p in chosen.items()},
        [p.numel() for p in chosen.values()],
    )
    require_few(sum(sizes), shapes)
    module.requires_grad_(False)
    _freeze(module)
    tasks = [episode.double().select_tasks(i) for i in range(episode.query.shape[0])]

    def losses(flat: Tensor) -> Tensor:
        values = {
            name: piece.view_as(p)
            for (name, p), piece in zip(chosen.items(), flat.split(sizes), strict=True)
        }
        devices = range(torch.cuda.device_count())
        with local_parameters(), pyro.validation_enabled(False), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return torch.stack([functional_call(module, values, (task,)) for task in tasks])

    at, others = (
        torch.cat([p.detach().flatten() for p in chosen.values()]),
        len(trained) - len(chosen),
    )
    with torch.no_grad():
        losses(at)  # computed evidence is that of this point from now on
    return Weights(
        losses, at, shapes, f"{others} other parameter tensors of model and guide" if others else ""
    )


def _chosen(
    module: nn.Module,
    trained: Mapping[str, nn.Parameter],
    parameters: Sequence[str] | None,
) -> dict[str, nn.Parameter]:
    if parameters is None:
        readers = {
            id(p)
            for prior in module.modules()
            if isinstance(prior, SupportPrior)
            for p in (*prior.encoder.parameters(), *prior.head.parameters())
        }
        chosen = {
            name: p
            for name, p in trained.items()
            if name.startswith("model.") and id(p) not in readers
        }
    else:
        meant = {
            name: [full for full in trained if f"{_short(full)}.".startswith(f"{name}.")]
            for name in parameters
        }
        strangers = [name for name, found in meant.items() if not found]
        require(
            not strangers,
            f"parameters among {sorted(map(_short, trained))}",
            strangers,
            "Correct the names.",
        )
        chosen = {
            name: p for name, p in trained.items() if any(name in found for found in meant.values())
        }
    require(
        bool(chosen),
        "a parameter or more to judge",
        "none",
        "Name some that are trained: parameters=[...].",
    )
    return chosen


def _freeze(module: nn.Module) -> None:
    """Computed evidence stays as of its first use: no gradient flows through it, so its values mustn't move either."""
    for part in module.modules():
        if isinstance(part, SupportPrior) and part.evidence is not None:
            part.__dict__["belief"] = functools.cache(part.belief)
        if isinstance(part, AmortizedGuide) and part.evidence is not None:
            part.__dict__["_computed"] = functools.cache(part._computed)


def _short(name: str) -> str:
    return name.removeprefix("model.").removesuffix("_unconstrained")
