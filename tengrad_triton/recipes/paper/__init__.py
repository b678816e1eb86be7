"""`tengrad-triton paper`: the paper's tables and figures as training runs and measurements, beside its numbers.

Each line may import the lines above it:

    published        what the paper ran, tuned and reported
    request          the arguments of the command
    progress           says which piece of the work is under way
    runs, shared       the training runs that a target needs, and what all share
    memory, estimates  the memory and the time of the runs
    table              the table of estimates
    report/            the JSON document, the figures and the pages
    measurements/      what is measured beside the runs, and what that costs
    forecast           what is left to do, and how long it takes
    execute            the command

The paper is Soori et al. 2021.
"""
