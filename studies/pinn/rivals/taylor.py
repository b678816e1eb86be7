"""u, its first derivatives and a sum of second ones, forward and backward through a network of Linear and Tanh.

The forward pass is the forward Laplacian of Li et al., 2023 (arXiv 2307.08214): each layer carries channels, which are
the value, a first derivative for each coordinate, and the sum of second derivatives. The backward pass is its
transpose, written out, which spares autograd's records.

Key: C channels (value, D first derivatives, sum of second), N points, D coordinates, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from studies.pinn.rivals.operators import Operator


@dataclass(frozen=True)
class LayerTape:
    """What a linear layer read and what came back.

    Attributes:
        input_CNI: its inputs. A layer with C = 1 carries values only.
        grad_CNO: derivatives of the point's L u by its outputs.
    """

    input_CNI: Tensor
    grad_CNO: Tensor


@dataclass(frozen=True)
class _Activation:
    """A tanh's input channels and the derivatives of tanh that the backward pass needs."""

    value_NI: Tensor
    slope_NI: Tensor
    bend_NI: Tensor
    first_DNI: Tensor
    second_NI: Tensor | None
    square_NI: Tensor


def linear_layers(model: nn.Module) -> list[nn.Linear] | None:
    """Return the linear layers of a chain Linear, Tanh, …, Linear with biases and one output, or None for others."""
    layers = list(model) if isinstance(model, nn.Sequential) else []
    linear = [layer for layer in layers[0::2] if isinstance(layer, nn.Linear)]
    kinds = [nn.Linear, nn.Tanh] * len(linear)
    if not linear or [type(layer) for layer in layers] != kinds[:-1] or linear[-1].out_features != 1:
        return None
    whole = all(layer.bias is not None for layer in linear) and all(p.requires_grad for p in model.parameters())
    return linear if whole else None


def apply(layers: list[nn.Linear], operator: Operator, x_ND: Tensor) -> Tensor:
    """Return L u at each point, ``[N]``, and nothing for a backward pass."""
    if operator.only_value:
        return operator.value * _values(layers, x_ND)[-1] @ layers[-1].weight[0] + operator.value * layers[-1].bias
    z_NI, first_DNI, second_NI = _first_layer(layers[0], x_ND)
    for layer in layers[1:-1]:
        tape, first_DNI, second_NI = _forward_tanh(z_NI, first_DNI, second_NI, operator)
        z_NI = torch.addmm(layer.bias, tape.value_NI, layer.weight.T)
        first_DNI, second_NI = first_DNI @ layer.weight.T, second_NI @ layer.weight.T
    return _last_layer(layers[-1], z_NI, first_DNI, second_NI, operator)


def record(layers: list[nn.Linear], operator: Operator, x_ND: Tensor) -> tuple[Tensor, list[LayerTape]]:
    """Return L u at each point, ``[N]``, and the tape of each layer."""
    if operator.only_value:
        return _record_values(layers, operator, x_ND)
    inputs, tapes = [_input_channels(x_ND)], []
    z_NI, first_DNI, second_NI = _first_layer(layers[0], x_ND)
    for layer in layers[1:]:
        tape, first_DNI, second_NI = _forward_tanh(z_NI, first_DNI, second_NI, operator)
        inputs.append(torch.cat([tape.value_NI[None], first_DNI, second_NI[None]]))
        tapes.append(tape)
        out_CNO = inputs[-1] @ layer.weight.T
        z_NI, first_DNI, second_NI = out_CNO[0].add_(layer.bias), out_CNO[1:-1], out_CNO[-1]
    factors_C = _factors(operator, x_ND)
    result_N = torch.einsum("c,cn->n", factors_C, out_CNO[..., 0])
    grads = _backward(layers, tapes, factors_C, operator, len(x_ND))
    return result_N, [LayerTape(a, g) for a, g in zip(inputs, grads, strict=True)]


def _factors(operator: Operator, x_ND: Tensor) -> Tensor:
    """Return the factor of each channel of u in L u, ``[C]``."""
    factors_C = x_ND.new_zeros(x_ND.shape[1] + 2)
    factors_C[0], factors_C[-1] = operator.value, operator.second
    for coordinate, factor in operator.first:
        factors_C[1 + coordinate] = factor
    return factors_C


def _input_channels(x_ND: Tensor) -> Tensor:
    """Return the channels of the points themselves: x, unit vectors, and zero."""
    points, inputs = x_ND.shape
    units_DND = torch.eye(inputs, dtype=x_ND.dtype, device=x_ND.device)[:, None].expand(-1, points, -1)
    return torch.cat([x_ND[None], units_DND, torch.zeros_like(x_ND)[None]])


