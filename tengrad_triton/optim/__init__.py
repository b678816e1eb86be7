"""`TENGraD` as a `torch.optim.Optimizer`: settings, validation, schedules, summary."""
