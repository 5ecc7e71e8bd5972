"""Ground truth: systems that simulate tasks and offer their known and their full equations, and one real pendulum."""

from .advection_diffusion import AdvectionDiffusion
from .double_pendulum import DoublePendulum
from .forced_pendulum import ForcedPendulum
from .pendulum import Pendulum
from .real_double_pendulum import Recordings, ibm_double_pendulum
from .recorded_double_pendulum import RecordedDoublePendulum
from .system import System

__all__ = [
    "AdvectionDiffusion",
    "DoublePendulum",
    "ForcedPendulum",
    "Pendulum",
    "RecordedDoublePendulum",
    "Recordings",
    "System",
    "ibm_double_pendulum",
]
