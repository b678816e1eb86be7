"""Gauss-Newton steps on residuals."""
