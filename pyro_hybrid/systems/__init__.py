"""Ground truth: systems that simulate tasks and offer their known and their full equations, and one real pendulum."""

from pyro_hybrid.systems.advection_diffusion import AdvectionDiffusion
from pyro_hybrid.systems.double_pendulum import DoublePendulum
from pyro_hybrid.systems.forced_pendulum import ForcedPendulum
from pyro_hybrid.systems.pendulum import Pendulum
from pyro_hybrid.systems.real_double_pendulum import Recordings, ibm_double_pendulum
from pyro_hybrid.systems.recorded_double_pendulum import RecordedDoublePendulum
from pyro_hybrid.systems.system import System

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
