"""Complete Pyro programs, one file for each published model."""

from .meta_hybrid_vae import MetaHybridVAE

__all__ = ["MetaHybridVAE"]
