"""The choice of representation and kernels for each weight: by a cost model or by measurements, and the plan file."""
