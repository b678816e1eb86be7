"""A run: its settings, the training loop of one optimizer, the metrics, and the folder that keeps everything."""
