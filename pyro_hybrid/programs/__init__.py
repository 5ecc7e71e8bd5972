"""Run Pyro programs that own their parameters."""
