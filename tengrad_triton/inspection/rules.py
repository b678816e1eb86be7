"""The check of a rule (`canonical`) against autograd, one backward pass for each sample, in float64.

Dimensions: N samples.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tengrad_triton.capture.blocks import CapturedLayer
from tengrad_triton.capture.record import LayerCall
from tengrad_triton.capture.rows.rule import contributions_of, pairs_of_calls
from tengrad_triton.curvature.choices import ops_for
from tengrad_triton.curvature.refresh import jacobian_of
from tengrad_triton.layers import (
    Call,
    call_parameters,
    canonical,
    draws_random_numbers,
    is_unrolled,
    rng_state,
    samples_dim,
    tensors_in,
    unflatten_rows,
    why_no_rule,
)

TOLERANCE = 1e-9
"""Of the rows of a parameter, relative: what steps in float64 are exact to."""
_ROUNDING = 1e-6
"""Rows that are smaller than this share of all parameters' rows may be rounding alone: errors are relative to it."""

_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
Rows = Mapping[str, Tensor]
"""Rows [N, *shape] of every parameter, by its name within the layer."""


@dataclass(frozen=True)
class RuleReport:
    """What `check_rule` found to be right; ``print`` shows it in one line.

    Attributes:
        layer: the name of the layer's type.
        samples: N.
        calls: the number of calls, whose contributions were added up.
        errors: for each parameter, by its name within the layer, ‖J − J by autograd‖ / ‖J by autograd‖.
    """

    layer: str
    samples: int
    calls: int
    errors: Mapping[str, float]

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        calls = "" if self.calls == 1 else f" in {self.calls} calls"
        return f"the rule for {self.layer} agrees with autograd for {self.samples} samples{calls}; errors: {listed}"


def check_rule(layer: nn.Module, *args: Any, **kwargs: Any) -> RuleReport:
    """Compare the rows of a layer's rule with autograd's, sample by sample (docs/math.md, M1).

    The layer is called as ``layer(*args, **kwargs)``, with N ≥ 2 samples in the first dimension of its output; a few
    are enough. Layer and inputs are copied in float64 first: the layer, its ``.grad``, its buffers and the random
    number generators stay as they are. The rule gets random output gradients, and one backward pass for each sample
    gives the rows that are expected. For several calls of the layer in one forward pass, whose contributions add up,
    pass one `Call` for each: ``check_rule(layer, Call((x,)), Call((z,)))``.

    Args:
        layer: of a type that has a rule, in the mode (training or evaluation) to check it in.
        args: the positional arguments of the call, or one `Call` for each of several calls.
        kwargs: its keyword arguments.

    Returns:
        the relative error of every parameter, at most 1e-9.

    Raises:
        ValueError: the rule is wrong (the message names the parameter, the worst sample, and both norms), returns
            nothing for a parameter or rows of another size; or the call does not allow a check: fewer than two samples,
            outputs that are no tensors, rows that are all zero.
        TypeError: the layer has no rule, or the rule returns something else than contributions by parameter.
    """
    why = why_no_rule(layer)
    if why is not None:
        raise TypeError(
            f"{why}: there is no rule to check, and the rows come from autograd; register one for "
            f"{type(layer).__name__} by @canonical.register"
        )
    calls = list(args) if args and not kwargs and all(isinstance(x, Call) for x in args) else [Call(args, kwargs)]
    own = copy.deepcopy(layer).double().requires_grad_(True)
    parameters = dict(call_parameters(own))
    if not parameters:
        raise ValueError(f"{type(layer).__name__} has no parameters: its rule gives no rows")
    with _generators_restored(own), torch.enable_grad():
        forwards = [_Forward(own, call) for call in calls]
        samples = _same_samples(layer, forwards)
        expected = _rows_by_autograd(forwards, parameters, samples)
    with torch.no_grad():
        found = _rows_by_rule(own, forwards, parameters, samples)
    return _compared(type(layer).__name__, found, expected, len(calls))


@contextmanager
def _generators_restored(layer: nn.Module) -> Iterator[None]:
    with torch.random.fork_rng({p.device for p in layer.parameters() if p.is_cuda}):
        yield


class _Forward:
    """One call in float64, with random output gradients.

    Attributes:
        call: what the rule gets.
        outputs: each output that depends on a parameter, with its gradient and the dimension that counts its samples.
    """

    def __init__(self, layer: nn.Module, call: Call) -> None:
        args, kwargs = tree_map_only(Tensor, _copied, (call.args, dict(call.kwargs)))
        rng = rng_state(next(layer.parameters()).device) if draws_random_numbers(layer) else None
        returned = layer(*args, **kwargs)
        _check_outputs(layer, returned)
        outputs, generator = tensors_in(returned), torch.Generator().manual_seed(0)
        grads = [torch.randn(y.shape, generator=generator).to(y) if y.requires_grad else None for y in outputs]
        dims = [samples_dim(layer), *[int(is_unrolled(layer))] * (len(outputs) - 1)]
        self.call = LayerCall.with_grads(Call(args, kwargs, rng), grads, isinstance(returned, Tensor), False)
        self.outputs = [(y, g, dim) for y, g, dim in zip(outputs, grads, dims, strict=True) if g is not None]

    def own_loss(self, sample: int) -> Tensor:
        """Return the number whose derivatives with respect to a sample's outputs are the output gradients."""
        parts = [(y.select(dim, sample) * g.select(dim, sample)).sum() for y, g, dim in self.outputs]
        return torch.stack(parts).sum()


