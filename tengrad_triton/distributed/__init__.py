"""Training in several processes: one curvature of the samples of all of them, by torch.distributed."""
