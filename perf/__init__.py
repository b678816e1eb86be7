"""The benchmarks: kernels, steps, the optimizer against the authors' formulation, memory and scaling.

`python -m perf` runs the cases that fit the machine, and writes docs/performance.md from all results.
`python -m perf.gpu` also tests the kernels and trains, on a GPU's machine without an installation, in two calls.

    timing, limits, launches            clocks, the machine's limits, repeated calls
    models, layers                      what is measured
    baseline, loops                     the authors' formulation; the steps that are timed
    alternatives, sizes, bench_kernels  kernels against torch's expressions
    steps, optimizers, memory, scaling  the cases of each suite
    selection, suites, record           which cases run on which machine, and their result files
    results, targets, figures, report   the page
    gpu/, host/, machine_code/          commands of their own
"""
