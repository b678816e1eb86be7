"""RNN, LSTM and GRU: linear layers at every step, unrolled once more to find the derivatives by what they returned.

Dimensions: N samples, T steps, I inputs, H units, O numbers before the gates' nonlinearities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp

from tengrad_triton.layers.dense import dense, summed
from tengrad_triton.layers.form import Call, Canonical, Form, Inputs, arguments, canonical
from tengrad_triton.layers.rerun import replayed

Weights = Mapping[str, Tensor]
Zeros = Mapping[str, list[Tensor]]
"""Zeros to be added to what a linear layer returns at each step: the derivative by them is the derivative by it."""


@dataclass
class Direction:
    """One layer in one direction: the suffix of its weights' names, and what its linear layers saw at each step."""

    suffix: str
    reverse: bool
    seen: dict[str, list[Tensor]]

    def linear(self, kind: str, w: Weights, x: Tensor, zeros: Zeros, step: int) -> Tensor:
        """Return ``weight_<kind> x + bias_<kind>`` plus a zero."""
        name = f"{kind}_{self.suffix}"
        self.seen.setdefault(name, []).append(x)
        y = F.linear(x, w[f"weight_{name}"], w.get(f"bias_{name}"))
        return y + zeros[name][step] if name in zeros else y


def _rnn_cell(nonlinearity: str) -> Callable[..., tuple[Tensor, ...]]:
    activation = torch.tanh if nonlinearity == "tanh" else torch.relu

    def cell(by_input: Tensor, by_state: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (activation(by_input + by_state),)

    return cell


def _gru_cell(by_input: Tensor, by_state: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (reset_i, update_i, new_i), (reset_h, update_h, new_h) = by_input.chunk(3, -1), by_state.chunk(3, -1)
    reset, update = (reset_i + reset_h).sigmoid(), (update_i + update_h).sigmoid()
    new = (new_i + reset * new_h).tanh()
    return (new + update * (state[0] - new),)


def _lstm_cell(by_input: Tensor, by_state: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    entry, forget, cell, out = (by_input + by_state).chunk(4, -1)
    c = forget.sigmoid() * state[1] + entry.sigmoid() * cell.tanh()
    return out.sigmoid() * c.tanh(), c


def _cell_of(layer: Any) -> Callable[..., tuple[Tensor, ...]]:
    if isinstance(layer, nn.RNN):
        return _rnn_cell(layer.nonlinearity)
    return _lstm_cell if isinstance(layer, nn.LSTM) else _gru_cell


@canonical.register
def _(layer: nn.RNN | nn.LSTM | nn.GRU, x: Inputs, grad_y: list[Tensor | None]) -> Canonical:
    named = arguments(layer, x)
    x_TNI = named["input"].transpose(0, 1) if layer.batch_first else named["input"]
    weights = {name: p.detach().to(x_TNI) for name, p in layer.named_parameters(recurse=False)}
    starts = _starts(layer, x_TNI, named["hx"])
    rng = x.rng if isinstance(x, Call) else None

    def unrolled(zeros: Zeros) -> tuple[tuple[Tensor, ...], Any]:
        with replayed(rng, x_TNI.device):
            return _unroll(layer, weights, x_TNI, starts, zeros)

    shapes = {
        name: [xs[0].new_zeros(xs[0].shape[0], len(weights[f"weight_{name}"]))] * len(xs)
        for name, xs in unrolled({})[1].items()
    }
    transformed: Any = vjp(unrolled, shapes, has_aux=True)
    outputs, pull, seen = transformed
    y = grad_y[0]
    first = y.transpose(0, 1) if y is not None and layer.batch_first else y
    cotangents = [first, *grad_y[1:]]
    (by_linear,) = pull(
        tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, cotangents, strict=True))
    )
    form: dict[str, Form] = {}
    for name, xs in seen.items():
        a_NTI, g_NTO = torch.stack(xs, 1), torch.stack(by_linear[name], 1)
        form |= {f"weight_{name}": dense(a_NTI, g_NTO), f"bias_{name}": summed(g_NTO)}
    return form


def _starts(layer: nn.RNNBase, x_TNI: Tensor, hx: Any) -> list[tuple[Tensor, ...]]:
    """Return the first state of every layer and direction."""
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if isinstance(layer, nn.LSTM) else 1]
    number = layer.num_layers * (2 if layer.bidirectional else 1)
    given = [hx] if isinstance(hx, Tensor) else hx
    states = [x_TNI.new_zeros(number, x_TNI.shape[1], size) for size in sizes] if hx is None else given
    return list(zip(*(state.unbind() for state in states), strict=True))


def _unroll(
    layer: nn.RNNBase, weights: Weights, x_TNI: Tensor, starts: list[tuple[Tensor, ...]], zeros: Zeros
) -> tuple[tuple[Tensor, ...], dict[str, list[Tensor]]]:
    """Return (outputs, last states), as the layer does, and the inputs of every linear layer at every step."""
    seen: dict[str, list[Tensor]] = {}
    xs, ends = list(x_TNI.unbind()), []
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    for depth in range(layer.num_layers):
        sides = []
        for reverse, ending in enumerate(directions):
            direction = Direction(f"l{depth}{ending}", bool(reverse), seen)
            side, end = _run(layer, direction, weights, xs, starts[depth * len(directions) + reverse], zeros)
            sides.append(side)
            ends.append(end)
        y_TNH = torch.stack([torch.cat(parts, -1) for parts in zip(*sides, strict=True)])
        if depth < layer.num_layers - 1:
            y_TNH = F.dropout(y_TNH, layer.dropout, layer.training)
        xs = list(y_TNH.unbind())
    return (y_TNH, *(torch.stack(states) for states in zip(*ends, strict=True))), seen


def _run(
    layer: nn.RNNBase, direction: Direction, w: Weights, xs: list[Tensor], state: tuple[Tensor, ...], zeros: Zeros
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Return the outputs of one layer in one direction at every step, and its last state."""
    cell, outputs = _cell_of(layer), []
    for step, x in enumerate(reversed(xs) if direction.reverse else xs):
        by_input = direction.linear("ih", w, x, zeros, step)
        by_state = direction.linear("hh", w, state[0], zeros, step)
        state = cell(by_input, by_state, state)
        if layer.proj_size:
            state = (direction.linear("hr", w, state[0], zeros, step), *state[1:])
        outputs.append(state[0])
    return outputs[::-1] if direction.reverse else outputs, state
