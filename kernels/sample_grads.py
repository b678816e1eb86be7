"""Rows J_n = Σ_p g_np a_npᵀ of J, for layers that apply their weight at several positions, such as tokens.

Dimensions: N samples, G groups, P positions, I inputs and O outputs of a group, K entries of a flat gradient.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from . import cpu_conv, reference
from .conv_sample_grads import PATCH_CONFIGS, launch_patch_grads
from .dispatch import define_op, dispatch, last_contiguous
from .factors import example_factors, expect_factors
from .spec import FLOATING, KernelSpec, nbytes


@define_op()
def sample_grads(a_NGPI: Tensor, g_NGPO: Tensor, config: str = "default") -> Tensor:
    """Return the rows j_NK of J, J_n = Σ_p g_np a_npᵀ in every group, K running over (G, O, I) (equation 8; M1).

    With one position, or a few, keep the factors instead: they are smaller than the rows, and `gram` takes them.

    Args:
        a_NGPI: the layer's inputs.
        g_NGPO: the output gradients; they are converted to the dtype of ``a_NGPI``.
        config: the launch configuration of the kernel.

    Returns:
        j_NK, in the dtype of ``a_NGPI``, but in float32 for half precision.

    Raises:
        ValueError: the factors have different samples, groups or positions, or there is no such launch configuration.
    """
    expect_factors(a_NGPI, g_NGPO)
    return dispatch(_sample_grads, cpu_conv.sample_grads, PATCH_CONFIGS, config, a_NGPI, g_NGPO)


def _sample_grads(a_NGPI: Tensor, g_NGPO: Tensor, config: str = "default") -> Tensor:
    """Launch the kernel of `conv_sample_grads`: a sequence is an image one pixel high, seen by a 1 × 1 kernel."""
    a_NGPI, g_NGPO = last_contiguous(a_NGPI), last_contiguous(g_NGPO.to(a_NGPI.dtype))
    positions, inputs = a_NGPI.shape[2:]
    sizes = (inputs, g_NGPO.shape[3], positions, positions, 1)
    distances = (0, a_NGPI.stride(2), 0, 0, *a_NGPI.stride()[:2], *g_NGPO.stride()[:3])
    return launch_patch_grads(a_NGPI, g_NGPO, 1, sizes, distances, config)


_SHAPES = {"groups": (3, 2, 37, 20, 9), "large tiles": (2, 1, 70, 150, 130)}
SPECS = (
    KernelSpec(
        name="sample_grads",
        triton_impl=_sample_grads,
        torch_impl=cpu_conv.sample_grads,
        reference=reference.sample_grads,
        examples={name: partial(example_factors, shape=shape) for name, shape in _SHAPES.items()},
        flops=lambda a_NGPI, g_NGPO: 2 * a_NGPI.numel() * g_NGPO.shape[3],
        bytes=lambda a_NGPI, g_NGPO: nbytes(a_NGPI, g_NGPO) + 4 * a_NGPI.numel() // a_NGPI.shape[2] * g_NGPO.shape[3],
        configs=PATCH_CONFIGS,
        dtypes=FLOATING,
        mutates=0,
    ),
)
