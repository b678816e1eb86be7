"""The published least-squares optimizers for physics-informed networks, to compare with."""
