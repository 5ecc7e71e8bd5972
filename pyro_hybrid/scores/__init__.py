"""Compare recovered latents with true ones."""
