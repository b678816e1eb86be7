"""The curvature as plain tensors and numbers, so that a checkpoint loads with ``torch.load(weights_only=True)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tengrad_triton.capture.blocks import LayerParams, full_name
from tengrad_triton.curvature.choices import OpsFor
from tengrad_triton.curvature.geometry import Spending
from tengrad_triton.curvature.jacobians.base import Jacobian
from tengrad_triton.curvature.jacobians.embedding import EmbeddingJacobian
from tengrad_triton.curvature.jacobians.factored import Factored
from tengrad_triton.curvature.jacobians.per_sample import PerSample, store_contiguously
from tengrad_triton.curvature.moments import AllMoments, Moments
from tengrad_triton.curvature.scaling import Scale, Scales, unpack_scales
from tengrad_triton.curvature.woodbury import Curvature, FisherBlocks, InverseFactors
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


def without_rows(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `pack_curvature` returned, as if J and the factors had been released: moments and counts stay."""
    released = {"jacobians": {name: {} for name in packed["jacobians"]}, "inverses": [], "history": [], "projected": {}}
    return {**packed, **released}


def unpack_curvature(packed: Mapping[str, Any], layers: Sequence[LayerParams], ops_for: OpsFor) -> Curvature:
    """Return the curvature that `pack_curvature` described, on the devices of the parameters of ``layers``.

    Raises:
        ValueError: it belongs to other layers than these, or an entry is damaged.
    """
    known = {layer.name: layer.parameters for layer in layers}
    _check_names(packed["jacobians"], known)
    scales = _scales(packed["scales"], known)
    jacobians: dict[str, dict[str, Jacobian]] = {}
    device = torch.device("cpu")
    for name, layer in packed["jacobians"].items():
        own, jacobians[name] = scales.get(name, {}), {}
        for param_name, one in layer.items():
            with _naming(full_name(name, param_name)):
                to = known[name][param_name].device
                jacobians[name][param_name] = _unpack(one, own.get(param_name), to, ops_for)
        device = next(iter(known[name].values())).device
    inverses = [InverseFactors(tuple(one["blocks"]), one["inverse_BNN"].to(device)) for one in packed["inverses"]]
    damping_L, divisor_L, failures_L = (packed[name].to(device) for name in ("damping_L", "divisor_L", "failures_L"))
    moments = unpack_moments(packed["moments"], device)
    stored, history = store_contiguously(jacobians), tuple(packed["history"])
    spent = packed.get("spending")  # a compiled refresh has none
    spending = None if spent is None else Spending(**spent)
    asked_L = packed.get("asked_L", packed["damping_L"]).to(device)  # states of an earlier version have none
    numbers = damping_L, asked_L, divisor_L, failures_L
    curvature = Curvature(stored, packed["blocks"], inverses, history, *numbers, moments, scales, spending)
    curvature.projected.update(tree_map_only(Tensor, partial(_to, device=device), packed.get("projected", {})))
    return curvature


