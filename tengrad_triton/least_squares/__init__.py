"""Gauss-Newton steps on residuals: rows of all terms, one solve in the smaller space, and steps that are taken back."""
