"""KFAC for physics-informed networks: its factors are their definition, and its steps are the dense solve with them."""

import math

import pytest
import torch
from pinn_rival_cases import DAMPING, LINEAR, close, dense, direction_of, eye, small
from torch import nn
from torch.func import jacrev
from torch.nn.utils import parameters_to_vector

from studies.pinn.rivals import kfac
from studies.pinn.rivals.kfac import Kfac
from studies.pinn.rivals.operators import LAPLACIAN
from studies.pinn.rivals.rows import FactoredRows
from studies.pinn.rivals.squares import least_squares


def channels(layers, x):
    """Return each linear layer's input and output channels with autograd: value, first derivatives, Laplacian."""

    def through(stop):
        def at(point):
            for layer in layers[:stop]:
                point = layer(point)
            return point

        def stacked(point):
            first = jacrev(at)(point)
            second = jacrev(jacrev(at))(point)
            return torch.cat([at(point)[None], first.T, second.diagonal(dim1=1, dim2=2).sum(-1)[None]])

        return torch.func.vmap(stacked)(x)

    return {index: (through(index), through(index + 1)) for index in range(0, len(layers), 2)}


def test_factors_of_kfac_are_their_definition():
    problem, model, points = small("poisson5d")
    squares = least_squares(problem, model)
    rows = squares.rows(points)
    assert isinstance(rows, FactoredRows)
    x, layers = points["interior"], list(model)
    last = channels(layers, x)[len(layers) - 1][1]
    for place, (index, (inputs, _)) in enumerate(channels(layers, x).items()):
        ones = torch.zeros_like(inputs[..., :1])
        ones[:, 0] = 1.0
        rows_in = torch.cat([inputs, ones], -1).flatten(0, 1)
        got_in, got_out = kfac.kronecker_factors([rows.tapes[0][place]])
        close(got_in, rows_in.T @ rows_in / len(rows_in))
        gradients = output_gradients(layers, index, x) / math.sqrt(len(x))
        close(got_out, gradients.T @ gradients)
    close(last[:, -1, 0] + squares._source("interior", x), problem.terms(model)["interior"](x).detach()[:, 0])


def output_gradients(layers, index, x):
    """Return the derivatives of Δu by a layer's output channels, ``[N C, O]``: each channel is shifted."""

    def laplacian_of(shift_CO, point):
        base = point.detach()

        def shifted(moving):
            z = moving
            for layer in layers[: index + 1]:
                z = layer(z)
            gap = moving - base
            z = z + shift_CO[0] + gap @ shift_CO[1:-1] + shift_CO[-1] * gap.square().sum() / (2 * len(gap))
            for layer in layers[index + 1 :]:
                z = layer(z)
            return z[0]

        return jacrev(jacrev(shifted))(point).trace()

    zero = torch.zeros(x.shape[1] + 2, layers[index].out_features, dtype=torch.float64)
    return torch.func.vmap(lambda point: jacrev(laplacian_of)(zero, point))(x).flatten(0, 1).detach()


@pytest.mark.parametrize("name", LINEAR)
def test_kfac(name):
    problem, model, points = small(name)
    rival = Kfac(least_squares(problem, model), DAMPING, average=0.7, identity=True, momentum=0.5)
    kept = [[eye(len(f)) for f in pair] for pairs in rival.factors for pair in pairs]
    previous = 0.0
    for _ in range(3):
        rows = least_squares(problem, model).rows(points)
        residual, jacobian = dense(problem, model, points)
        gradient, expected, place = jacobian.T @ residual, [], 0
        for index, layer in enumerate(layer for layer in model if isinstance(layer, nn.Linear)):
            block = 0.0
            for term in range(2):
                pair = kept[2 * index + term]
                for old, new in zip(pair, kfac.kronecker_factors([rows.tapes[term][index]]), strict=True):
                    old.mul_(0.7).add_(0.3 * new)
                damped = [f + DAMPING * eye(len(f)) for f in pair]
                block = block + torch.kron(damped[1], damped[0])
            outputs, inputs = layer.weight.shape
            weight, bias = gradient[place : place + len(block)].split([outputs * inputs, outputs])
            joint = torch.cat([weight.view(outputs, inputs), bias[:, None]], 1)
            solved = torch.linalg.solve(block, joint.flatten()).view(outputs, inputs + 1)
            expected += [-solved[:, :-1].flatten(), -solved[:, -1]]
            place += len(block)
        previous = torch.cat(expected) + 0.5 * previous
        close(direction_of(rival, points), previous)


def test_kfac_star_takes_the_best_of_two_directions():
    problem, model, points = small("heat1d")
    squares = least_squares(problem, model)
    twin = Kfac(squares, DAMPING, average=0.7)
    rival = Kfac(squares, DAMPING, average=0.7, automatic=True)
    previous = None
    for _ in range(3):
        residual, jacobian = dense(problem, model, points)
        direction, _ = twin.direction(points)
        if previous is None:
            expected = kfac.FIRST_RATE * direction
        else:
            both = torch.stack([direction, previous], 1)
            system = both.T @ (jacobian.T @ jacobian + DAMPING * eye(len(both))) @ both
            expected = both @ torch.linalg.solve(system, -both.T @ jacobian.T @ residual)
        before = parameters_to_vector(model.parameters()).detach()
        rival.step(points)
        previous = expected
        close(parameters_to_vector(model.parameters()).detach() - before, expected, rtol=1e-7)


def test_kfac_refuses_what_it_has_no_factors_for():
    problem, model, _ = small("burgers")
    with pytest.raises(ValueError, match="Linear and Tanh"):
        Kfac(least_squares(problem, model), DAMPING)
    problem, model, _ = small("poisson2d")
    squares = least_squares(problem, model)
    squares.operators = dict.fromkeys(squares.operators, LAPLACIAN)
    with pytest.raises(ValueError, match="a term"):
        Kfac(squares, DAMPING)
