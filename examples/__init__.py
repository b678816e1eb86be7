"""Problems on which a guide of docs/guides is measured: `python -m examples.poisson --out docs/guides`."""
