"""The optimizers that the recipes train with: one frozen dataclass of settings each, which builds the optimizer."""
