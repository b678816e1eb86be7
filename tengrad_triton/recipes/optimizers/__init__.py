"""The settings of each optimizer: one frozen dataclass each, which builds the optimizer.

The defaults of tengrad, sgd and adamw suit the default run. Each is the best of a grid: the highest accuracy after 15
epochs on the last fifth of the digits' training set, as a mean over six seeds. The other optimizers have the defaults
of their own papers and packages. Other data need other settings.

A new optimizer is a dataclass in a file here, its name in `OptimizerName` and a field of `training.settings.Settings`.
"""
