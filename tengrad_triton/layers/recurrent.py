"""RNN, LSTM and GRU: each time step is two or three uncalled linear layers and a cell, which has no parameters.

Dimensions: N samples, T time steps, I inputs, H units, O gate inputs (the numbers before the gates' nonlinearities).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tengrad_triton.layers.contribution import Canonical, Contribution, canonical
from tengrad_triton.layers.dense import bias_grads, weight_grads
from tengrad_triton.layers.uncalled import (
    Tap,
    UncalledTensors,
    Weights,
    canonical_from_uncalled,
    canonical_of_call,
    forward_with_taps,
)


@dataclass
class TimeDirection:
    """One layer of the stack in one direction of time.

    Attributes:
        suffix: the suffix of its parameters' names, such as ``l0`` or ``l0_reverse``.
        reverse: whether it goes through the sequence from its end to its start.
        weights: the parameters of the whole stack.
        tap: called for each uncalled linear layer at each step.
    """

    suffix: str
    reverse: bool
    weights: Weights
    tap: Tap

    def linear(self, kind: str, x: Tensor) -> Tensor:
        """Return ``weight_<kind> x + bias_<kind>``, passed through the tap; ``kind`` is ``ih``, ``hh`` or ``hr``."""
        name = f"{kind}_{self.suffix}"
        return self.tap(name, x, F.linear(x, self.weights[f"weight_{name}"], self.weights.get(f"bias_{name}")))


def _rnn_cell(nonlinearity: str) -> Callable[..., tuple[Tensor, ...]]:
    activation = torch.tanh if nonlinearity == "tanh" else torch.relu

    def cell(from_input: Tensor, from_state: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (activation(from_input + from_state),)

    return cell


def _gru_cell(from_input: Tensor, from_state: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (reset_i, update_i, new_i), (reset_h, update_h, new_h) = from_input.chunk(3, -1), from_state.chunk(3, -1)
    reset, update = (reset_i + reset_h).sigmoid(), (update_i + update_h).sigmoid()
    new = (new_i + reset * new_h).tanh()
    return (new + update * (state[0] - new),)


def _lstm_cell(from_input: Tensor, from_state: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    entry, forget, cell, out = (from_input + from_state).chunk(4, -1)
    c = forget.sigmoid() * state[1] + entry.sigmoid() * cell.tanh()
    return out.sigmoid() * c.tanh(), c


def _cell_of(layer: Any) -> Callable[..., tuple[Tensor, ...]]:
    if isinstance(layer, nn.RNN):
        return _rnn_cell(layer.nonlinearity)
    return _lstm_cell if isinstance(layer, nn.LSTM) else _gru_cell


@forward_with_taps.register
def _(layer: nn.RNN | nn.LSTM | nn.GRU, weights: Weights, named_args: dict[str, Any], tap: Tap) -> tuple[Tensor, Any]:
    x_TNI = named_args["input"].transpose(0, 1) if layer.batch_first else named_args["input"]
    starts = _starts(layer, x_TNI, named_args["hx"])
    xs, ends = list(x_TNI.unbind()), []
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    for depth in range(layer.num_layers):
        sides = []
        for reverse, ending in enumerate(directions):
            direction = TimeDirection(f"l{depth}{ending}", bool(reverse), weights, tap)
            side, end = _run(layer, direction, xs, starts[depth * len(directions) + reverse])
            sides.append(side)
            ends.append(end)
        y_TNH = torch.stack([torch.cat(parts, -1) for parts in zip(*sides, strict=True)])
        if depth < layer.num_layers - 1:
            y_TNH = F.dropout(y_TNH, layer.dropout, layer.training)
        xs = list(y_TNH.unbind())
    states = tuple(torch.stack(states) for states in zip(*ends, strict=True))
    return y_TNH.transpose(0, 1) if layer.batch_first else y_TNH, states if len(states) > 1 else states[0]


def _starts(layer: nn.RNNBase, x_TNI: Tensor, hx: Any) -> list[tuple[Tensor, ...]]:
    """Return the initial state of every layer and direction: that of the call, or zeros."""
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if isinstance(layer, nn.LSTM) else 1]
    number = layer.num_layers * (2 if layer.bidirectional else 1)
    given = [hx] if isinstance(hx, Tensor) else hx
    states = [x_TNI.new_zeros(number, x_TNI.shape[1], size) for size in sizes] if hx is None else given
    return list(zip(*(state.unbind() for state in states), strict=True))


def _run(
    layer: nn.RNNBase, direction: TimeDirection, xs: list[Tensor], state: tuple[Tensor, ...]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Return the outputs of one layer in one direction at every step, and its final state."""
    cell, outputs = _cell_of(layer), []
    for x in reversed(xs) if direction.reverse else xs:
        from_input, from_state = direction.linear("ih", x), direction.linear("hh", state[0])
        state = cell(from_input, from_state, state)
        if layer.proj_size:
            state = (direction.linear("hr", state[0]), *state[1:])
        outputs.append(state[0])
    return outputs[::-1] if direction.reverse else outputs, state


@canonical.register
def _(layer: nn.RNN | nn.LSTM | nn.GRU, x: Any, grad_y: Any) -> Canonical:
    return canonical_of_call(layer, x, grad_y)


@canonical_from_uncalled.register
def _(layer: nn.RNN | nn.LSTM | nn.GRU, inputs: UncalledTensors, grads: UncalledTensors) -> Canonical:
    contributions: dict[str, Contribution] = {}
    for name, x_TNI in inputs.items():
        g_NTO = grads[name].transpose(0, 1)
        contributions[f"weight_{name}"] = weight_grads(x_TNI.transpose(0, 1), g_NTO)
        contributions[f"bias_{name}"] = bias_grads(g_NTO)
    return contributions
