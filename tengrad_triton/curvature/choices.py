"""How a weight's J is stored, and which implementation runs each kernel: types that plans and curvatures share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

from tengrad_triton import kernels

Representation = Literal["factored", "per_sample", "per_sample_bf16", "compressed"]
REPRESENTATIONS: tuple[Representation, ...] = ("factored", "per_sample", "per_sample_bf16", "compressed")

Product = Literal["gram", "project", "expand"]
ProductKernels = Mapping[Product, Sequence[str]]
"""The kernels that each product with J consists of, the usual one first."""

PER_SAMPLE_KERNELS: ProductKernels = {
    "gram": ("gram_rows",),
    "project": ("project_rows",),
    "expand": ("expand_rows_update_",),
}
FACTORED_KERNELS: ProductKernels = {
    "gram": ("gram", "gram_rows", "sample_grads", "conv_sample_grads"),
    "project": ("project",),
    "expand": ("expand_update_",),
}
CONV_KERNELS: ProductKernels = {
    **FACTORED_KERNELS,
    "project": ("project_conv",),
    "expand": ("expand_conv_update_",),
}
STEP_KERNELS = frozenset(
    name
    for product_kernels in (PER_SAMPLE_KERNELS, FACTORED_KERNELS, CONV_KERNELS)
    for product in ("project", "expand")
    for name in product_kernels[product]
)
"""The kernels that every step runs; the others run when the curvature is refreshed."""


@dataclass(frozen=True)
class Choice:
    """How one weight is served.

    Attributes:
        representation: how J is stored.
        kernel_overrides: kernels that do not run in Triton's default configuration: a bare name runs in PyTorch,
            ``name:config`` in another launch configuration.
    """

    representation: Representation
    kernel_overrides: tuple[str, ...]


Choices = Mapping[str, Choice]
"""Every weight's choice, by its full name."""


def implementation_names(kernel_overrides: Iterable[str]) -> dict[str, str]:
    """Return ``kernel:torch`` or ``kernel:config`` for every overridden kernel, by the kernel's name."""
    names = (name if ":" in name else f"{name}:torch" for name in kernel_overrides)
    return {name.partition(":")[0]: name for name in names}


Backend = Literal["auto", "torch"]
Ops = Any
"""A namespace of the kernels by name, and `kernel_overrides` (see `ops_for`)."""
OpsFor = Callable[[tuple[str, ...]], Ops]
"""A function from kernel overrides to the ops."""


def ops_for(backend: Backend, kernel_overrides: Collection[str] = ()) -> Ops:
    """Return a namespace of the ops by name; each op runs Triton on CUDA tensors, and PyTorch code elsewhere.

    With ``"torch"`` the namespace holds the PyTorch functions (`kernels.cpu` and its neighbours) themselves. Its
    ``configs`` maps the names of the others to their launch configurations.

    Args:
        backend: ``"torch"`` makes every op its PyTorch implementation.
        kernel_overrides: ``"project_rows"`` makes that op its PyTorch implementation, ``"project_rows:tall"`` runs it
            in that launch configuration.

    Raises:
        ValueError: an override names no kernel or no configuration of it.
    """
    specs = {spec.name: spec for spec in kernels.SPECS}
    configs = {f"{name}:{config}": (name, config) for name, spec in specs.items() for config in spec.config_names}
    names = (specs.keys() | configs.keys()) - {"unfold_conv"}  # which other ops launch, in one way
    if unknown := set(kernel_overrides) - names:
        raise ValueError(f"no kernels named {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    ops: dict[str, Any] = {name: kernels.eager(getattr(kernels, name)) for name in specs}
    chosen = dict.fromkeys(specs, "default")
    for override in set(kernel_overrides) & configs.keys():
        name, chosen[name] = configs[override]
        ops[name] = partial(ops[name], config=chosen[name])
    for name in specs if backend == "torch" else specs.keys() & set(kernel_overrides):
        ops[name] = specs[name].torch_impl
        del chosen[name]
    return SimpleNamespace(kernel_overrides=tuple(sorted(kernel_overrides)), configs=chosen, **ops)


def step_configs(ops: Ops, product_kernels: ProductKernels) -> list[str] | None:
    """Return the launch configurations of project and expand; None if PyTorch code runs one of them."""
    names = [product_kernels[product][0] for product in ("project", "expand")]
    return [ops.configs[name] for name in names] if ops.configs.keys() >= set(names) else None
