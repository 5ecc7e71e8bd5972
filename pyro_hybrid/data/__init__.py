"""Hold trajectories of many systems and check them."""