def _check_names(jacobians: Mapping[str, Mapping[str, Any]], known: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise ValueError unless these parameters, by the names of their layers and their own, are the model's."""
    unknown = [
        full_name(name, param_name)
        for name, layer in jacobians.items()
        for param_name in (layer or [""])
        if name not in known or (layer and param_name not in known[name])
    ]
    if unknown:
        raise ValueError(
            f"the state holds curvature of {', '.join(unknown)}, but this optimizer's layers are "
            f"{', '.join(known) or 'none'}: it was saved for another model"
        )


@contextmanager
def _naming(parameter: str) -> Iterator[None]:
    """Turn an error into a `ValueError` that names the parameter whose entry it comes from."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"the entry of {parameter!r} is damaged ({type(error).__name__}: {error})") from error


def checked_curvature(
    packed: Mapping[str, Any],
    layers: Sequence[LayerParams],
    ops_for: OpsFor,
    blocks_of: Callable[[Sequence[str]], FisherBlocks],
    fisher: str,
) -> Curvature:
    """Return the curvature that `pack_curvature` described, if it is one that this optimizer could have computed.

    Args:
        packed: has ``"fisher"`` beside the entries of `pack_curvature`.
        layers: of the optimizer; the curvature goes to the devices of their parameters.
        ops_for: returns the ops for kernel overrides.
        blocks_of: returns the Fisher blocks that the named layers form.
        fisher: the optimizer's setting.

    Raises:
        ValueError: the sizes are not those of the parameters, the blocks or the Fisher matrix are others, or an entry
            is damaged.
    """
    if packed["fisher"] != fisher:
        raise ValueError(f"it is of fisher={packed['fisher']!r}, but this optimizer has fisher={fisher!r}")
    curvature = unpack_curvature(packed, layers, ops_for)
    _check_sizes(curvature, layers)
    own_blocks = {block: list(names) for block, names in blocks_of([*curvature.jacobians]).items()}
    if own_blocks != {block: list(names) for block, names in curvature.blocks.items()}:
        raise ValueError(f"its blocks are {_listed(curvature.blocks)}, but this optimizer's are {_listed(own_blocks)}")
    _check_inverses(curvature)
    return curvature


def _check_sizes(curvature: Curvature, layers: Sequence[LayerParams]) -> None:
    """Raise ValueError unless J, moments and D have the sizes of the parameters."""
    known = {layer.name: layer for layer in layers}
    for name, layer in curvature.jacobians.items():
        for param_name, one in layer.items():
            _check_size("rows", _entries(one), known[name], param_name, exact=True)
    for kind, every in (("moments", curvature.moments), ("D", curvature.scales)):
        for name, own in every.items():
            for param_name, pair in own.items():
                if name in known and param_name in known[name].parameters:
                    with _naming(full_name(name, param_name)):
                        sides = (pair.rows.values_Gn, pair.columns.values_Gn) if isinstance(pair, Scale) else pair[:2]
                        entries = len(sides[0]) * sides[0].shape[1] * sides[1].shape[1]
                    _check_size(kind, entries, known[name], param_name, exact=False)


def _check_inverses(curvature: Curvature) -> None:
    """Raise ValueError unless there is one inverse for each block, with as many rows as the block's J."""
    blocks = list(curvature.blocks)
    numbers = [len(x) for x in (curvature.damping_L, curvature.divisor_L, curvature.failures_L)]
    if numbers != [len(blocks)] * 3:
        raise ValueError(f"it has {numbers} dampings, divisors and failures for {len(blocks)} blocks: it is damaged")
    if curvature.is_released:
        return
    sizes = {block: one.inverse_BNN.shape for one in curvature.inverses for block in one.blocks}
    for block in blocks:
        rows = {one.rows for name in curvature.blocks[block] for one in curvature.jacobians[name].values()}
        size = tuple(sizes.get(block, ()))[1:]
        if len(rows) != 1 or len(size) != 2 or size[0] != size[1] or size[0] < max(rows):
            raise ValueError(f"the rows of block {block!r} are {sorted(rows)}, its inverse is of {size}: it is damaged")


def _check_size(kind: str, entries: int, layer: LayerParams, param_name: str, exact: bool) -> None:
    parameter = layer.parameters[param_name]
    if entries == parameter.numel() or (not exact and entries and parameter.numel() % entries == 0):
        return
    raise ValueError(
        f"its {kind} of {layer.full_name_of(param_name)!r} have {entries} entries, but the parameter, of shape "
        f"{tuple(parameter.shape)}, has {parameter.numel()}: it was saved for another model"
    )


def _entries(jacobian: Jacobian) -> int:
    """Return K, the entries of a row."""
    if isinstance(jacobian, PerSample):
        return jacobian.j_NK.shape[1]
    if isinstance(jacobian, EmbeddingJacobian):
        return jacobian.embedding.num_embeddings * jacobian.embedding.g_NPD.shape[2]
    assert isinstance(jacobian, Factored)
    return jacobian.factors.entries


def _listed(blocks: FisherBlocks) -> str:
    return "; ".join(f"{block or '.'}: {', '.join(name or '.' for name in names)}" for block, names in blocks.items())


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
