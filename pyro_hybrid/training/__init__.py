"""Train programs by gradient steps and by second order, and save what they learned."""
