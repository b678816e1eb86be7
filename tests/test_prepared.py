"""Launches that are kept from call to call: they read the tensors of the present call, whatever changed since.

The tests run under Triton's interpreter (see `test_kernels.test_under_the_interpreter`) or on a GPU.
"""

import os
import threading
from functools import partial

import pytest
import torch
from kernel_checks import map_floats
from torch.utils._pytree import tree_leaves

from tengrad_triton import kernels
from tengrad_triton.kernels import launches, pointer_table
from tengrad_triton.kernels.update import example_numbers

HARDWARE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HARDWARE else "cpu")
pytestmark = pytest.mark.skipif(
    not HARDWARE and os.environ.get("TRITON_INTERPRET") != "1",
    reason="test_kernels.test_under_the_interpreter runs these",
)
normal = partial(kernels.spec.normal, dtype=torch.float32, device=DEVICE)
N, SIZES = 5, ((4, 8), (6, 3))  # outputs and inputs of two layers, of which one is aligned


def state(seed):
    return [normal(outputs, 1, inputs, seed=seed) for outputs, inputs in SIZES]


def rows():
    return [normal(N, outputs * inputs) for outputs, inputs in SIZES]


def factors():
    return [[normal(N, 1, 1, size[at], seed=at) for size in SIZES] for at in (1, 0)]


def numbers():
    return [list(x) for x in zip(*(example_numbers(N, DEVICE) for _ in SIZES), strict=True)]


# Arguments of the ops whose launches are kept, as small as the interpreter needs them.
SMALL = {
    "project": lambda: (*factors(), state(3), [0, 1], [2, N]),
    "project_rows": lambda: (rows(), state(3), [0, 1], [2, N]),
    "expand_update_": lambda: (state(3), state(4), state(5), *factors(), *numbers(), True),
    "expand_rows_update_": lambda: (state(3), state(4), state(5), rows(), *numbers(), True),
}
SPECS = [pytest.param(spec, id=spec.name) for spec in kernels.SPECS if spec.name in SMALL]


def offset(x):
    """The same entries at an address that is no multiple of 16."""
    storage = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].as_strided(x.shape, x.stride()).copy_(x)


def strided(x):
    """The same entries with others between them."""
    return torch.stack((x, torch.zeros_like(x)), -1)[..., 0]


def only(lists, change):
    """Apply a change to some of the lists."""

    def changed(arguments):
        return tuple(map_floats(change, x) if at in lists else x for at, x in enumerate(arguments))

    return changed


# What differs between two calls, and whether launches are prepared again, and whether addresses are written.
CHANGES = {
    "nothing": (lambda arguments: arguments, False, False),
    "values": (only(range(9), lambda x: x.mul_(0.5)), False, False),
    "one list": (only([1], torch.Tensor.clone), False, True),
    "all tensors": (only(range(9), torch.Tensor.clone), False, True),
    "an offset": (only([1], offset), True, True),
    "strides": (only([1], strided), True, True),
}


@pytest.fixture
def written(monkeypatch):
    """Nothing is kept from other tests; count the tables made and the writes of numbers."""
    monkeypatch.setattr(launches, "_kept", type(launches._kept)())
    counts = {"tables": 0, "writes": 0}
    make, write = pointer_table.Table.__init__, pointer_table._start

    def counted(name, function, *arguments, **options):
        counts[name] += 1
        return function(*arguments, **options)

    monkeypatch.setattr(pointer_table.Table, "__init__", lambda *given: counted("tables", make, *given))
    monkeypatch.setattr(pointer_table, "_start", partial(counted, "writes", write))
    return counts


def example(spec):
    return SMALL[spec.name]()


def result(spec, arguments):
    """What an op returns or changes, as copies; its arguments are as before."""
    before = map_floats(torch.Tensor.clone, arguments[: spec.mutates])
    returned = spec.triton_impl(*arguments)
    changed = tree_leaves(arguments[: spec.mutates] if spec.mutates else returned)
    copies = [x.clone() for x in changed]
    for x, old in zip(tree_leaves(arguments[: spec.mutates]), tree_leaves(before), strict=True):
        x.copy_(old)
    return copies


def expected(spec, arguments):
    with kernels.without_memory():
        return result(spec, arguments)


def assert_equal(found, wanted):
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("change", CHANGES)
def test_kept_launches_read_the_present_tensors(spec, change, written):
    changed, prepares, writes = CHANGES[change]
    arguments = example(spec)
    assert_equal(result(spec, arguments), expected(spec, arguments))
    arguments = changed(arguments)
    wanted = expected(spec, arguments)
    written.update(tables=0, writes=0)
    assert_equal(result(spec, arguments), wanted)
    assert (written["tables"] > 0, written["writes"] > 0) == (prepares, writes)


@pytest.mark.parametrize("spec", SPECS)
def test_a_table_whose_write_was_interrupted_is_written_again(spec, written, monkeypatch):
    first = example(spec)
    others = map_floats(torch.Tensor.clone, first)
    wanted = result(spec, first)
    change = pointer_table._change

    def interrupted(codes, table_FE):
        change([code if at % 2 == 0 else pointer_table._CODE_OF_ZERO for at, code in enumerate(codes)], table_FE)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pointer_table, "_change", interrupted)
        with pytest.raises(KeyboardInterrupt):
            result(spec, others)
    assert_equal(result(spec, others), wanted)
    assert_equal(result(spec, first), wanted)


def test_launches_are_not_kept_where_they_could_not_be_used_again(written, monkeypatch):
    spec = SPECS[0].values[0]
    *given, blocks, shape = example(spec)
    half = [map_floats(torch.Tensor.half, x) for x in given]
    result(spec, (*half, blocks, shape))  # they are widened: the kernel reads copies
    assert not launches._kept
    monkeypatch.setattr(launches, "_is_capturing", lambda device: True)
    result(spec, example(spec))
    assert not launches._kept


def test_captured_code_writes_the_table_that_it_reads(written, monkeypatch):
    spec = SPECS[0].values[0]
    arguments = example(spec)
    result(spec, arguments)
    written.update(tables=0, writes=0)
    monkeypatch.setattr(launches, "_is_capturing", lambda device: True)
    result(spec, arguments)
    assert written["tables"] > 0
    assert written["writes"] > 0


def test_threads_and_streams_have_their_own_tables(written, monkeypatch):
    spec = SPECS[0].values[0]
    arguments = example(spec)
    result(spec, arguments)
    thread = threading.Thread(target=result, args=(spec, arguments))
    thread.start()
    thread.join()
    assert len(launches._kept) == 2
    monkeypatch.setattr(launches, "_stream", lambda device: 7)
    result(spec, arguments)
    assert len(launches._kept) == 3


def test_few_launches_are_kept(written, monkeypatch):
    monkeypatch.setattr(launches, "_MOST", 2)
    calls = [(spec.values[0], example(spec.values[0])) for spec in SPECS]
    wanted = [expected(*call) for call in calls]
    for _ in range(2):
        for call, one in zip(calls, wanted, strict=True):
            assert_equal(result(*call), one)
    assert len(launches._kept) == 2


def test_tensors_of_several_devices_are_refused():
    spec = next(spec for spec in kernels.SPECS if spec.name == "project_rows")
    j, v, *rest = example(spec)
    spec.triton_impl(j, v, *rest)  # whose launches are kept
    with pytest.raises(TypeError, match=r"takes tensors of one device, in float32 or half precision; got .*'meta'"):
        spec.triton_impl(j, [v[0], v[1].to("meta")], *rest)
