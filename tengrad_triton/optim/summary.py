"""The summary of an optimizer: one entry for each parameter, printable as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

from tengrad_triton.capture.blocks import LayerParams, full_name
from tengrad_triton.curvature.choices import Choice, implementation_names
from tengrad_triton.curvature.geometry import Spending
from tengrad_triton.curvature.jacobians.base import Jacobian
from tengrad_triton.curvature.jacobians.per_sample import PerSample
from tengrad_triton.curvature.woodbury import Curvature
from tengrad_triton.layers import summary_note


@dataclass(frozen=True)
class ParameterSummary:
    """How one parameter is preconditioned.

    Attributes:
        parameter: the parameter's name in the model.
        shape: the parameter's shape.
        block: the name of its Fisher block; ``"-"`` if it takes the SGD step, ``"."`` for the model itself.
        representation: how its J is stored, with notes; or why there is none. ``D 64² ⊗ 300`` is the form of D with
            scaled damping: a matrix for 64 outputs of a group, a diagonal for 300 inputs.
        kernels: the kernels of its products; ``name:torch`` or ``name:config`` if a plan overrides one.
        bytes: the memory, in bytes, of its J and D between refreshes.
    """

    parameter: str
    shape: tuple[int, ...]
    block: str
    representation: str
    kernels: str
    bytes: int


@dataclass(frozen=True)
class Summary:
    """One entry for each parameter; ``print`` shows them as a table.

    Attributes:
        parameters: the entries, in the order of the layers.
        failures: how many factorizations of Fisher blocks have failed so far.
        spending: the rows and the costs of the last refresh; None before the first, and for baselines.
    """

    parameters: tuple[ParameterSummary, ...]
    failures: int
    spending: Spending | None = None

    def __str__(self) -> str:
        titles = tuple(field.name for field in fields(ParameterSummary))
        lines = [titles, *(tuple(str(cell) for cell in astuple(entry)) for entry in self.parameters)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        total = sum(entry.bytes for entry in self.parameters)
        text.append(f"{len(self.parameters)} parameters, {total / 2**20:.1f} MiB kept between refreshes")
        if self.spending is not None:
            text.append(str(self.spending))
        if self.failures:
            text.append(f"{self.failures} factorizations failed: the damping of those blocks was raised")
        return "\n".join(text)


def summarize(layers: Sequence[LayerParams], curvature: Curvature | None, apart: Mapping[str, str]) -> Summary:
    """Return the summary of ``layers`` with the present curvature, which is None before the first refresh.

    ``apart`` has, by the parameter's name, why rows do not follow from calls of the parameter's layers.
    """
    entries = tuple(_entry(layer, param_name, curvature, apart) for layer in layers for param_name in layer.parameters)
    if curvature is None:
        return Summary(entries, 0)
    return Summary(entries, int(curvature.failures_L.sum()), curvature.spending)


def choices_of(curvature: Curvature | None) -> dict[str, Choice]:
    """Return how the J of each preconditioned parameter is stored, by the parameter's name."""
    jacobians = {} if curvature is None else curvature.jacobians
    return {
        full_name(name, param_name): Choice(jacobian.representation, jacobian.ops.kernel_overrides)
        for name, layer in jacobians.items()
        for param_name, jacobian in layer.items()
    }


def sgd_entry(parameter: str, shape: tuple[int, ...], why: str) -> ParameterSummary:
    """Return the entry of a parameter that takes the SGD step, with the reason."""
    return ParameterSummary(parameter, shape, "-", f"sgd ({why})", "update_", 0)


def _entry(
    layer: LayerParams, param_name: str, curvature: Curvature | None, apart: Mapping[str, str]
) -> ParameterSummary:
    name, shape = layer.full_name_of(param_name), tuple(layer.parameters[param_name].shape)
    if layer.why_sgd is not None:
        return sgd_entry(name, shape, layer.why_sgd)
    if curvature is None or curvature.is_released:
        return ParameterSummary(name, shape, layer.name or ".", "chosen at the next refresh", "-", 0)
    jacobian = curvature.jacobians.get(layer.name, {}).get(param_name)
    if jacobian is None:
        return sgd_entry(name, shape, "not part of the last refresh")
    block = next(block for block, names in curvature.blocks.items() if layer.name in names)
    reduced = isinstance(jacobian, PerSample) and jacobian.row_kind == "parameters"
    why = apart.get(name)
    notes = (
        f"by the graph ({why})" if why else summary_note(layer.layer),
        "as many rows as parameters" if reduced else "",
        f"D {jacobian.scale}" if jacobian.scale is not None else "",
    )
    representation = ", ".join(filter(None, (jacobian.representation, *notes)))
    stored = jacobian.nbytes + (0 if jacobian.scale is None else jacobian.scale.nbytes)
    return ParameterSummary(name, shape, block or ".", representation, ", ".join(_kernels(jacobian)), stored)


def _kernels(jacobian: Jacobian) -> Iterable[str]:
    """Return the kernel of each product, and for each overridden kernel the implementation in its place."""
    usual = {name: name for name, *_ in jacobian.product_kernels.values()}
    return (usual | implementation_names(jacobian.ops.kernel_overrides)).values()
