"""The choice of representation and kernels for each weight: analytic rule, measurements, and the file of them."""
