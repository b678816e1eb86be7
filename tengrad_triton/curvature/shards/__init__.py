"""J and D of the outputs that this process has, where parameters are cut among processes (docs/math.md, M21)."""
