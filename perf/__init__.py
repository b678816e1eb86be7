"""The benchmarks: kernels, steps, the optimizer against the authors' formulation, memory and scaling.

`python -m perf` measures what fits the machine, and generates docs/performance.md from all results that there are.
`python -m perf.gpu` does the same, and more, on a CUDA machine where this project is not installed.
"""