def _copied(x: Tensor) -> Tensor:
    return x.detach().double() if x.dtype in _SINGLE else x.detach().clone()


def _check_outputs(layer: nn.Module, returned: Any) -> None:
    """Raise `ValueError` unless the layer returned tensors that depend on its parameters, and nothing opaque."""
    opaque = [x for x in tree_leaves(returned) if not isinstance(x, (Tensor, int, float, str, type(None)))]
    if opaque:
        raise ValueError(
            f"{type(layer).__name__} returned a {type(opaque[0]).__name__}, whose tensors a rule cannot get gradients "
            "of: return a tensor, or tensors in tuples, lists and dictionaries"
        )
    if not any(y.requires_grad for y in tensors_in(returned)):
        raise ValueError(f"{type(layer).__name__} returned no tensor that depends on its parameters: nothing to check")


def _same_samples(layer: nn.Module, forwards: Sequence[_Forward]) -> int:
    """Return N; raise `ValueError` unless it is at least 2 and the same for all outputs of all calls."""
    sizes = {y.shape[dim] if y.dim() > dim else 0 for forward in forwards for y, _, dim in forward.outputs}
    if len(sizes) > 1 or min(sizes) < 2:
        shapes = ", ".join(str(tuple(y.shape)) for forward in forwards for y, _, _ in forward.outputs)
        raise ValueError(
            f"{type(layer).__name__} returned {shapes}: expected one number of samples, at least 2, in the first "
            "dimension of every output"
        )
    return sizes.pop()


def _rows_by_autograd(forwards: Sequence[_Forward], parameters: Mapping[str, Tensor], samples: int) -> Rows:
    """Return every parameter's rows, by one backward pass for each sample."""
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for sample in range(samples):
        loss = torch.stack([forward.own_loss(sample) for forward in forwards]).sum()
        wanted = list(parameters.values())
        grads = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
        for name, grad in zip(parameters, grads, strict=True):
            found[name].append(grad)
    return {name: torch.stack(rows) for name, rows in found.items()}


def _rows_by_rule(
    layer: nn.Module, forwards: Sequence[_Forward], parameters: Mapping[str, Tensor], samples: int
) -> Rows:
    """Return every parameter's rows as a refresh would compute them."""
    pairs = pairs_of_calls(type(layer).__name__, [forward.call for forward in forwards], 1.0)
    captured = {"": CapturedLayer(layer, parameters, has_rule=True, takes_half_precision=False)}
    by_id = contributions_of(captured, lambda _: pairs, {}, (), samples)
    ops, found = ops_for("auto"), {}
    for name, parameter in parameters.items():
        contributions = by_id.get(id(parameter), [])
        if len(contributions) < len(forwards):
            returned = ", ".join(map(repr, canonical(layer, *pairs[0]))) or "nothing"
            raise ValueError(
                f"the rule for {type(layer).__name__} returned nothing for {name!r}, only {returned}: it must return a "
                "contribution for every parameter that the layer owns directly"
            )
        j_NK = jacobian_of([contributions], "per_sample", ops).explicit_rows()
        found[name] = unflatten_rows(j_NK, parameter.shape)
    return found


def _compared(layer: str, found: Rows, expected: Rows, calls: int) -> RuleReport:
    """Return the errors; raise `ValueError` where one is too large, or nothing was compared."""
    least = _ROUNDING * torch.stack([j.norm() for j in expected.values()]).norm()
    for name, j in expected.items():
        if not j.any():
            raise ValueError(
                f"autograd's rows of {name!r} are all 0 for these inputs, so that the rule for {layer} is not checked: "
                "call the layer with inputs for which its output depends on this parameter"
            )
    errors = {name: ((found[name] - j).norm() / torch.maximum(j.norm(), least)).item() for name, j in expected.items()}
    wrong = [name for name, error in errors.items() if not error <= TOLERANCE]  # NaN is wrong too
    if wrong:
        raise ValueError(_what_is_wrong(layer, wrong, found, expected, errors))
    return RuleReport(layer, len(next(iter(expected.values()))), calls, errors)


def _what_is_wrong(layer: str, wrong: Sequence[str], found: Rows, expected: Rows, errors: Mapping[str, float]) -> str:
    """Return the message about the first wrong parameter, at its worst sample."""
    name = wrong[0]
    got, wanted = found[name].flatten(1), expected[name].flatten(1)
    worst = int((got - wanted).norm(dim=1).nan_to_num(nan=float("inf")).argmax())
    also = f"; wrong too: {', '.join(wrong[1:])}" if len(wrong) > 1 else ""
    return (
        f"the rule for {layer} is wrong for {name!r}: relative error {errors[name]:.2g}; the worst is sample {worst} "
        f"of {len(got)}, whose row has norm {got[worst].norm().item():.4g}, but {wanted[worst].norm().item():.4g} by "
        f"autograd{_likely_cause(got, wanted)}{also}"
    )


def _likely_cause(got: Tensor, wanted: Tensor) -> str:
    """Return what the rows have in common with the right ones, if anything."""
    factor = ((got * wanted).sum() / wanted.square().sum()).item()
    is_multiple = (got - factor * wanted).norm() <= TOLERANCE * got.norm() and factor != 0
    if is_multiple and f"{factor:.4g}" != "1":  # otherwise the rows differ by rounding
        return f"; all rows are {factor:.4g} times those of autograd"
    if (got.sum(0) - wanted.sum(0)).norm() <= TOLERANCE * wanted.sum(0).norm():
        return "; the sum over the samples is right, so gradients are assigned to the wrong samples"
    return ""
