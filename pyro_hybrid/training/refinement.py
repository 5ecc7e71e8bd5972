"""Settings of second-order training, and which networks it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from pyro_hybrid.errors import fail, require
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.programs.module import HybridModel
from pyro_hybrid.training.weight_slopes import trained_weights

__all__ = ["Refinement", "check_settings", "network_of"]

LARGEST = 10_000  # number of weights; their precision has the square of it, in float64


class Refinement(NamedTuple):
    """Settings of :func:`refine_in_place`.

    Attributes:
        num_steps: number of batches.
        batch_size: number of systems in a batch.
        evidence: how a batch is read.
        forgetting: share of the weights' precision that each batch forgets, for earlier ones were linearized elsewhere.
        prior_sd: how far off the weights may be.
        outlier_factor: exclude tasks whose cost exceeds this multiple of the batch median.
        noise: name of the model's attribute that holds the observations' standard deviation, which is set to what is
            left unexplained; None to leave it.
        seed: seed of the batches.
    """

    num_steps: int = 8
    batch_size: int = 8
    evidence: GaussNewton = GaussNewton(2)
    forgetting: float = 0.1
    prior_sd: float = 0.1
    outlier_factor: float = 10.0
    noise: str | None = "noise"
    seed: int = 0


def network_of(model: HybridModel, network: nn.Module | None) -> nn.Module:
    """Return the network to be refined, if its weights can be."""
    network = network if network is not None else getattr(model, "residual", None)
    if network is None:
        fail(
            "a network",
            f"{type(model).__name__} without a residual",
            "Pass network=, such as model.force.",
        )
    weights = trained_weights(network)
    require(
        bool(weights),
        "a network with weights that are not frozen",
        type(network).__name__,
        "Pass the part that was trained.",
    )
    hooked = [
        name
        for name, weight in weights.items()
        if weight._backward_hooks or weight._post_accumulate_grad_hooks
    ]
    require(
        not hooked,
        "weights without hooks on their gradients, which second-order training can't see",
        hooked,
        "Freeze entries with torch.nn.utils.parametrize, or whole weights with requires_grad_(False).",
    )
    size = sum(weight.numel() for weight in weights.values())
    require(
        size <= LARGEST,
        f"a network of up to {LARGEST} weights",
        size,
        "Refine a part of it, or train longer.",
    )
    return network


def check_settings(settings: Refinement) -> None:
    """Refuse settings that make no sense."""
    checks: list[tuple[str, Callable[[float], bool], str]] = [
        ("num_steps", lambda x: isinstance(x, int) and x >= 1, "a whole number of 1 or more"),
        ("batch_size", lambda x: isinstance(x, int) and x >= 1, "a whole number of 1 or more"),
        ("forgetting", lambda x: 0.0 <= x < 1.0, "a number in [0, 1)"),
        ("prior_sd", lambda x: 0.0 < x < float("inf"), "a positive number"),
        ("outlier_factor", lambda x: x > 1.0, "a number above 1"),
    ]
    for name, is_good, wanted in checks:
        value = getattr(settings, name)
        require(is_good(value), f"{name} as {wanted}", repr(value), "The default is a good choice.")
    require(
        isinstance(settings.evidence, GaussNewton),
        "evidence=ph.GaussNewton(...)",
        type(settings.evidence).__name__,
        "A batch is linearized where Gauss-Newton ends.",
        TypeError,
    )
