"""The published claims, rerun: ``python -m pyro_hybrid.experiments NAME``, one module an experiment."""
