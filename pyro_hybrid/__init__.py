"""Identifiable hybrid models as Pyro programs: known equations, neural terms, support-conditioned priors."""

from pyro_hybrid import models, systems
from pyro_hybrid.beliefs import families
from pyro_hybrid.data.episode import Episode
from pyro_hybrid.data.shots import Shots
from pyro_hybrid.data.tasks import Tasks
from pyro_hybrid.diagnostics.calibration import CalibrationReport, check_calibration
from pyro_hybrid.diagnostics.contract import ContractError, check_hybrid_model
from pyro_hybrid.dynamics.failures import SolverError
from pyro_hybrid.dynamics.interpolate import interpolate
from pyro_hybrid.dynamics.solve import solve
from pyro_hybrid.evidence.encoder import Encoder
from pyro_hybrid.evidence.gauss_newton import GaussNewton
from pyro_hybrid.fitting.identify import identify
from pyro_hybrid.fitting.posterior import Posterior
from pyro_hybrid.fitting.report import Report
from pyro_hybrid.fitting.stages import (
    compute_evidence,
    fix_gauge,
    refine_weights,
    rescale_intervals,
)
from pyro_hybrid.identifiability.certificate import Certificate
from pyro_hybrid.identifiability.certify import certify
from pyro_hybrid.inference.draws import draws, predict
from pyro_hybrid.inference.guide import AmortizedGuide
from pyro_hybrid.inference.importance import pareto_k
from pyro_hybrid.inference.prior import SupportPrior, UnconditionalPrior
from pyro_hybrid.inference.to_arviz import load_arviz, save_arviz, summary, to_arviz
from pyro_hybrid.nets.correction import projection_penalty
from pyro_hybrid.nets.encoders import SetEncoder
from pyro_hybrid.nets.gauge import Gauge
from pyro_hybrid.nets.hybrid_field import HybridField
from pyro_hybrid.nets.mixing import Mixing
from pyro_hybrid.nets.residual import Residual
from pyro_hybrid.programs.module import HybridModel
from pyro_hybrid.scores.ica import disentangle
from pyro_hybrid.scores.mcc import mcc
from pyro_hybrid.training.fit import Fit, load
from pyro_hybrid.training.loop import TrainingError
from pyro_hybrid.training.meta_train import meta_train
from pyro_hybrid.training.schedule import Ramp
from pyro_hybrid.training.step_error import step_error
from pyro_hybrid.training.storage import CheckpointError
from pyro_hybrid.training.svi import SVI

__version__ = "0.1.0"

__all__ = [
    "SVI",
    "AmortizedGuide",
    "CalibrationReport",
    "Certificate",
    "CheckpointError",
    "ContractError",
    "Encoder",
    "Episode",
    "Fit",
    "Gauge",
    "GaussNewton",
    "HybridField",
    "HybridModel",
    "Mixing",
    "Posterior",
    "Ramp",
    "Report",
    "Residual",
    "SetEncoder",
    "Shots",
    "SolverError",
    "SupportPrior",
    "Tasks",
    "TrainingError",
    "UnconditionalPrior",
    "certify",
    "check_calibration",
    "check_hybrid_model",
    "compute_evidence",
    "disentangle",
    "draws",
    "families",
    "fix_gauge",
    "identify",
    "interpolate",
    "load",
    "load_arviz",
    "mcc",
    "meta_train",
    "models",
    "pareto_k",
    "predict",
    "projection_penalty",
    "refine_weights",
    "rescale_intervals",
    "save_arviz",
    "solve",
    "step_error",
    "summary",
    "systems",
    "to_arviz",
]
