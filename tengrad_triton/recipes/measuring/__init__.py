"""What is measured of the machine: its description, clocks, memory, and the exponent of a power law."""
