"""The pieces of a call that are no suites of `python -m perf`.

`python -m perf.gpu.pieces NAME` runs one of these, and writes NAME.json:

    smoke     a model trains by kernels as by torch's definitions
    trace     the kernels that a step consists of
    variants  the error and the time of every launch configuration
    race      accuracy by training time

`python -m perf.gpu.pieces.compiling MODEL N` has no results: it compiles steps, so that later processes need not.
"""
