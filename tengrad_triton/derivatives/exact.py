"""Functions whose derivatives of derivatives PyTorch gets wrong or does not have, and what is computed in their place.

The wrong ones are silent. Rules of forward mode, and some of double backward, take statistics and factorizations that
they keep from the forward for constants: pytorch/pytorch#198017.

Dimensions: N points, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from typing_extensions import override


def normalized(v: Tensor, dims: list[int], eps: float) -> Tensor:
    """Return (v − mean) / √(variance + eps) over some dimensions."""
    centred = v - v.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def scaled(v: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return weight · v + bias, of which either may be missing."""
    v = v if weight is None else v * weight
    return v if bias is None else v + bias


def layer_norm(
    v: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Return what `torch.nn.functional.layer_norm` does."""
    return scaled(normalized(v, list(range(-len(normalized_shape), 0)), eps), weight, bias)


def batch_norm(
    v: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return what `torch.nn.functional.batch_norm` does without running statistics.

    Raises:
        ValueError: it would update running statistics.
    """
    if not training:
        return F.batch_norm(v, running_mean, running_var, weight, bias, training, momentum, eps)
    if running_mean is not None:
        raise ValueError(
            "batch normalization in training would update its running statistics, which forward mode cannot do: "
            "call eval() on it first, or make it with track_running_stats=False"
        )
    shape = -1, *[1] * (v.ndim - 2)
    weight, bias = (None if part is None else part.reshape(shape) for part in (weight, bias))
    return scaled(normalized(v, [dim for dim in range(v.ndim) if dim != 1], eps), weight, bias)


def silu(v: Tensor, inplace: bool = False) -> Tensor:
    """Return what `torch.nn.functional.silu` does, whose rule needs autograd to be on."""
    return v * v.sigmoid()


def mish(v: Tensor, inplace: bool = False) -> Tensor:
    """Return what `torch.nn.functional.mish` does, whose rule needs autograd to be on."""
    return v * F.softplus(v).tanh()


def glu(v: Tensor, dim: int = -1) -> Tensor:
    """Return what `torch.nn.functional.glu` does, whose rule has no derivative."""
    value, gate = v.chunk(2, dim)
    return value * gate.sigmoid()


def attention(*args: Any, **kwargs: Any) -> Tensor:
    """Call `torch.nn.functional.scaled_dot_product_attention` where its kernel is made of functions that have rules."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def attention_layer(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Call `torch.nn.functional.multi_head_attention_forward` in the same way."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.multi_head_attention_forward(*args, **kwargs)


def norm(v: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
    """Return what `torch.linalg.vector_norm` does, whose rules stand in the way of a backward."""
    if p not in (None, 2, "fro") or any(option is not None for option in options.values()):
        return torch.norm(v, p, dim, keepdim, **options)
    return v.square().sum(dim, keepdim=keepdim).sqrt()


def vector_norm(v: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:  # noqa: A002
    """Return the same, of arguments by their other names."""
    return norm(v, ord, dim, keepdim, **options)


INSTEAD: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: layer_norm, torch.layer_norm: layer_norm, F.batch_norm: batch_norm,
    F.scaled_dot_product_attention: attention, F.multi_head_attention_forward: attention_layer,
    F.silu: silu, F.mish: mish, F.glu: glu,
    torch.norm: norm, torch.Tensor.norm: norm, torch.linalg.vector_norm: vector_norm,
}  # fmt: skip
"""What is called in place of a function."""

DETERMINANTS = (
    torch.det, torch.linalg.det, torch.Tensor.det, torch.logdet, torch.Tensor.logdet, torch.slogdet,
    torch.linalg.slogdet, torch.Tensor.slogdet,
)  # fmt: skip
REFUSED: dict[Callable[..., Any], str] = {
    **dict.fromkeys(DETERMINANTS, "write the determinant out"),
    **dict.fromkeys((torch.linalg.solve, torch.linalg.solve_ex), "use torch.linalg.inv(A) @ B"),
    **dict.fromkeys((F.instance_norm, torch.instance_norm, torch.batch_norm), "use F.layer_norm or F.batch_norm"),
    torch.linalg.householder_product: "write the product out",
}
"""Functions with wrong derivatives, and what to do."""


def is_dual(value: Any) -> bool:
    """Return whether a value is a tensor that depends on what is differentiated."""
    return isinstance(value, Tensor) and unpack_dual(value).tangent is not None


class ExactDerivatives(TorchFunctionMode):
    """Calls other functions, or none, in place of those whose derivatives are wrong."""

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, or what is exact in its place.

        Raises:
            NotImplementedError: its derivatives would be wrong, and nothing stands in its place.
        """
        kwargs = kwargs or {}
        if func in REFUSED and any(map(is_dual, (*args, *kwargs.values()))):
            raise NotImplementedError(
                f"PyTorch's second derivatives of {func.__name__} are wrong (pytorch/pytorch#198017): {REFUSED[func]}"
            )
        return INSTEAD.get(func, func)(*args, **kwargs)
