"""Every row of SPECS against its definition: on a GPU where there is one, under Triton's interpreter elsewhere."""

import math
import os
import subprocess
import sys

import pytest
import torch
from tengrad_triton.kernels import SPECS, spec

from tengrad_triton import kernels

HARDWARE = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if HARDWARE else "cpu")
HALF = torch.bfloat16 if HARDWARE else torch.float16  # the interpreter multiplies bfloat16 matrices as integers

on_kernels = pytest.mark.skipif(not (HARDWARE or INTERPRETED), reason="test_under_the_interpreter runs these")
CASES = [
    pytest.param(row, example, dtype, id=f"{row.name}-{name}-{str(dtype).removeprefix('torch.')}")
    for row in SPECS
    for name, example in row.examples.items()
    for dtype in row.dtypes
    if dtype in (torch.float32, HALF)
]
ROWS = [pytest.param(row, id=row.name) for row in SPECS]


@pytest.mark.skipif(HARDWARE or INTERPRETED, reason="the kernels run in this process")
def test_under_the_interpreter():
    # Triton reads the variable when it is imported, which has happened long before this test in this process.
    child = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs begin as NaN, so that an entry that a kernel fails to write is seen; and kernels launch by themselves."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: _poison(empty(*size, **options)))
    if INTERPRETED:
        monkeypatch.setattr(spec, "wrap_triton", lambda kernel: kernel)


def _poison(x):
    return x.fill_(torch.nan) if x.is_floating_point() else x


def _map(function, arguments):
    """Apply a function to the floating-point tensors among some arguments, and within lists of them."""
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(_map(function, x) for x in arguments)
    return function(arguments) if torch.is_tensor(arguments) and arguments.is_floating_point() else arguments


def _strided(x):
    """The same entries with others, all NaN, between them."""
    return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]


def _run(row, function, arguments):
    """What a function returns or, where the row says so, what it changes, as a tuple."""
    changed = _map(torch.clone, arguments[: row.mutates])
    result = function(*changed, *arguments[row.mutates :])
    outputs = changed if row.mutates else result
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _assert_as_exact_as_torch(row, arguments, results, dtype):
    """The error is at most twice that of torch in the same dtype, or of merely rounding the exact result to it.

    Errors are norms over everything that the op returns, since one number's own error is a matter of luck.
    """
    exact = _run(row, row.reference, _map(torch.Tensor.double, arguments))
    torchs = _run(row, row.reference, arguments)
    assert [(x.shape, x.dtype) for x in results] == [(x.shape, x.dtype) for x in torchs]
    of_torch = _error([x.to(dtype) for x in torchs], exact)
    of_rounding = _error([truth.to(x.dtype) for truth, x in zip(exact, torchs, strict=True)], exact)
    assert _error(results, exact) <= 2 * max(of_torch, of_rounding)


def _error(results, exact):
    return math.hypot(*((x.double() - truth).norm().item() for x, truth in zip(results, exact, strict=True)))


@on_kernels
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("row", "example", "dtype"), CASES)
def test_kernel_is_as_exact_as_torch(row, example, dtype):
    arguments = example(dtype, DEVICE)
    _assert_as_exact_as_torch(row, arguments, _run(row, row.fast, arguments), dtype)


@on_kernels
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("row", ROWS)
def test_kernel_takes_any_strides(row):
    arguments = _map(_strided, next(iter(row.examples.values()))(torch.float32, DEVICE))
    # The parameters must stay views of the poisoned memory, so that the launcher meets their strides.
    result = row.fast(*arguments)
    outputs = arguments[: row.mutates] or (result if isinstance(result, tuple) else (result,))
    original = next(iter(row.examples.values()))(torch.float32, DEVICE)
    _assert_as_exact_as_torch(row, original, outputs, torch.float32)


@pytest.mark.parametrize("row", ROWS)
def test_op_traces_to_its_definition_on_a_cpu(row):
    torch._dynamo.reset()
    op = getattr(kernels, row.name)
    for example in row.examples.values():
        arguments = example(torch.float32, torch.device("cpu"))
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        for traced, eager in zip(_run(row, compiled, arguments), _run(row, row.reference, arguments), strict=True):
            torch.testing.assert_close(traced, eager, rtol=0, atol=0)
