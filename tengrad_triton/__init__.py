"""Exact natural-gradient steps for PyTorch at close to the cost of SGD: TENGraD as Triton kernels."""

from tengrad_triton.autotune import autotune
from tengrad_triton.damping import LevenbergMarquardt
from tengrad_triton.fisher import Bernoulli, Categorical, Gaussian, Likelihood
from tengrad_triton.interval import Growing
from tengrad_triton.layers import Call, Canonical, Explicit, Lookup, Outer, canonical
from tengrad_triton.optimizer import TENGraD
from tengrad_triton.plan import Plan
from tengrad_triton.train_step import compile_train_step

__version__ = "0.1.0"
__all__ = [
    "Bernoulli",
    "Call",
    "Canonical",
    "Categorical",
    "Explicit",
    "Gaussian",
    "Growing",
    "LevenbergMarquardt",
    "Likelihood",
    "Lookup",
    "Outer",
    "Plan",
    "TENGraD",
    "autotune",
    "canonical",
    "compile_train_step",
]
