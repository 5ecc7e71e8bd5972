"""Names for everything that training changes, in model, guide and optimizer; checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hybrid.errors import fail, require
from pyro_hybrid.programs.module import require_local
from pyro_hybrid.training.storage import CheckpointError

__all__ = [
    "ADAM",
    "Parameters",
    "adam",
    "copied",
    "load_model_tensors",
    "model_tensors",
    "optimizer_tensors",
    "require_like",
    "require_optimizer_like",
    "set_model_tensors",
    "set_optimizer_tensors",
    "trained_names",
]

Parameters = dict[str, Tensor]
ADAM: dict[str, Any] = {"name": "Adam", "betas": (0.9, 0.99), "eps": 1e-8}
_MOMENTS = ("exp_avg", "exp_avg_sq")


def adam(
    model: nn.Module, guide: nn.Module, learning_rate: float, device: torch.device
) -> torch.optim.Adam:
    """Return the optimizer of :func:`~pyro_hybrid.meta_train` over the parameters of model and guide."""
    distinct = {id(p): p for p in (*model.parameters(), *guide.parameters())}
    return torch.optim.Adam(
        distinct.values(),
        lr=learning_rate,
        betas=ADAM["betas"],
        eps=ADAM["eps"],
        fused=device.type in ("cpu", "cuda"),
    )


def model_tensors(model: nn.Module, guide: nn.Module) -> Parameters:
    """Return parameters and buffers by name, not copied; tensors that model and guide share have one name."""
    require_local(model=model, guide=guide)
    tensors: Parameters = {}
    known: set[int] = set()
    for role, module in (("model", model), ("guide", guide)):
        for name, value in module.state_dict(keep_vars=True).items():
            require(
                isinstance(value, Tensor),
                f"tensors alone in the state of the {role}",
                f"{name}, a {type(value).__name__}",
                "Keep other settings in attributes.",
                TypeError,
            )
            if id(value) not in known:
                known.add(id(value))
                # torch.compile adds "_orig_mod." to the names of what it compiles.
                tensors[f"{role}.{name.replace('_orig_mod.', '')}"] = value
    return tensors


def trained_names(model: nn.Module, guide: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {
        name: value
        for name, value in model_tensors(model, guide).items()
        if isinstance(value, nn.Parameter) and value.requires_grad
    }


def copied(tensors: Mapping[str, Tensor], *, to_cpu: bool = False) -> Parameters:
    """Return copies that share no memory with the originals."""
    copies = {}
    for name, value in tensors.items():
        source = value.detach().cpu() if to_cpu else value.detach()
        copies[name] = source.clone(memory_format=torch.contiguous_format)
    return copies


def require_like(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], whose: str) -> None:
    """Refuse saved tensors unless names, shapes and dtypes are those of ``own``.

    Arguments:
        own: the tensors to be overwritten.
        saved: the tensors from a file.
        whose: what the file holds, for messages.
    """
    missing = [name for name in own if name not in saved]
    unknown = [name for name in saved if name not in own]
    if missing or unknown:
        names = missing or unknown
        shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
        fail(
            f"{whose} with the tensors of this model",
            f"one that has no {shown}" if missing else f"one that has {shown}, too",
            "Build model and guide as they were trained.",
            CheckpointError,
        )
    for name, value in own.items():
        if (value.shape, value.dtype) != (saved[name].shape, saved[name].dtype):
            fail(
                f"{whose} with {name} of shape {tuple(value.shape)} in {value.dtype}, as this model's",
                f"shape {tuple(saved[name].shape)} in {saved[name].dtype}",
                "Build model and guide as they were trained.",
                CheckpointError,
            )


def set_model_tensors(model: nn.Module, guide: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into their places; they must have passed :func:`require_like`."""
    with torch.no_grad():
        for name, value in model_tensors(model, guide).items():
            value.copy_(saved[name])


def load_model_tensors(
    model: nn.Module, guide: nn.Module, saved: Mapping[str, Tensor], whose: str
) -> None:
    """Copy saved tensors into their places, all or none: see :func:`require_like`."""
    require_like(model_tensors(model, guide), saved, whose)
    set_model_tensors(model, guide, saved)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> Parameters:
    """Return the state of an optimizer, ``{parameter/moment: tensor}``, not copied."""
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value
    return tensors


def require_optimizer_like(
    parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor], whose: str
) -> None:
    """Refuse a saved state of Adam that doesn't fit the parameters: a fused step writes wherever it points."""
    expected: Parameters = {}
    for name, parameter in parameters.items():
        if any(other.startswith(f"{name}/") for other in saved):
            expected |= {f"{name}/{moment}": parameter for moment in _MOMENTS}
            expected[f"{name}/step"] = torch.zeros(())
    require_like(expected, saved, f"{whose} with an optimizer's state")
    for name, value in saved.items():
        is_valid = bool(torch.isfinite(value).all())
        if not name.endswith("/exp_avg"):
            is_valid = is_valid and bool((value >= 0.0).all())
        require(
            is_valid,
            f"{whose} with finite moments of the optimizer",
            f"others in {name}",
            "Go back to an earlier checkpoint: remove this one, or name that one.",
            CheckpointError,
        )


def set_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    saved: Mapping[str, Tensor],
) -> None:
    """Load a state that has passed :func:`require_optimizer_like`."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(listed):
        prefix = f"{names.get(id(parameter))}/"
        entries = {n[len(prefix) :]: v for n, v in saved.items() if n.startswith(prefix)}
        if entries:
            state[index] = entries
    groups: Any = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
