"""The summary of `TENGraD`: how the J of each parameter is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from tengrad_triton.capture.blocks import LayerParams, full_name
from tengrad_triton.curvature.choices import Choice, implementation_names
from tengrad_triton.curvature.jacobians.base import Jacobian
from tengrad_triton.curvature.jacobians.per_sample import PerSample
from tengrad_triton.curvature.woodbury import Curvature
from tengrad_triton.layers import summary_note
from tengrad_triton.optim.summary.entries import Stored, entries_of, others_of
from tengrad_triton.optim.summary.summary import Summary


def summarize(
    layers: Sequence[LayerParams], model: nn.Module, curvature: Curvature | None, apart: Mapping[str, str]
) -> Summary:
    """Return the summary of ``layers`` with the present curvature, which is None before the first refresh.

    ``apart`` has, by the parameter's name, how rows were found that do not follow from calls of its layers.
    """
    entries = entries_of(layers, model, lambda layer, param_name: _stored(layer, param_name, curvature, apart))
    failures, spending = (0, None) if curvature is None else (int(curvature.failures_L.sum()), curvature.spending)
    return Summary(entries, failures, others_of(layers, model), spending)


def choices_of(curvature: Curvature | None) -> dict[str, Choice]:
    """Return how the J of each preconditioned parameter is stored, by the parameter's name."""
    jacobians = {} if curvature is None else curvature.jacobians
    return {
        full_name(name, param_name): Choice(jacobian.representation, jacobian.ops.kernel_overrides)
        for name, layer in jacobians.items()
        for param_name, jacobian in layer.items()
    }


def _stored(layer: LayerParams, param_name: str, curvature: Curvature | None, apart: Mapping[str, str]) -> Stored | str:
    """Return what is stored for a parameter, or why nothing is."""
    if curvature is None or curvature.is_released:
        return Stored(layer.name or ".", "chosen at the next refresh")
    jacobian = curvature.jacobians.get(layer.name, {}).get(param_name)
    if jacobian is None:
        return "not part of the last refresh"
    block = next(block for block, names in curvature.blocks.items() if layer.name in names)
    reduced = isinstance(jacobian, PerSample) and jacobian.row_kind == "parameters"
    how = apart.get(layer.full_name_of(param_name))
    notes = (
        f"rows {how}" if how else summary_note(layer.layer),
        "as many rows as parameters" if reduced else "",
        f"D {jacobian.scale}" if jacobian.scale is not None else "",
    )
    representation = ", ".join(filter(None, (jacobian.representation, *notes)))
    stored = jacobian.nbytes + (0 if jacobian.scale is None else jacobian.scale.nbytes)
    return Stored(block or ".", representation, ", ".join(_kernels(jacobian)), stored)


def _kernels(jacobian: Jacobian) -> Iterable[str]:
    """Return the kernel of each product, and for each overridden kernel the implementation in its place."""
    usual = {name: name for name, *_ in jacobian.product_kernels.values()}
    return (usual | implementation_names(jacobian.ops.kernel_overrides)).values()
