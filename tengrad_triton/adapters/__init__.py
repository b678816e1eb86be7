"""Gauss-Newton steps for problems written for other libraries, which only their own adapter imports."""
