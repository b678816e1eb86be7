"""The training step as compiled graphs."""
