"""Check the trainable parameters: their devices, their types, and the options of their layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tengrad_triton.curvature.target import Trained
from tengrad_triton.layers import require_exact_gradient


def check_parameters(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless the trainable parameters of all groups are on one device, and their types fit each other.

    Frozen parameters may be of any type, such as the integers of a quantized model.
    """
    trained = [p for group in param_groups for p in group["params"] if p.requires_grad]
    check_dtypes(trained)
    devices = dict.fromkeys(str(p.device) for p in trained)
    if len(devices) > 1:
        raise ValueError(
            f"the optimizer's parameters are on {', '.join(devices)}, but must be on one device: move them by "
            "model.to(device), or freeze the others"
        )


def check_dtypes(trained: Sequence[Tensor]) -> None:
    """Raise unless these parameters are real floating point, and all or none of them in float64."""
    for parameter in trained:
        if not parameter.is_floating_point():
            raise TypeError(f"parameters must be real floating point, got {parameter.dtype}")
    dtypes = sorted({str(parameter.dtype) for parameter in trained})
    if len(dtypes) > 1 and str(torch.float64) in dtypes:
        raise ValueError(
            f"the optimizer's parameters are of {', '.join(dtypes)}, but float64 is not mixed with other types: "
            "convert the model by model.double() or model.float(), or freeze the others"
        )


def check_trained(trained: Sequence[Trained]) -> None:
    """Raise unless a step can update these parameters: what was frozen when the optimizer was made may be thawed.

    Raises:
        TypeError: a parameter is not real floating point.
        ValueError: some parameters are in float64 and others are not, or an option of a layer makes its gradient
            differ from the derivative of the loss.
    """
    check_dtypes([parameter for _, _, (parameter, _, _) in trained])
    for layer in {layer.name: layer for layer, _, _ in trained}.values():
        require_exact_gradient(layer.name, layer.layer)
