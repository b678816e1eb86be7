"""The two products that every step takes with stored per-sample gradients: project (J v) and expand (Jᵀ w).

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, K entries of a flat gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project(a_NGPI: Tensor, g_NGPO: Tensor, v_GOI: Tensor) -> Tensor:
    """Return y_N = ⟨J_n, V⟩ = Σ_γp g_nγpᵀ V_γ a_nγp (paper, equation 6)."""
    return project_reference(a_NGPI, g_NGPO, v_GOI)


def project_reference(a_NGPI: Tensor, g_NGPO: Tensor, v_GOI: Tensor) -> Tensor:
    """y_n = Σ_γp ⟨V_γ a_nγp, g_nγp⟩."""
    return ((a_NGPI @ v_GOI.mT) * g_NGPO).sum((1, 2, 3))


def expand(a_NGPI: Tensor, g_NGPO: Tensor, w_N: Tensor) -> Tensor:
    """Return u_GOI = Σ_n w_n J_n = Σ_np w_n g_np a_npᵀ (paper, equation 7)."""
    return expand_reference(a_NGPI, g_NGPO, w_N)


def expand_reference(a_NGPI: Tensor, g_NGPO: Tensor, w_N: Tensor) -> Tensor:
    """U_γ = Σ_np w_n g_nγp a_nγpᵀ."""
    scaled = (g_NGPO * w_N[:, None, None, None]).transpose(0, 1).flatten(1, 2)
    return scaled.mT @ a_NGPI.transpose(0, 1).flatten(1, 2)


def project_rows(j_NK: Tensor, v_K: Tensor) -> Tensor:
    """Return y_N = J v for explicit per-sample gradients."""
    return project_rows_reference(j_NK, v_K)


def project_rows_reference(j_NK: Tensor, v_K: Tensor) -> Tensor:
    """y_n = ⟨J_n, v⟩."""
    return j_NK @ v_K


def expand_rows(j_NK: Tensor, w_N: Tensor) -> Tensor:
    """Return u_K = Jᵀ w for explicit per-sample gradients."""
    return expand_rows_reference(j_NK, w_N)


def expand_rows_reference(j_NK: Tensor, w_N: Tensor) -> Tensor:
    """U = Σ_n w_n J_n."""
    return w_N @ j_NK


def expand_update_(
    param_OKI: Tensor,
    momentum_OKI: Tensor,
    grad_OKI: Tensor,
    a_NGPI: Tensor,
    g_NGPO: Tensor,
    w_N: Tensor,
    divisor: Tensor,
    settings: Tensor,
    nesterov: bool,
) -> None:
    """Step a parameter along (grad − Σ_n w_n J_n) / divisor in place; see `update_` for the rest of the rule.

    The three parameter-shaped tensors are strided views with O running over all groups and (K, I) over the canonical
    form's inputs: for a convolution K is the kernel's pixels and I its channels, for everything else K is 1.
    """
    expand_update_reference_(param_OKI, momentum_OKI, grad_OKI, a_NGPI, g_NGPO, w_N, divisor, settings, nesterov)


def expand_update_reference_(
    param_OKI: Tensor,
    momentum_OKI: Tensor,
    grad_OKI: Tensor,
    a_NGPI: Tensor,
    g_NGPO: Tensor,
    w_N: Tensor,
    divisor: Tensor,
    settings: Tensor,
    nesterov: bool,
) -> None:
    """`update_` along (grad − expand(a, g, w)) / divisor."""
    expanded_OKI = expand_reference(a_NGPI, g_NGPO, w_N).reshape(param_OKI.shape)
    update_(param_OKI, momentum_OKI, (grad_OKI - expanded_OKI) / divisor, settings, nesterov)


def expand_rows_update_(
    param_OKI: Tensor,
    momentum_OKI: Tensor,
    grad_OKI: Tensor,
    j_NK: Tensor,
    w_N: Tensor,
    divisor: Tensor,
    settings: Tensor,
    nesterov: bool,
) -> None:
    """Like `expand_update_`, from explicit per-sample gradients whose flat entries run over (O, K, I)."""
    expand_rows_update_reference_(param_OKI, momentum_OKI, grad_OKI, j_NK, w_N, divisor, settings, nesterov)


def expand_rows_update_reference_(
    param_OKI: Tensor,
    momentum_OKI: Tensor,
    grad_OKI: Tensor,
    j_NK: Tensor,
    w_N: Tensor,
    divisor: Tensor,
    settings: Tensor,
    nesterov: bool,
) -> None:
    """`update_` along (grad − Jᵀ w) / divisor."""
    expanded_OKI = expand_rows_reference(j_NK, w_N).reshape(param_OKI.shape)
    update_(param_OKI, momentum_OKI, (grad_OKI - expanded_OKI) / divisor, settings, nesterov)


def update_(param: Tensor, momentum_buffer: Tensor, direction: Tensor, settings: Tensor, nesterov: bool) -> None:
    """The update rule, in place: coupled weight decay, then momentum, then the step; θ shrinks first if decoupled.

    d = direction + weight_decay θ;  m ← momentum m + d;  θ ← (1 − lr shrink) θ − lr (m, or d + momentum m if Nesterov)
    with ``settings = [lr, momentum, weight_decay, shrink]`` as one tensor, so that a schedule recompiles nothing.
    """
    lr, momentum, weight_decay, shrink = settings.unbind()
    decayed = direction + weight_decay * param
    momentum_buffer.mul_(momentum).add_(decayed)
    step = decayed + momentum * momentum_buffer if nesterov else momentum_buffer
    param.mul_(1 - lr * shrink).sub_(lr * step)
