"""Every op of SPECS against its definition: on a GPU where there is one, under Triton's interpreter elsewhere.

A kernel's error is at most twice that of torch in the same dtype; in double precision an op differs by rounding only.
"""

import importlib
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_checks import assert_is_definition, combine_slices, error, in_double, map_floats, run
from torch.utils._pytree import tree_leaves

from tengrad_triton import kernels
from tengrad_triton.tuning.precision import TF32X3_ERROR

SPECS = kernels.SPECS
TF32X3 = kernels.spec.TF32X3
gram_ranges = importlib.import_module("tengrad_triton.kernels.gram_ranges")
reference = importlib.import_module("tengrad_triton.kernels.reference")
cpu = importlib.import_module("tengrad_triton.kernels.cpu")

HARDWARE = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OLD = kernels.spec.HAS_TRITON and kernels.spec.triton.__version__.startswith("3.6.")
DEVICE = torch.device("cuda" if HARDWARE else "cpu")
HALF = torch.bfloat16 if HARDWARE else torch.float16  # the interpreter multiplies bfloat16 matrices as integers

on_kernels = pytest.mark.skipif(not (HARDWARE or INTERPRETED), reason="test_under_the_interpreter runs these")
elsewhere = pytest.mark.skipif(INTERPRETED, reason="needs no kernel")


def _others_stand_for(spec, at, name, dtype):
    """Whether quicker rows prove a half-precision one.

    The first example of an op with named configurations runs in half precision in each of them; half-precision
    parameters and half-precision inputs have rows of their own.
    """
    return dtype == HALF and ((at == 0 and spec.config_names) or name == "half-precision parameters")


CASES = [
    pytest.param(
        *(spec, example, dtype),
        id=f"{spec.name}-{name}-{str(dtype).removeprefix('torch.')}",
        marks=[pytest.mark.slow] if _others_stand_for(spec, at, name, dtype) else [],
    )
    for spec in SPECS
    for at, (name, example) in enumerate(spec.examples.items())
    for dtype in spec.dtypes
    if dtype in (torch.float32, HALF)
]
IN_CONFIGS = [
    pytest.param(
        *(spec, config, example, dtype),
        id=f"{spec.name}-{config}-{name}-{str(dtype).removeprefix('torch.')}",
        marks=[] if at == 0 and dtype == HALF else [pytest.mark.slow],
    )
    for spec in SPECS
    for config in spec.config_names
    for at, (name, example) in enumerate(spec.examples.items())
    for dtype in (torch.float32, HALF)
    if config != TF32X3 or dtype == torch.float32
]
EACH_SPEC = [pytest.param(spec, id=spec.name) for spec in SPECS]


INTERPRETED_FILES = (__file__, *(str(Path(__file__).with_name(f"test_{of}.py")) for of in ("prepared", "repeated")))
# What runs under the interpreter, in halves of about the same length, which two workers take at once.
HALVES = [
    pytest.param("not slow", "project", id="project"),
    pytest.param("not slow", "not project", id="others"),
    pytest.param("slow", "float32", id="slow, float32", marks=pytest.mark.slow),
    pytest.param("slow", "not float32", id="slow, others", marks=pytest.mark.slow),
]


@pytest.mark.long
@pytest.mark.skipif(HARDWARE or INTERPRETED, reason="the kernels run in this process")
@pytest.mark.skipif(OLD, reason="the interpreter of Triton 3.6 makes numbers of arrays, as NumPy forbids")
@pytest.mark.parametrize(("marks", "half"), HALVES)
def test_under_the_interpreter(marks, half):
    # Triton reads the variable when it is imported, which has happened long before this test in this process.
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *INTERPRETED_FILES, "-q", "-p", "no:cacheprovider", "-m", marks, "-k", half],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs begin as NaN, so that an entry that a kernel fails to write is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: _poison(empty(*size, **options)))
    if INTERPRETED:
        monkeypatch.setattr("triton.runtime.interpreter.ReduceOps.generic_reduce", combine_slices)


def _poison(x):
    return x.fill_(torch.nan) if x.is_floating_point() else x


def _strided(x):
    """The same entries with others, all NaN, between them."""
    return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]


def _kernel(spec):
    """The op itself where its tensors can be on a GPU, else the part of it that launches."""
    return getattr(kernels, spec.name) if HARDWARE else spec.triton_impl


