"""What one forward and backward pass leaves behind: layer calls, output gradients, and per-sample gradients without a rule."""
