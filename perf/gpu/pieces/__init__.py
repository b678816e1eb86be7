"""The pieces of a call that are no suites of `python -m perf`: a process for each, `python -m perf.gpu.pieces NAME`.

smoke      a model trains by kernels as by torch's definitions
trace      the kernels that a step consists of
variants   the error and the time of every launch configuration
compiling  compiled steps are compiled for the first time
race       accuracy by training time
"""
