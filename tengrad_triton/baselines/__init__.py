"""The baselines: Kronecker-factored natural gradients and quasi-Newton steps, with the same capture as TENGraD."""

from tengrad_triton.baselines.ekfac import EKFAC
from tengrad_triton.baselines.kbfgs import KBFGS, KBFGSL
from tengrad_triton.baselines.kfac import KFAC

__all__ = ["EKFAC", "KBFGS", "KBFGSL", "KFAC"]
