"""The settings of each optimizer: one frozen dataclass each, which builds the optimizer.

A new optimizer is a dataclass in a file here and a line of `registry.OPTIMIZERS`; CONTRIBUTING.md has an example.

The defaults of tengrad_paper, sgd and adamw suit the digits. Each is the best of a grid: the highest accuracy after 15
epochs on the last fifth of the digits' training set, as a mean over six seeds. The other optimizers have the defaults
of their own papers and packages. `paper.published.rates` has the rates for other data sets.
"""
