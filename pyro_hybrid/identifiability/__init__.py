"""Certify which latents of a program the data identify, check by check."""
