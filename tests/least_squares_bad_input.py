"""Bad input for `GaussNewton`, its steps, losses and damping rules, and for derivatives: the error, and a part of it.

A new bad input is a row. `test_bad_least_squares.py` takes the rows.
"""

import numpy as np
import torch
from least_squares_problem import poisson
from torch import nn

from tengrad_triton import EffectiveDimension, Exponential, GainRatio, GaussNewton, derivatives, laplacian

X = torch.full((4, 2), 0.5).double()


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


def made(u=None, residuals=None, **settings):
    u = network() if u is None else u
    return GaussNewton(u, {"interior": u, "edge": u} if residuals is None else residuals, **settings)


def frozen():
    return network().requires_grad_(False)


def mixed_types():
    u = network()
    u[0].float()
    return u


CONSTRUCTION = {
    "parameters for the model": (lambda: made(network().parameters(), {"a": abs}), TypeError, "give the module itself"),
    "a function for the model": (lambda: made(abs, {"a": abs}), TypeError, "got builtin_function_or_method"),
    "no parameters": (lambda: made(nn.Tanh()), ValueError, "Tanh has no trainable parameters"),
    "frozen parameters": (lambda: made(frozen()), ValueError, "no trainable parameters"),
    "lazy parameters": (lambda: made(nn.LazyLinear(1)), ValueError, "call it once on a batch of points"),
    "half precision": (lambda: made(network(torch.float16)), ValueError, "got torch.float16: use model.double()"),
    "bfloat16": (lambda: made(network(torch.bfloat16)), ValueError, "got torch.bfloat16: use model.double()"),
    "two types": (lambda: made(mixed_types()), ValueError, "torch.float32 on cpu and torch.float64 on cpu"),
    "the device meta": (lambda: made(network().to("meta")), ValueError, "meta, which holds no numbers"),
    "a list of residuals": (lambda: made(residuals=[abs]), TypeError, "a dictionary from the names of terms to"),
    "one function": (lambda: made(residuals=abs), TypeError, "got builtin_function_or_method"),
    "a module for residuals": (lambda: made(residuals=network()), TypeError, "got Sequential"),
    "no residuals": (lambda: made(residuals={}), ValueError, "at least one term"),
    "a name with a space": (lambda: made(residuals={"the edge": abs}), ValueError, "got 'the edge': use letters"),
    "a name that is a number": (lambda: made(residuals={1: abs}), ValueError, "got 1: use letters"),
    "a word of Python": (lambda: made(residuals={"lambda": abs}), ValueError, "no word of Python"),
    "the name self": (lambda: made(residuals={"self": abs}), ValueError, "got 'self'"),
    "the name closure": (lambda: made(residuals={"closure": abs}), ValueError, "got 'closure'"),
    "a tensor for a residual": (lambda: made(residuals={"a": X}), TypeError, "'a' must be a function of its points"),
    "None for a residual": (lambda: made(residuals={"a": None}), TypeError, "got NoneType: write lambda x"),
    "a list of weights": (lambda: made(weights=[1.0]), TypeError, "weights must be a dictionary"),
    "a misspelt weight": (lambda: made(weights={"egde": 1.0}), ValueError, "(did you mean 'edge'?)"),
    "an unknown weight": (lambda: made(weights={"b": 1.0}), ValueError, "there are interior, edge"),
    "weight 0": (lambda: made(weights={"edge": 0.0}), ValueError, "positive and finite, got 0.0: leave out"),
    "a negative weight": (lambda: made(weights={"edge": -1}), ValueError, "got -1"),
    "a weight NaN": (lambda: made(weights={"edge": float("nan")}), ValueError, "got nan"),
    "an infinite weight": (lambda: made(weights={"edge": float("inf")}), ValueError, "got inf"),
    "a tensor for a weight": (lambda: made(weights={"edge": torch.ones(())}), TypeError, "write float(weight)"),
    "weights of points": (lambda: made(weights={"edge": torch.ones(4)}), TypeError, "return its root times the resid"),
    "True for a weight": (lambda: made(weights={"edge": True}), TypeError, "must be a number, got True"),
    "a negative lr": (lambda: made(lr=-0.1), ValueError, "lr must be at least 0 and finite, got -0.1"),
    "a text for lr": (lambda: made(lr="1"), TypeError, "lr must be a number, got '1'"),
    "damping 0": (lambda: made(damping=0.0), ValueError, "damping must be positive and finite, got 0.0"),
    "damping NaN": (lambda: made(damping=float("nan")), ValueError, "damping must be positive"),
    "damping -1": (lambda: made(damping=-1), ValueError, "got -1"),
    "damping 'lm'": (lambda: made(damping="lm"), TypeError, "one of GainRatio(), EffectiveDimension(), got 'lm'"),
    "damping None": (lambda: made(damping=None), TypeError, "damping must be a number, a function of the step"),
    "spring 1": (lambda: made(spring=1), ValueError, "spring must be in [0, 1), got 1"),
    "spring -1": (lambda: made(spring=-1.0), ValueError, "got -1.0"),
    "spring with max_rows": (lambda: made(spring=0.5, max_rows=3), ValueError, "take it without max_rows"),
    "max_rows with sketch": (lambda: made(sketch=2, max_rows=3), ValueError, "give one of them"),
    "sketch with layers": (lambda: made(sketch=2, blocks="layer"), ValueError, "with blocks='network'"),
    "max_rows with layers": (lambda: made(max_rows=2, blocks="layer"), ValueError, "with blocks='network'"),
    "max_rows 0": (lambda: made(max_rows=0), ValueError, "max_rows must be at least 1"),
    "a fraction of rows": (lambda: made(max_rows=0.5), TypeError, "max_rows must be a whole number"),
    "sketch -1": (lambda: made(sketch=-1), ValueError, "sketch must be at least 1"),
    "blocks 'layers'": (lambda: made(blocks="layers"), ValueError, "(did you mean 'layer'?)"),
    "unknown blocks": (lambda: made(blocks=[["9"]]), ValueError, "use names of layers ('0', '2')"),
    "a layer in two blocks": (lambda: made(blocks=[["0"], ["0", "2"]]), ValueError, "more than once"),
    "a line search": (lambda: made(line_search="wolfe"), ValueError, "one of 'grid', 'armijo', got 'wolfe'"),
    "acceleration 1": (lambda: made(acceleration=1), TypeError, "acceleration must be True or False, got 1"),
    "compiled": (lambda: made(compiled="yes"), TypeError, "compiled must be True or False, got 'yes'"),
    "max_bytes 0": (lambda: made(max_bytes=0), ValueError, "max_bytes must be at least 1"),
    "max_bytes '4G'": (lambda: made(max_bytes="4G"), TypeError, "max_bytes must be a whole number, got '4G'"),
    "a seed": (lambda: made(seed=0.5), TypeError, "seed must be a whole number"),
    "GainRatio(start=0)": (lambda: GainRatio(start=0.0), ValueError, "expected 0 < start"),
    "GainRatio(start=inf)": (lambda: GainRatio(start=float("inf")), ValueError, "expected 0 < start"),
    "GainRatio(start='a')": (lambda: GainRatio(start="a"), TypeError, "start must be a number, got 'a'"),
    "GainRatio(decrease=2)": (lambda: GainRatio(decrease=2.0), ValueError, "decrease"),
    "EffectiveDimension(2)": (lambda: EffectiveDimension(2.0), ValueError, "share"),
    "EffectiveDimension(NaN)": (lambda: EffectiveDimension(float("nan")), ValueError, "share"),
    "Exponential(factor=2)": (lambda: Exponential(factor=2.0), ValueError, "factor"),
    "Exponential(start=-1)": (lambda: Exponential(start=-1.0), ValueError, "least <= start"),
    "derivatives at a point": (lambda: derivatives(network(), X[0]), ValueError, "a single point is x[None]"),
    "derivatives at an array": (lambda: derivatives(network(), X.numpy()), TypeError, "came as ndarray"),
    "laplacian at whole numbers": (lambda: laplacian(network(), X.long()), TypeError, "x.float() or x.double()"),
    "laplacian of a coordinate": (lambda: laplacian(network(), X, [2]), ValueError, "have coordinates 0 to 1"),
    "laplacian of none": (lambda: laplacian(network(), X, []), ValueError, "name at least one of them"),
    "laplacian of one twice": (lambda: laplacian(network(), X, [0, 0]), ValueError, "each once"),
    "laplacian of a mean": (lambda: laplacian(torch.mean, X), ValueError, "points [N, D] returns"),
}
"""What is refused when it is made or called."""