def _first_layer(layer: nn.Linear, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the output channels of the first layer: its derivatives are the same at all points, and Δ of it is 0."""
    return torch.addmm(layer.bias, x_ND, layer.weight.T), layer.weight.T[:, None], None


def _forward_tanh(
    z_NI: Tensor, first_DNI: Tensor, second_NI: Tensor | None, operator: Operator
) -> tuple[_Activation, Tensor, Tensor]:
    """Return what the backward pass needs, and the first and second derivatives of tanh(z)."""
    value_NI = z_NI.tanh()
    slope_NI = 1 - value_NI.square()
    bend_NI = -2 * value_NI * slope_NI
    summed = first_DNI if operator.coordinates is None else first_DNI[list(operator.coordinates)]
    square_NI = summed.square().sum(0)
    new_second_NI = bend_NI * square_NI
    if second_NI is not None:
        new_second_NI.addcmul_(slope_NI, second_NI)
    tape = _Activation(value_NI, slope_NI, bend_NI, first_DNI, second_NI, square_NI)
    return tape, slope_NI * first_DNI, new_second_NI


def _last_layer(
    layer: nn.Linear, z_NI: Tensor, first_DNI: Tensor, second_NI: Tensor | None, operator: Operator
) -> Tensor:
    """Return L u from the inputs of the last tanh, without the channels that L has no factor for."""
    w_I = layer.weight[0]
    value_NI = z_NI.tanh()
    slope_NI = 1 - value_NI.square()
    summed = first_DNI if operator.coordinates is None else first_DNI[list(operator.coordinates)]
    total_NI = value_NI * slope_NI * summed.square().sum(0).mul_(-2 * operator.second)
    if second_NI is not None:
        total_NI.addcmul_(slope_NI, second_NI, value=operator.second)
    for coordinate, factor in operator.first:
        total_NI.addcmul_(slope_NI, first_DNI[coordinate], value=factor)
    result_N = total_NI @ w_I
    return result_N if operator.value == 0 else result_N + operator.value * (value_NI @ w_I + layer.bias)


def _backward(
    layers: list[nn.Linear], tapes: list[_Activation], factors_C: Tensor, operator: Operator, points: int
) -> list[Tensor]:
    """Return the derivatives of L u by the output channels of every layer, ``[C, N, O]`` each."""
    grads = [factors_C[:, None, None].expand(-1, points, 1)]
    for layer, tape in zip(reversed(layers[1:]), reversed(tapes), strict=True):
        grads.append(_backward_tanh(grads[-1] @ layer.weight, tape, operator))
    return grads[::-1]


def _backward_tanh(grad_CNI: Tensor, tape: _Activation, operator: Operator) -> Tensor:
    """Return the derivatives by a tanh's input channels, from those by its output channels."""
    to_value_NI, to_first_DNI, to_second_NI = grad_CNI[0], grad_CNI[1:-1], grad_CNI[-1]
    slope_NI, bend_NI = tape.slope_NI, tape.bend_NI
    third_NI = slope_NI * (6 * tape.value_NI.square() - 2)
    out_CNI = torch.empty_like(grad_CNI)
    curved_NI = third_NI.mul_(tape.square_NI)
    if tape.second_NI is not None:
        curved_NI.addcmul_(bend_NI, tape.second_NI)
    torch.mul(slope_NI, to_value_NI, out=out_CNI[0])
    out_CNI[0].addcmul_(curved_NI, to_second_NI)
    out_CNI[0].addcmul_(bend_NI, (tape.first_DNI * to_first_DNI).sum(0))
    torch.mul(slope_NI, to_first_DNI, out=out_CNI[1:-1])
    twice_NI = 2 * bend_NI * to_second_NI
    for coordinate in operator.summed(len(to_first_DNI)):
        out_CNI[1 + coordinate].addcmul_(twice_NI, tape.first_DNI[coordinate])
    torch.mul(slope_NI, to_second_NI, out=out_CNI[-1])
    return out_CNI


def _values(layers: list[nn.Linear], x_ND: Tensor) -> list[Tensor]:
    """Return the input of each layer, values only."""
    inputs = [x_ND]
    for layer in layers[:-1]:
        inputs.append(torch.addmm(layer.bias, inputs[-1], layer.weight.T).tanh_())
    return inputs


def _record_values(layers: list[nn.Linear], operator: Operator, x_ND: Tensor) -> tuple[Tensor, list[LayerTape]]:
    """Return ``record`` of an operator without derivatives: one channel."""
    inputs = _values(layers, x_ND)
    result_N = (inputs[-1] @ layers[-1].weight[0] + layers[-1].bias).mul_(operator.value)
    grads = [x_ND.new_full((len(x_ND), 1), operator.value)]
    for layer, input_NI in zip(reversed(layers[1:]), reversed(inputs[1:]), strict=True):
        grads.append((grads[-1] @ layer.weight).mul_(1 - input_NI.square()))
    tapes = zip(inputs, reversed(grads), strict=True)
    return result_N, [LayerTape(input_NI[None], grad_NO[None]) for input_NI, grad_NO in tapes]
