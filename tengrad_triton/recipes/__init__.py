"""The paper's experiments and the command line; `pip install 'tengrad-triton[train]'` installs what they need.

Each line may import the lines above it, and nothing below:

    errors, files   how a command ends early; files that are replaced whole
    measuring/      devices, clocks, memory, the exponent of a power law
    data/           data sets of images, by name
    models/         models, by name
    optimizers/     the settings of each optimizer
    training/       a run: settings, loop, metrics, folder
    reports/        the tables, figures and page of a run
    paper/          the paper's experiments
    cli/            the command `tengrad-triton`

`tests/test_layering.py` checks this order.
"""
