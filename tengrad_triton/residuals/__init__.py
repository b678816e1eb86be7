"""Residuals of least-squares problems, and the rows of their Jacobian."""
