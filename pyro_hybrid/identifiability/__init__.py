"""Is what was learned the truth, or one of many that fit as well? The certificate, its checks, scores against truth.

Every check is a function that returns numbers, and another that judges them; :func:`certify` makes them all.
"""

from __future__ import annotations

from pyro_hybrid.identifiability.certificate import Certificate
from pyro_hybrid.identifiability.certify import certify
from pyro_hybrid.identifiability.check import Check
from pyro_hybrid.identifiability.mcc import MCC, mcc
from pyro_hybrid.identifiability.meta_parameters import judge_meta_parameters, meta_parameters
from pyro_hybrid.identifiability.samples import how_many, shots_curve, tasks_curve
from pyro_hybrid.identifiability.separability import disentangle, judge_separability, separable
from pyro_hybrid.identifiability.weights import weights_of

__all__ = [
    "MCC",
    "Certificate",
    "Check",
    "certify",
    "disentangle",
    "how_many",
    "judge_meta_parameters",
    "judge_separability",
    "mcc",
    "meta_parameters",
    "separable",
    "shots_curve",
    "tasks_curve",
    "weights_of",
]
