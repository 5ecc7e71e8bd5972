"""Provide the neural parts of a model: encoders, force terms and instruments."""
