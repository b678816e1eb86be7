"""`tengrad-triton paper`: the paper's tables and figures as training runs and measurements, beside its numbers.

Each line may import the lines above it:

    published        what the paper ran, tuned and reported
    request          the arguments of the command
    runs, estimates  the training runs that a target needs; their time and memory
    report/          the JSON document, the figures and the pages
    measurements/    what is measured beside the runs
    execute          the command

The paper is Soori et al. 2021.
"""
