"""The study behind docs/pinn.md: optimizers for least squares, on differential equations, by one clock."""
