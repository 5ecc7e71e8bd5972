"""Complete Pyro programs, one file for each published model."""

from pyro_hybrid.models.aphynity import APHYNITY, OriginalAPHYNITY
from pyro_hybrid.models.hybrid_vae import HybridVAE
from pyro_hybrid.models.meta_hybrid_vae import MetaHybridVAE

__all__ = ["APHYNITY", "HybridVAE", "MetaHybridVAE", "OriginalAPHYNITY"]
