"""Combine beliefs and evidence into priors, guides and posteriors."""
