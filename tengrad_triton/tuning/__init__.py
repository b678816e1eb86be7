"""Which representation and which kernels serve each weight: the analytic rule, measurements, and the file that keeps them."""
