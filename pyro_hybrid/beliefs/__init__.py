"""Represent what is known about a latent by natural parameters that add."""
