"""The problems of docs/guides. Each measures and writes its page: `python -m examples.poisson --out docs/guides`."""
