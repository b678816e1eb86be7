"""How an implementation of an op is run on a copy of its arguments, and compared with the op's definition."""

import math
from functools import reduce

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

# The results of these depend on a matrix's inverse, which multiplies the rounding errors by the matrix's condition.
FACTORIZATIONS = ("cholesky", "cholesky_inverse")


def map_floats(function, arguments):
    """Apply a function to the floating-point tensors among some arguments, and within lists of them."""
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(map_floats(function, x) for x in arguments)
    return function(arguments) if torch.is_tensor(arguments) and arguments.is_floating_point() else arguments


def in_double(arguments):
    return map_floats(torch.Tensor.double, arguments)


def run(spec, function, arguments):
    """What a function returns or, if the spec says so, what it changes, as a list."""
    changed = map_floats(_same_layout, arguments[: spec.mutates])
    result = function(*changed, *arguments[spec.mutates :])
    return tree_leaves(changed if spec.mutates else result)


def _same_layout(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def error(results, truth):
    """The norm of the error over everything that an op returns, since one number's own error is a matter of luck."""
    return math.hypot(*((x.double() - y).norm().item() for x, y in zip(results, truth, strict=True)))


def assert_is_definition(spec, function, arguments):
    """In double precision a function differs from the definition by rounding only.

    Both round after every operation. So the error of each is at most as many units of rounding, of the result's size,
    as there are operations for each entry of the result. For a factorization, the condition of its matrix multiplies
    this.
    """
    arguments = in_double(arguments)
    truth = run(spec, spec.reference, arguments)
    results = run(spec, function, arguments)
    assert [(x.shape, x.dtype) for x in results] == [(x.shape, x.dtype) for x in truth]
    operations = spec.flops(*arguments) / sum(x.numel() for x in truth)
    condition = torch.linalg.cond(arguments[0]).max().item() if spec.name in FACTORIZATIONS else 1
    size = math.hypot(*(x.norm().item() for x in truth))
    assert error(results, truth) <= 2 * operations * condition * torch.finfo(torch.float64).eps * size


def combine_slices(self, tensors):
    """Stand in for ``ReduceOps.generic_reduce`` of Triton's interpreter, which combines entry by entry in Python.

    Slices along the axis are combined in the same order, so the numbers are the same; the axis must not be kept.
    """
    entries = [np.moveaxis(x.handle.data, self.axis, 0) for x in tensors]
    slices = (
        [self.to_tensor(part, x.dtype) for part, x in zip(parts, tensors, strict=True)]
        for parts in zip(*entries, strict=True)
    )
    results = reduce(lambda total, parts: self.combine_fn.fn(*total, *parts), slices)
    return [self.to_tensor(y.handle.data, x.dtype) for y, x in zip(results, tensors, strict=True)]
