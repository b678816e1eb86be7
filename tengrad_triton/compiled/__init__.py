"""The training step as two compiled functions: one refreshes the curvature, one reuses it."""
