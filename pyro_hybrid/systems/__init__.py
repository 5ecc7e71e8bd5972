"""Ground truth: three systems that simulate tasks and offer their known and their full equations, one file each."""

from .advection_diffusion import AdvectionDiffusion
from .double_pendulum import DoublePendulum
from .pendulum import Pendulum
from .system import System

__all__ = ["AdvectionDiffusion", "DoublePendulum", "Pendulum", "System"]