def _assert_as_exact_as_torch(spec, arguments, results, dtype, share=0.0):
    """The error is at most twice that of torch in the same dtype, or of merely rounding the exact result to it.

    It may also be at most a share of the result's norm.
    """
    exact = run(spec, spec.reference, in_double(arguments))
    torchs = run(spec, spec.torch_impl, arguments)
    assert [(x.shape, x.dtype) for x in results] == [(x.shape, x.dtype) for x in torchs]
    of_torch = error([x.to(dtype) for x in torchs], exact)
    of_rounding = error([truth.to(x.dtype) for truth, x in zip(exact, torchs, strict=True)], exact)
    size = math.hypot(*(truth.norm().item() for truth in exact))
    assert error(results, exact) <= max(2 * of_torch, 2 * of_rounding, share * size)


@on_kernels
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("spec", "example", "dtype"), CASES)
def test_kernel_is_as_exact_as_torch(spec, example, dtype):
    arguments = example(dtype, DEVICE)
    _assert_as_exact_as_torch(spec, arguments, run(spec, _kernel(spec), arguments), dtype)


@on_kernels
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("spec", "config", "example", "dtype"), IN_CONFIGS)
def test_kernel_is_as_exact_in_every_configuration(spec, config, example, dtype):
    arguments = example(dtype, DEVICE)
    results = run(spec, partial(_kernel(spec), config=config), arguments)
    _assert_as_exact_as_torch(spec, arguments, results, dtype, TF32X3_ERROR if config == TF32X3 else 0.0)


@on_kernels
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("spec", EACH_SPEC)
def test_kernel_takes_any_strides(spec):
    arguments = map_floats(_strided, next(iter(spec.examples.values()))(torch.float32, DEVICE))
    # The parameters must stay views of the poisoned memory, so that the launcher gets their strides.
    result = _kernel(spec)(*arguments)
    outputs = tree_leaves(arguments[: spec.mutates] or result)
    original = next(iter(spec.examples.values()))(torch.float32, DEVICE)
    _assert_as_exact_as_torch(spec, original, outputs, torch.float32)


@elsewhere
@pytest.mark.parametrize("spec", EACH_SPEC)
@pytest.mark.parametrize("configured", [False, True])
def test_op_traces_to_its_torch_code_on_a_cpu(spec, configured):
    torch._dynamo.reset()
    op = getattr(kernels, spec.name)
    op = partial(op, config=spec.config_names[0]) if configured and spec.config_names else op
    arguments = next(iter(spec.examples.values()))(torch.float32, torch.device("cpu"))
    traced = run(spec, torch.compile(op, fullgraph=True, backend="aot_eager"), arguments)
    for result, of_torch in zip(traced, run(spec, spec.torch_impl, arguments), strict=True):
        torch.testing.assert_close(result, of_torch, rtol=0, atol=0)


@elsewhere
@pytest.mark.parametrize("spec", EACH_SPEC)
def test_op_is_its_definition_in_double_precision(spec):
    for example in spec.examples.values():
        assert_is_definition(spec, getattr(kernels, spec.name), example(torch.float32, DEVICE))


@elsewhere
@pytest.mark.parametrize("spec", EACH_SPEC)
def test_costs_are_counted_for_every_example(spec):
    for example in spec.examples.values():
        arguments = example(torch.float32, DEVICE)
        tensors = [x for x in tree_leaves(arguments) if torch.is_tensor(x)]
        assert spec.flops(*arguments) >= max(x.numel() for x in tensors)
        assert spec.bytes(*arguments) >= 4 * max(x.numel() for x in tensors)


def _fast(name):
    return next(_kernel(spec) for spec in SPECS if spec.name == name)


@on_kernels
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("n", [5, 64, 150])
def test_gram_is_symmetric_and_positive_semidefinite(n):
    a, g = (kernels.spec.normal(n, 1, 2, size, dtype=HALF, device=DEVICE, seed=size) for size in (12, 7))
    (k_NN,) = _fast("gram")([a], [g], [0], 1)
    assert torch.equal(k_NN, k_NN.mT)
    eigenvalues = torch.linalg.eigvalsh(k_NN.double())
    # Every entry is a float32 rounding of a positive semidefinite matrix's; each eigenvalue sums over N of them.
    assert eigenvalues[0] >= -n * torch.finfo(torch.float32).eps * eigenvalues[-1]


