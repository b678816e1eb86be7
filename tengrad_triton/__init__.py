"""Exact natural-gradient steps for PyTorch, layer by layer: TENGraD as Triton kernels.

Each sub-package imports only those before it:

- `kernels`: the tensor operations, as Triton kernels and in PyTorch.
- `likelihoods`, `profiling`: which rows J has; names for the phases of a step.
- `derivatives`: derivatives of a network with respect to its inputs, carried forward through its layers.
- `layers`: layer types and their rules, which say what a call contributes to the rows of J.
- `capture`: hooks that record the calls and the output gradients of one forward and backward.
- `curvature`: from contributions to J, the factored Fisher blocks, and the step along the natural gradient.
- `tuning`: which representation and kernels are fastest for each weight.
- `inspection`: the curvature as dense tensors for people to look at, and the check of a rule against autograd.
- `optim`: `TENGraD`, a `torch.optim.Optimizer`.
- `compiled`: the whole step as compiled graphs.
- `baselines`: K-FAC and its relatives on the same capture.
- `recipes`: models, data, training runs, reports and the command line.
"""

import logging

from tengrad_triton.compiled.train_step import compile_train_step
from tengrad_triton.inspection.rules import check_rule
from tengrad_triton.jets import Derivatives, derivatives, laplacian
from tengrad_triton.layers import Call, Canonical, EmbeddingGrads, OuterProducts, PerSampleGrads, canonical
from tengrad_triton.least_squares.damping import EffectiveDimension, Exponential, GainRatio
from tengrad_triton.least_squares.gauss_newton import GaussNewton
from tengrad_triton.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from tengrad_triton.optim.damping import LevenbergMarquardt
from tengrad_triton.optim.interval import Growing
from tengrad_triton.optim.tengrad import TENGraD
from tengrad_triton.residuals.module import Residuals
from tengrad_triton.tuning.autotune import autotune
from tengrad_triton.tuning.plan import Plan

logging.getLogger(__name__).addHandler(logging.NullHandler())

__version__ = "0.1.0"
__all__ = [
    "Bernoulli",
    "Call",
    "Canonical",
    "Categorical",
    "Derivatives",
    "EffectiveDimension",
    "EmbeddingGrads",
    "Exponential",
    "GainRatio",
    "GaussNewton",
    "Gaussian",
    "Growing",
    "LevenbergMarquardt",
    "Likelihood",
    "OuterProducts",
    "PerSampleGrads",
    "Plan",
    "Residuals",
    "TENGraD",
    "autotune",
    "canonical",
    "check_rule",
    "compile_train_step",
    "derivatives",
    "laplacian",
]
