"""The machine and what it takes: devices, clocks, peak memory, and the exponent of a power law."""