@on_kernels
@pytest.mark.usefixtures("poisoned")
def test_gram_is_the_gram_of_the_sample_grads():
    a, g = (kernels.spec.normal(20, 2, 3, size, dtype=torch.float32, device=DEVICE, seed=size) for size in (12, 7))
    j_NK = _fast("sample_grads")(a, g)
    factored, explicit = _fast("gram")([a], [g], [0], 1)[0], _fast("gram_rows")([j_NK], [0], 1)[0]
    truth = reference.gram([a.double()], [g.double()], [0], 1)[0]
    of_torch = error([cpu.gram_rows([j_NK], [0], 1)[0]], [truth])
    assert error([factored], [truth]) <= 2 * of_torch
    assert error([explicit], [truth]) <= 2 * of_torch


@on_kernels
@pytest.mark.usefixtures("poisoned")
def test_gram_in_rounds_is_the_gram_at_once(monkeypatch):
    spec = next(spec for spec in SPECS if spec.name == "gram")
    arguments = spec.examples["groups and positions"](torch.float32, DEVICE)
    monkeypatch.setattr(gram_ranges, "_PARTIAL_BYTES", 7 * 4 * 41 * 48)
    _assert_as_exact_as_torch(spec, arguments, run(spec, _kernel(spec), arguments), torch.float32)


@on_kernels
@pytest.mark.usefixtures("poisoned")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy warns of what is tested here
def test_cholesky_reports_failures_and_keeps_them_apart():
    n = 40
    good = 3.5 * torch.eye(n, device=DEVICE)
    indefinite, missing, singular = good.clone(), good.clone(), good.clone()
    indefinite[7, 7] = -2
    missing[20, 3] = torch.nan
    singular[n - 1, n - 1] = -0.5
    good[3, 20] = torch.nan  # above the diagonal, where nothing may be read
    k_LNN = torch.stack([indefinite, good, missing, singular])
    c_LNN, pivot_L = _fast("cholesky")(k_LNN, torch.full((4,), 0.5, device=DEVICE))
    assert pivot_L.tolist() == [-1, 4, -1, -1]
    assert torch.equal(c_LNN[1], 2 * torch.eye(n, device=DEVICE))


@elsewhere
def test_ops_reject_shapes_that_do_not_belong_together():
    x = torch.ones(3, 1, 1, 4)
    vector = torch.ones(5)
    for call in (
        lambda: kernels.gram([x, x[:2]], [x, x[:2]], [0, 1], 2),
        lambda: kernels.gram([x], [x[:2]], [0], 1),
        lambda: kernels.project([x], [x], [torch.ones(4, 1, 3)], [0], [1, 3]),
        lambda: kernels.project_rows([torch.ones(3, 4)], [torch.ones(5, 1, 1)], [0], [1, 3]),
        lambda: kernels.expand_update_(*[[x[0]]] * 3, [x], [x], [vector], [vector.sum()], [vector[:4]], False),
        lambda: kernels.expand_rows_update_(*[[x[0]]] * 3, [x[:, 0, 0]], [vector], [vector.sum()], [vector[:4]], False),
        lambda: kernels.conv_sample_grads(torch.ones(1, 1, 4, 4), torch.ones(2, 1, 4, 4), [1, 1], [1, 1], [1, 1], 1),
        lambda: kernels.cholesky(torch.ones(2, 3, 4), torch.ones(2)),
        lambda: kernels.cholesky_solve(torch.ones(2, 3, 3), torch.ones(2, 4)),
    ):
        with pytest.raises(ValueError, match=r"must have shape \(.*\), got \(.*\)"):
            call()
    with pytest.raises(ValueError, match="at least one layer, got none"):
        kernels.gram([], [], [], 0)
    with pytest.raises(ValueError, match="4 outputs need a padded input of 9 pixels or more, got 8"):
        kernels.conv_sample_grads(torch.ones(1, 1, 8, 9), torch.ones(1, 1, 4, 4), [3, 3], [2, 2], [1, 1], 1)


@elsewhere
@pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.name) for spec in SPECS if spec.config_names])
def test_op_rejects_an_unknown_configuration(spec):
    arguments = next(iter(spec.examples.values()))(torch.float32, DEVICE)
    names = ", ".join(map(repr, ("default", *spec.config_names)))
    with pytest.raises(ValueError, match=f"^config must be one of {names}, got 'fastest'$"):
        getattr(kernels, spec.name)(*arguments, config="fastest")
