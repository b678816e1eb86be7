"""Exact natural-gradient steps for PyTorch at close to the cost of SGD: TENGraD as Triton kernels."""

from tengrad_triton.compiled.train_step import compile_train_step
from tengrad_triton.layers import Call, Canonical, EmbeddingGrads, OuterProducts, PerSampleGrads, canonical
from tengrad_triton.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from tengrad_triton.optim.damping import LevenbergMarquardt
from tengrad_triton.optim.interval import Growing
from tengrad_triton.optim.tengrad import TENGraD
from tengrad_triton.tuning.autotune import autotune
from tengrad_triton.tuning.plan import Plan

__version__ = "0.1.0"
__all__ = [
    "Bernoulli",
    "Call",
    "Canonical",
    "Categorical",
    "EmbeddingGrads",
    "Gaussian",
    "Growing",
    "LevenbergMarquardt",
    "Likelihood",
    "OuterProducts",
    "PerSampleGrads",
    "Plan",
    "TENGraD",
    "autotune",
    "canonical",
    "compile_train_step",
]