def with_points(residual=None, dtype=torch.float64, settings=None, **points):
    """Return a problem, its settings, and points of a step."""

    def make():
        problem = poisson(6, 4)
        problem.u.to(dtype)
        problem.points = {name: x.to(dtype) for name, x in problem.points.items()}
        if residual is not None:
            problem.residuals["interior"] = lambda x: residual(problem.u, x)
        given = {**problem.points, **points}
        return problem, settings or {}, {name: x for name, x in given.items() if x is not None}

    return make


NAN = X.clone().index_fill_(0, torch.tensor(1), torch.nan)
STEPS = {
    "numbers": (with_points(interior=[0.1, 0.2]), TypeError, "got a list of float: convert numbers by torch.tensor"),
    "an array": (with_points(interior=X.numpy()), TypeError, "got 'ndarray': convert an array by torch.from_numpy"),
    "arrays": (with_points(interior=[X.numpy()]), TypeError, "a list of ndarray: convert an array by torch.from_numpy"),
    "a number of NumPy": (with_points(interior=np.float64(1)), TypeError, "got 'float64'"),
    "no tuple": (with_points(interior=()), TypeError, "got an empty tuple: a residual that needs no"),
    "a dictionary": (with_points(interior={"x": X}), TypeError, "got 'dict': give its tensors as a tuple"),
    "a count": (with_points(interior=100), TypeError, "got 'int'"),
    "float32 points": (with_points(interior=X.float()), TypeError, "points of torch.float32 with a model of torch.f"),
    "whole numbers": (with_points(interior=X.long()), TypeError, "torch.int64, but derivatives need"),
    "another device": (with_points(interior=X.to("meta")), ValueError, "are on meta, but the model is on cpu"),
    "0 points": (with_points(interior=X[:0]), ValueError, "'interior' has 0 points: give it at least one"),
    "a 0-dim tensor": (with_points(interior=X[0, 0]), ValueError, "got a 0-dim tensor"),
    "two lengths": (
        with_points(interior=(X, X[:1])),
        ValueError,
        "one first dimension, the number of points, got 4, 1",
    ),
    "points NaN": (with_points(interior=NAN), ValueError, "must be finite, but some are NaN or infinite"),
    "no points of a term": (with_points(boundary=None), TypeError, "boundary had none: step(interior=points, boundary"),
    "no points": (with_points(boundary=None, interior=None), TypeError, "interior, boundary had none"),
    "an unknown term": (with_points(edge=X), TypeError, "no residual is named 'edge'; there are interior, boundary"),
    "a misspelt term": (with_points(boundry=X), TypeError, "(did you mean 'boundary'?)"),
    "a mean": (with_points(lambda u, x: u(x).square().mean()), ValueError, "got shape (): return r itself, not its m"),
    "a first dimension": (with_points(lambda u, x: u(x)[:-1]), ValueError, "each of its 6 points, got shape (5, 1)"),
    "outputs first": (with_points(lambda u, x: u(x).T), ValueError, "got shape (1, 6)"),
    "no residuals": (with_points(lambda u, x: u(x)[:, :0]), ValueError, "at least one residual for each point, got"),
    "complex residuals": (with_points(lambda u, x: u(x) * 1j), TypeError, "torch.complex128 tensor; return real"),
    "whole residuals": (with_points(lambda u, x: u(x).long()), TypeError, "got torch.int64 tensor"),
    "None": (with_points(lambda u, x: None), TypeError, "floating-point numbers, got NoneType"),
    "a tuple": (with_points(lambda u, x: (u(x), x)), TypeError, "got tuple: torch.cat([…], 1) makes"),
    "points alone": (with_points(lambda u, x: x), ValueError, "does not depend on the trained parameters"),
    "detached": (with_points(lambda u, x: u(x).detach()), ValueError, "without detach() or torch.no_grad()"),
    "no graph": (with_points(torch.no_grad()(lambda u, x: u(x))), ValueError, "does not depend on the trained param"),
    "another model": (with_points(lambda u, x: network()(x)), ValueError, "the model that was given to the optimizer"),
    "an error of the user's": (with_points(lambda u, x: {}[1]), KeyError, "1"),
    "too many columns": (with_points(interior=X[:, :1].repeat(1, 3)), RuntimeError, "shapes cannot be multiplied"),
    "a function of damping": (
        with_points(settings={"damping": lambda k: float("nan")}),
        ValueError,
        "returned nan at s",
    ),
    "damping of None": (with_points(settings={"damping": lambda k: None}), ValueError, "returned None at step 0"),
    "a damping below float32": (
        with_points(dtype=torch.float32, settings={"damping": 1e-12}),
        ValueError,
        "below what float32 resolves",
    ),
    "too few bytes": (with_points(settings={"max_bytes": 100}), ValueError, "more than max_bytes"),
}
"""What a step refuses."""
WITHOUT_A_STEP = {"another model", "points alone", "detached", "no graph"} | {
    name for name, row in STEPS.items() if "damping" in name or name == "too few bytes"
}
"""What has a loss all the same."""
