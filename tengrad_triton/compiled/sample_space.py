"""Projections in sample space: J D⁻¹ V of dense weights from the factors of V, without V itself (docs/math.md, M19)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tengrad_triton.capture.blocks import CapturedLayer, LayerParams
from tengrad_triton.compiled.functional_capture import CallTensors, FunctionalCapture
from tengrad_triton.compiled.static_buffers import mark_static
from tengrad_triton.curvature.jacobians.factored import Factored
from tengrad_triton.curvature.woodbury import Curvature
from tengrad_triton.layers import OuterProducts, has_rule_of_linear
from tengrad_triton.layers.dense import weight_grads

_ROUNDINGS = 300  # how far, relative to its size, projections may be from those of m, after an interval's steps

Weight = tuple[str, str]
"""A weight by the names of its layer and of the parameter within it."""


def dense_jacobians(curvature: Curvature, layers: Collection[str], samples: int) -> dict[Weight, Factored]:
    """Return those J, of the weights of some layers, that are dense and large beside the number of samples."""
    return {
        (name, param_name): one
        for name in layers
        for param_name, one in curvature.jacobians.get(name, {}).items()
        if isinstance(one, Factored) and one.prefers_sample_space(samples)
    }


def linear_layers(
    layers: Sequence[LayerParams],
    captured: Mapping[str, CapturedLayer],
    groups: Sequence[Mapping[str, Any]],
    perturbations: CallTensors,
) -> list[str]:
    """Return the names of the linear layers that a forward calls once and train a weight, without SPRING."""
    spring = {index for index, group in enumerate(groups) if group["spring"]}
    with_weight = [layer for layer in layers if "weight" in layer.trained() and layer.groups["weight"] not in spring]
    calls = {layer.name: perturbations.get(layer.name, ()) for layer in with_weight}
    once = [name for name, own in calls.items() if len(own) == 1 and own[0]]
    return [name for name in once if has_rule_of_linear(captured[name].layer)]


def project(
    dense: Mapping[Weight, Factored], capture: FunctionalCapture, tensors: CallTensors, by_perturbation: CallTensors
) -> dict[Weight, Tensor]:
    """Return J D⁻¹ V of the weights, where V is what the layers' calls contribute to the gradient of the loss."""
    of_calls = weight_grads_of(capture, {name for name, _ in dense}, tensors, by_perturbation)
    return {weight: one.project_without(of_calls[weight[0]]) for weight, one in dense.items()}


def weight_grads_of(
    capture: FunctionalCapture, layers: Collection[str], tensors: CallTensors, by_perturbation: CallTensors
) -> dict[str, OuterProducts]:
    """Return the factors of what the one call of each linear layer contributes to the gradient of its weight."""
    found = {}
    for name in layers:
        (call,) = capture.layer_calls(name, tensors, by_perturbation)
        x, g = cast("Tensor", call.inputs(name)), cast("Tensor", call.scaled_grads(1))
        found[name] = weight_grads(x.to(g.dtype), g)  # autocast rounds the input
    return found


def sums_to(of_calls: OuterProducts, grad: Tensor) -> bool:
    """Return whether a gradient is what the calls contribute, within sqrt(eps): another use differs much more."""
    eps = max(torch.finfo(x.dtype).eps for x in (of_calls.g_NGPO, grad))
    own = of_calls.widened()
    a_RI, g_RO = cast("Tensor", own.a).flatten(0, 2), own.g_NGPO.flatten(0, 2)
    size = (a_RI.norm(dim=1) * g_RO.norm(dim=1)).sum()
    return bool((g_RO.mT @ a_RI - grad).norm() <= eps**0.5 * size)


def projected_means(curvature: Curvature, momenta: Mapping[Weight, Tensor]) -> dict[Weight, Tensor]:
    """Return J D⁻¹ m of the running mean m of each dense weight."""
    return {(name, own): curvature.jacobians[name][own].project(m) for (name, own), m in momenta.items()}


class ProjectedMeans:
    """J D⁻¹ m of dense weights, where m are the running means of their gradients.

    A compiled step updates them as it updates m, and they are kept with the curvature, also in its state. They are
    computed from m where another step was taken in between, or m has changed otherwise.

    Args:
        are_static: whether they keep their addresses, for CUDA graphs.
    """

    def __init__(self, are_static: bool) -> None:
        self._are_static = are_static
        self._means: dict[Weight, Tensor] = {}
        self._key: tuple[Any, ...] = ()

    def of(self, curvature: Curvature, momenta: Mapping[Weight, Tensor], steps: int) -> dict[Weight, Tensor]:
        """Return J D⁻¹ m of each m after so many steps. The step updates them in place; `keep` must follow it."""
        key, self._key = self._key, ()  # a step that fails leaves them in no known state
        if key != _key(curvature, momenta, steps):
            new = projected_means(curvature, momenta)
            is_loaded = key[:1] != (id(curvature),) and curvature.projected.get("steps") == steps
            kept = _by_weight(curvature.projected) if is_loaded else {}
            self._replace(kept if _are_close(kept, new) else new)
        curvature.projected.clear()
        return self._means

    def keep(
        self,
        curvature: Curvature,
        momenta: Mapping[Weight, Tensor],
        steps: int,
        new: Mapping[Weight, Tensor] | None = None,
    ) -> None:
        """Note that they, or the ``new`` ones in their place, belong to the present m, after so many steps."""
        if new is not None:
            self._replace(new)
        nested: dict[str, dict[str, Tensor]] = {}
        for (name, param_name), mean in self._means.items():
            nested.setdefault(name, {})[param_name] = mean
        curvature.projected.update(steps=steps, means=nested)
        self._key = _key(curvature, momenta, steps)

    def _replace(self, new: Mapping[Weight, Tensor]) -> None:
        before, self._means = self._means, {}
        for weight, y_N in new.items():
            old = before.get(weight)
            if old is not None and (old.shape, old.dtype, old.device) == (y_N.shape, y_N.dtype, y_N.device):
                self._means[weight] = old.copy_(y_N)
                continue
            self._means[weight] = y_N.clone()
            if self._are_static:
                mark_static(self._means[weight])


def _by_weight(projected: Mapping[str, Any]) -> dict[Weight, Tensor]:
    return {
        (name, param_name): mean for name, layer in projected["means"].items() for param_name, mean in layer.items()
    }


def _are_close(kept: Mapping[Weight, Tensor], new: Mapping[Weight, Tensor]) -> bool:
    """Return whether projections that a state holds are those of its m, up to rounding."""

    def is_close(x_N: Tensor, y_N: Tensor) -> bool:
        most = _ROUNDINGS * torch.finfo(y_N.dtype).eps
        return (x_N.shape, x_N.dtype) == (y_N.shape, y_N.dtype) and bool((x_N - y_N).norm() <= most * y_N.norm())

    return kept.keys() == new.keys() and all(is_close(kept[one], y_N) for one, y_N in new.items())


def _key(curvature: Curvature, momenta: Mapping[Weight, Tensor], steps: int) -> tuple[Any, ...]:
    """Return what changes with the curvature and with every change of m: its version counts writes in place."""
    return id(curvature), steps, [(weight, m.data_ptr(), m._version) for weight, m in momenta.items()]
