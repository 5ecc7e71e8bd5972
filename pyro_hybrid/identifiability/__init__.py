"""Is what was learned the truth, or one of many that fit as well? Scores against known latents, and their alignment."""

from __future__ import annotations

from pyro_hybrid.identifiability.mcc import MCC, mcc
from pyro_hybrid.identifiability.separability import disentangle

__all__ = ["MCC", "disentangle", "mcc"]
