"""Parts that several models share: a system's neural force, its physics latents, and its state."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
from torch import Tensor

from pyro_hybrid.nets.hybrid_field import Force
from pyro_hybrid.nets.residual import Residual
from pyro_hybrid.shapes import State, Stock
from pyro_hybrid.systems import System

__all__ = ["build_residual", "neural_force", "sample_physics", "split_state"]


def build_residual(
    system: System, num_latents: int, *, linear: bool, width: int, depth: int
) -> Residual:
    """Build the network of a system's neural force."""
    return Residual(
        len(system.inputs),
        num_latents,
        system.outputs,
        linear,
        width=width,
        depth=depth,
        scale=system.inputs,
        periodic=system.periodic,
    )


def neural_force(system: System, residual: Residual, unknown: Tensor) -> Force:
    """Return the neural force of neural latents (..., task, component)."""
    latents = unknown[..., None, :]
    return residual.given(latents.unsqueeze(-2) if system.grid else latents)


def sample_physics(system: System, distributions: Mapping[str, Stock]) -> dict[str, Tensor]:
    """Sample the physics latents; return each with shape (..., task, 1)."""
    return {name: pyro.sample(name, distributions[name])[..., None, 0] for name in system.physics}


def split_state(system: System, state: Tensor) -> State:
    """Split a state (..., component) into its components, unless it is a field on a grid."""
    return state if system.grid else state.unbind(-1)
