"""Turn trajectories into increments of natural parameters."""
