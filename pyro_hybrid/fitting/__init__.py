"""Turn a trained program into an answer: a posterior as a value, and the steps that improve it."""
