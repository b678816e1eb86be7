"""A run: its settings, the training loop, its metrics, and the folder that keeps them."""
