"""The published claims, rerun: ``python -m pyro_hybrid.experiments NAME``, one module an experiment."""

__all__: list[str] = []
