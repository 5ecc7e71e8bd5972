"""Check a program's contracts and whether its guide is calibrated."""
