"""Experiments that rerun the published claims: ``python examples/experiments NAME``, one module each."""

__all__: list[str] = []
