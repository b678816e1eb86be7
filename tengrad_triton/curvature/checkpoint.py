"""The curvature as plain tensors and numbers, so that a checkpoint loads with ``torch.load(weights_only=True)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.curvature.choices import OpsFor
from tengrad_triton.curvature.geometry import Spending
from tengrad_triton.curvature.jacobians.base import Jacobian
from tengrad_triton.curvature.jacobians.embedding import EmbeddingJacobian
from tengrad_triton.curvature.jacobians.factored import Factored
from tengrad_triton.curvature.jacobians.per_sample import PerSample, store_contiguously
from tengrad_triton.curvature.moments import AllMoments, Moments
from tengrad_triton.curvature.scaling import Scale, Scales, unpack_scales
from tengrad_triton.curvature.woodbury import Curvature, InverseFactors
from tengrad_triton.layers import ConvInput, EmbeddingGrads, OuterProducts


def pack_curvature(curvature: Curvature) -> dict[str, Any]:
    """Return a curvature as nested dictionaries of tensors and numbers."""
    return {
        "jacobians": {
            name: {param_name: one.pack() for param_name, one in layer.items()}
            for name, layer in curvature.jacobians.items()
        },
        "blocks": {block: list(names) for block, names in curvature.blocks.items()},
        "inverses": [{"blocks": list(one.blocks), "inverse_BNN": one.inverse_BNN} for one in curvature.inverses],
        "history": list(curvature.history),
        "damping_L": curvature.damping_L,
        "asked_L": curvature.asked_L,
        "divisor_L": curvature.divisor_L,
        "failures_L": curvature.failures_L,
        "moments": pack_moments(curvature.moments),
        "spending": None if curvature.spending is None else asdict(curvature.spending),
        "projected": dict(curvature.projected),
        "scales": {
            name: {param_name: one.pack() for param_name, one in layer.items()}
            for name, layer in curvature.scales.items()
        },
    }


def unpack_curvature(packed: Mapping[str, Any], layers: Sequence[LayerParams], ops_for: OpsFor) -> Curvature:
    """Return the curvature that `pack_curvature` described, on the devices of the parameters of ``layers``.

    Raises:
        ValueError: it belongs to other layers than these.
    """
    known = {layer.name: layer.parameters for layer in layers}
    unknown = [name for name in packed["jacobians"] if name not in known]
    if unknown:
        raise ValueError(
            f"the state holds curvature of {', '.join(unknown)}, but this optimizer's layers are "
            f"{', '.join(known) or 'none'}: it was saved for another model"
        )
    scales = _scales(packed["scales"], known)
    jacobians, device = {}, torch.device("cpu")
    for name, layer in packed["jacobians"].items():
        own = scales.get(name, {})
        jacobians[name] = {
            param_name: _unpack(one, own.get(param_name), known[name][param_name].device, ops_for)
            for param_name, one in layer.items()
        }
        device = next(iter(known[name].values())).device
    inverses = [InverseFactors(tuple(one["blocks"]), one["inverse_BNN"].to(device)) for one in packed["inverses"]]
    damping_L, divisor_L, failures_L = (packed[name].to(device) for name in ("damping_L", "divisor_L", "failures_L"))
    moments = unpack_moments(packed["moments"], device)
    stored, history = store_contiguously(jacobians), tuple(packed["history"])
    spent = packed.get("spending")  # states of an earlier version have none
    spending = None if spent is None else Spending(**spent)
    asked_L = packed.get("asked_L", packed["damping_L"]).to(device)  # likewise
    numbers = damping_L, asked_L, divisor_L, failures_L
    curvature = Curvature(stored, packed["blocks"], inverses, history, *numbers, moments, scales, spending)
    curvature.projected.update(tree_map_only(Tensor, partial(_to, device=device), packed.get("projected", {})))
    return curvature


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def pack_moments(moments: AllMoments) -> dict[str, Any]:
    """Return moments as nested dictionaries of lists of tensors."""
    return {name: {param_name: list(one) for param_name, one in layer.items()} for name, layer in moments.items()}


def unpack_moments(packed: Mapping[str, Any], device: torch.device) -> AllMoments:
    """Return the moments that `pack_moments` described, on a device."""
    return {
        name: {param_name: Moments(*(x.to(device) for x in one)) for param_name, one in layer.items()}
        for name, layer in packed.items()
    }


def _scales(packed: Mapping[str, Any], parameters: Mapping[str, Mapping[str, Tensor]]) -> Scales:
    """Return D of every parameter, on its device if this optimizer has it."""
    moved = []
    for name, layer in packed.items():
        for param_name, one in layer.items():
            parameter = parameters.get(name, {}).get(param_name)
            device = torch.device("cpu") if parameter is None else parameter.device
            moved.append([_to(x, device) for x in one])
    made = iter(unpack_scales(moved))
    return {name: {param_name: next(made) for param_name in layer} for name, layer in packed.items()}


def _unpack(packed: Mapping[str, Any], scale: Scale | None, device: torch.device, ops_for: OpsFor) -> Jacobian:
    """Return what `Jacobian.pack` described, on a device, with its D."""
    ops = ops_for(tuple(packed["kernel_overrides"]))
    move = partial(_to, device=device)
    if "j_NK" in packed:
        return PerSample(move(packed["j_NK"]), ops, packed["row_kind"], scale)
    factors: OuterProducts | None = None
    if "a" in packed:
        a = packed["a"]
        a = ConvInput.unpack(**{name: move(x) for name, x in a.items()}) if isinstance(a, Mapping) else move(a)
        factors = OuterProducts(a, move(packed["g_NGPO"]))
    if "embedding" in packed:
        embedding = EmbeddingGrads(**{name: move(value) for name, value in packed["embedding"].items()})
        return EmbeddingJacobian(embedding, factors, ops, scale)
    assert factors is not None
    return Factored(factors, ops, scale)
