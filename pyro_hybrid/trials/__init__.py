"""A program put on trial: does it keep its contracts, and is its guide the posterior that it claims to be."""

from .calibration import Calibration, check_calibration
from .contract import ContractError, check_hybrid_model

__all__ = ["Calibration", "ContractError", "check_calibration", "check_hybrid_model"]
