"""Complete Pyro programs, one file for each published model."""

from .aphynity import APHYNITY, OriginalAPHYNITY
from .hybrid_vae import HybridVAE
from .meta_hybrid_vae import MetaHybridVAE

__all__ = ["APHYNITY", "HybridVAE", "MetaHybridVAE", "OriginalAPHYNITY"]
