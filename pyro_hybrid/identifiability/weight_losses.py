"""Turn a program's weights into meta-parameters: each task's ELBO as a deterministic function of some of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn
from torch.func import functional_call

from pyro_hybrid.data.episode import Episode
from pyro_hybrid.errors import require, require_integer, require_seed
from pyro_hybrid.evidence.protocol import Evidence, Fixed
from pyro_hybrid.evidence.settings import encoder_of
from pyro_hybrid.identifiability.local_curvature import Losses
from pyro_hybrid.identifiability.meta_parameters import Shapes, require_few
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.inference.prior import SupportPrior
from pyro_hybrid.programs.module import local_parameters, require_local, with_belief

__all__ = ["WeightLosses", "weight_losses"]


class WeightLosses(NamedTuple):
    """Arguments of :func:`measure_meta_parameters`: ``measure_meta_parameters(**weights._asdict())``.

    Attributes:
        losses: each task's loss as a function of the parameters.
        at: the parameters' values, flattened.
        names: the parameters' names and shapes.
        given: description of the parameters that are held fixed.
    """

    losses: Losses
    at: Tensor
    names: Shapes
    given: str


def weight_losses(
    model: nn.Module,
    guide: nn.Module,
    episode: Episode,
    parameters: Sequence[str] | None = None,
    *,
    num_particles: int = 10,
    seed: int = 0,
) -> WeightLosses:
    r"""Return each task's negative ELBO as a function of some parameters, always with the same random numbers.

    .. math:: L_t(\varphi) = \frac1K \sum_k \log q(z_k \mid S_t, x_t) - \log p_\varphi(x_t, z_k \mid S_t)

    All other parameters are held fixed, the guide's too unless they are named (``"guide.head"``), and computed evidence
    keeps its first value: changes that compensate each other in both are not seen.

    Arguments:
        model, guide: a Pyro program and its guide, which own their parameters; they are copied.
        episode: the tasks.
        parameters: names of parameters or of modules; by default all that the model trains, without the parts of its
            prior that read the support.
        num_particles: number K of draws from the guide.
        seed: of these draws.
    """
    require_local(model=model, guide=guide)
    require_integer("num_particles", num_particles, 1, "Ten are a start; noise bends the loss.")
    require_seed(seed)
    elbo = TraceMeanField_ELBO(
        num_particles=num_particles,
        vectorize_particles=num_particles > 1,
        max_plate_nesting=1,
    )
    module = copy.deepcopy(elbo(model, guide)).double()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    chosen = _chosen(module, trained, parameters)
    shapes = {_short(name): tuple(p.shape) for name, p in chosen.items()}
    at = torch.cat([p.detach().flatten() for p in chosen.values()])
    require_few(len(at), shapes)
    module.requires_grad_(False)
    episode = episode.double()
    with torch.no_grad(), local_parameters():
        tasks = [
            _with_fixed_evidence(module, episode.select_tasks(i))
            for i in range(episode.query.shape[0])
        ]

    def losses(flat: Tensor) -> Tensor:
        values = _unflatten(flat, chosen)
        devices = range(torch.cuda.device_count())
        with local_parameters(), pyro.validation_enabled(False), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return torch.stack([_loss(module, values, task) for task in tasks])

    num_fixed = len(trained) - len(chosen)
    given = f"{num_fixed} other parameter tensors of model and guide" if num_fixed else ""
    return WeightLosses(losses, at, shapes, given)


def _unflatten(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pieces = flat.split([p.numel() for p in like.values()])
    pairs = zip(like.items(), pieces, strict=True)
    return {name: piece.view_as(p) for (name, p), piece in pairs}


def _chosen(
    module: nn.Module, trained: Mapping[str, nn.Parameter], parameters: Sequence[str] | None
) -> dict[str, nn.Parameter]:
    if parameters is None:
        chosen = _default_parameters(module, trained)
    else:
        chosen = _named_parameters(trained, parameters)
    require(
        bool(chosen),
        "a parameter or more to judge",
        "none",
        "Name some that are trained: parameters=[...].",
    )
    return chosen


def _default_parameters(
    module: nn.Module, trained: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Return the model's parameters, without those of its prior that read the support."""
    readers: set[int] = set()
    for prior in module.modules():
        if isinstance(prior, SupportPrior) and prior.network is not None:
            readers.update(id(p) for p in prior.network.parameters())
    return {
        name: p for name, p in trained.items() if name.startswith("model.") and id(p) not in readers
    }


def _named_parameters(
    trained: Mapping[str, nn.Parameter], parameters: Sequence[str]
) -> dict[str, nn.Parameter]:
    """Return the parameters that have one of the names, or belong to a module of that name."""
    by_name = {
        name: [full for full in trained if f"{_short(full)}.".startswith(f"{name}.")]
        for name in parameters
    }
    unknown = [name for name, matches in by_name.items() if not matches]
    require(
        not unknown,
        f"parameters among {sorted(map(_short, trained))}",
        unknown,
        "Correct the names.",
    )
    wanted = {full for matches in by_name.values() for full in matches}
    return {name: p for name, p in trained.items() if name in wanted}


class _Task(NamedTuple):
    """One task with its computed evidence: no gradient flows through evidence, so its values must not move either.

    Attributes:
        episode: the task; it has a belief if the prior's evidence is computed.
        evidence: the guide's increment if the guide's evidence is computed, else None.
    """

    episode: Episode
    evidence: Evidence | None


def _with_fixed_evidence(module: ELBOModule, episode: Episode) -> _Task:
    """Compute the evidence of a task once."""
    model = module.model
    guide = module.guide
    informed = with_belief(model, episode)
    evidence = None
    if isinstance(guide, AmortizedGuide) and _is_computed(guide.evidence):
        belief = guide.prior.population() if informed.belief is None else informed.belief
        belief = belief.expand(episode.query.shape[0])
        increment = guide.evidence(belief, episode.query, model, given=episode.support)
        evidence = Fixed(increment)
    prior = getattr(model, "prior", None)
    if isinstance(prior, SupportPrior) and _is_computed(prior.evidence):
        episode = informed
    return _Task(episode, evidence)


def _is_computed(evidence: Evidence) -> bool:
    return encoder_of(evidence) is not evidence


def _loss(module: ELBOModule, values: dict[str, Tensor], task: _Task) -> Tensor:
    """Return the task's loss, with the guide's evidence fixed for the length of the call."""
    guide = module.guide
    if task.evidence is None or not isinstance(guide, AmortizedGuide):
        loss: Tensor = functional_call(module, values, (task.episode,))
        return loss
    original = guide.evidence
    guide.evidence = task.evidence
    try:
        loss = functional_call(module, values, (task.episode,))
    finally:
        guide.evidence = original
    return loss


def _short(name: str) -> str:
    return name.removeprefix("model.").removesuffix("_unconstrained")
