"""What the kernels compile to: every launch configuration, for GPUs that need not be there.

`python -m perf.machine_code` compiles with the installed Triton, and `--triton VERSION ...` with others, each in a
folder of its own. `--page` writes docs/machine-code.md from what is kept in perf/results/machine-code/.

    gpus                                     the GPUs that are compiled for, and their limits by their makers
    resources, configurations, instructions  what is compiled, and what is counted
    compiler, matrix, environments           one configuration; all of them; with other versions of Triton
    results                                  the files that keep what came of it
    launches, roofline                       what an op launches, and the least time that a GPU can take for it
    page                                     docs/machine-code.md
"""
