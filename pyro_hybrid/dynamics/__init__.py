"""Integrate ordinary differential equations, differentiably and one trajectory apart from the others."""
