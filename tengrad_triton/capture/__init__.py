"""What one forward and backward leave behind: layer calls, output gradients, and rows that need no rule."""
