"""The published claims, rerun: ``python examples/experiments NAME``, one module an experiment."""

__all__: list[str] = []
