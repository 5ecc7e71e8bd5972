"""Identifiable hybrid models as Pyro programs: known equations, neural terms, support-conditioned priors."""

from . import families, models, systems
from .accuracy import step_error
from .checkpoint import Fit, load
from .dynamics import SolverError, solve
from .encoders import SetEncoder
from .guide import AmortizedGuide
from .identifiability.certificate import Certificate
from .identifiability.certify import certify
from .identifiability.mcc import mcc
from .identifiability.separability import disentangle
from .linearise import Linearised
from .mixing import Mixing, Residual, overlap
from .module import HybridModel
from .posterior import (
    calibrate,
    draws,
    load_arviz,
    pareto_k,
    predict,
    save_arviz,
    summary,
    to_arviz,
)
from .prior import SupportPrior, UnconditionalPrior
from .sharpening import sharpen
from .storage import CheckpointError
from .svi import SVI
from .tasks import Episode, Tasks
from .training import TrainingError, meta_train
from .trials import Calibration, ContractError, check_calibration, check_hybrid_model

__version__ = "0.1.0"

__all__ = [
    "SVI",
    "AmortizedGuide",
    "Calibration",
    "Certificate",
    "CheckpointError",
    "ContractError",
    "Episode",
    "Fit",
    "HybridModel",
    "Linearised",
    "Mixing",
    "Residual",
    "SetEncoder",
    "SolverError",
    "SupportPrior",
    "Tasks",
    "TrainingError",
    "UnconditionalPrior",
    "calibrate",
    "certify",
    "check_calibration",
    "check_hybrid_model",
    "disentangle",
    "draws",
    "families",
    "load",
    "load_arviz",
    "mcc",
    "meta_train",
    "models",
    "overlap",
    "pareto_k",
    "predict",
    "save_arviz",
    "sharpen",
    "solve",
    "step_error",
    "summary",
    "systems",
    "to_arviz",
]
