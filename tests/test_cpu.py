"""The tuned PyTorch code of the ops, on every path that it can take, against the definitions, in double precision."""

import importlib
from functools import partial

import pytest
import torch
from kernel_checks import assert_is_definition
from torch import nn
from torch.nn.functional import cross_entropy

from tengrad_triton import TENGraD, kernels
from tengrad_triton.curvature.jacobians.per_sample import PerSample

cpu, cpu_conv, cpu_update, conv_sample_grads, spec = (
    importlib.import_module(f"tengrad_triton.kernels.{name}")
    for name in ("cpu", "cpu_conv", "cpu_update", "conv_sample_grads", "spec")
)
CPU = torch.device("cpu")
SPECS = {op.name: op for op in kernels.SPECS}
LEAST_BATCH = cpu._LEAST_BATCH


def normal(*shape, seed=0):
    return spec.normal(*shape, dtype=torch.float64, device=CPU, seed=seed)


def adjacent(count, n, k):
    """J of some weights of one size, adjacent in memory."""
    return list(normal(count, n, k).unbind())


def weights_for(j, by=torch.clone):
    """A parameter, its momentum and its gradient for each J, with w, dampings and settings."""
    shapes = [(x.shape[1] // 2, 1, 2) if x.shape[1] % 2 == 0 else (x.shape[1], 1, 1) for x in j]
    state = [[by(normal(*shape, seed=seed)) for shape in shapes] for seed in (1, 2, 3)]
    w = [normal(len(x), seed=4) for x in j]
    return state, w, [torch.tensor(0.3, dtype=torch.float64)] * len(j)


def project_rows(j, blocks=None, shape=None):
    v = [normal(x.shape[1], 1, 1, seed=7) for x in j]
    return j, v, blocks or [0] * len(j), shape or [1, max(len(x) for x in j)]


def expand_rows(j, settings=(0.1, 0.9, 0.01, 0.0), nesterov=False, own=False, by=torch.clone):
    """``own``: whether every weight has its own settings tensor."""
    state, w, dampings = weights_for(j, by)
    numbers = torch.tensor(settings, dtype=torch.float64)
    return *state, j, w, dampings, [numbers.clone() if own else numbers for _ in j], nesterov


def expand(shape, nesterov=False):
    n, groups, positions, inputs, outputs = shape
    a, g = normal(n, groups, positions, inputs), normal(n, groups, positions, outputs, seed=1)
    state = [[normal(groups * outputs, 1, inputs, seed=seed)] for seed in (2, 3, 4)]
    numbers = torch.tensor([0.1, 0.9, 0.01, 0.02], dtype=torch.float64)
    return *state, [a], [g], [normal(n, seed=5)], [torch.tensor(0.3, dtype=torch.float64)], [numbers], nesterov


def project(shape):
    params, _, _, a, g, *_ = expand(shape)
    return a, g, params, [0], [1, shape[0]]


def conv(shape, outputs, kernel_size=(3, 3), stride=(1, 1), dilation=(1, 1), groups=1):
    sizes = ([*kernel_size], [*stride], [*dilation])
    return conv_sample_grads.conv_example(shape, outputs, *sizes, groups, dtype=torch.float64, device=CPU)


def transposed(x):
    """The same numbers in the layout of a transposed matrix."""
    return torch.empty_strided(x.shape, (1, x.numel(), len(x)), dtype=x.dtype).copy_(x)


def every_second(x):
    """The same numbers with gaps between them."""
    return torch.stack([x, x], -1)[..., 0]


# Sizes of J that divide into equal ranges, and sizes that do not; the first is too small for ranges.
SIZES = [(5, 7), (32, 1 << 14), (33, 1 << 14), (32, (1 << 14) + 1), (33, (1 << 14) + 1)]
# Sizes of X in X Xᵀ; the first three are too small for slabs of samples.
SLABS = [(63, 4096), (128, 4095), (255, 300), (128, 4096), (131, 4097), (257, 40), (515, 4098)]
FACTORS = [(9, groups, p, 4, outputs) for groups, p in ((1, 1), (1, 3), (2, 1), (2, 3)) for outputs in (5, 6, 8)]
SMALL = {
    "fewer than a batch": lambda: adjacent(LEAST_BATCH - 1, 6, 10),
    "a batch": lambda: adjacent(LEAST_BATCH, 6, 10),
    "apart": lambda: [x.clone() for x in adjacent(LEAST_BATCH, 6, 10)],
    # Other sizes; as many entries in another shape; and a J with fewer rows.
    "a batch and others": lambda: [normal(6, 11), *adjacent(LEAST_BATCH + 5, 6, 10), normal(4, 15), normal(3, 8)],
}
UPDATES = {
    "fused": {},
    "fused, nesterov": {"nesterov": True},
    "fused, decoupled weight decay": {"settings": (0.1, 0.9, 0.0, 0.02)},
    "without momentum": {"settings": (0.1, 0.0, 0.01, 0.0)},
    "both weight decays": {"settings": (0.1, 0.9, 0.01, 0.02)},
    "own settings": {"own": True},
    "transposed": {"by": transposed},
    "strided": {"by": every_second},
    "strided, nesterov": {"by": every_second, "nesterov": True},
}


def gram(n, k):
    return [normal(n, 1, 1, k)], [normal(n, 1, 1, 3)], [0], 1


def gram_rows(n, k):
    return [normal(n, k), normal(n, k, seed=1)], [0, 0], 1


def project_small(make):
    j = make()
    return project_rows(j, [t % 3 for t in range(len(j))], [3, 8])


def updates(options):
    return expand_rows([normal(6, 10), normal(5, 4)], **options)


CASES = {
    **{f"gram-slabs of {n} x {k}": partial(gram, n, k) for n, k in SLABS},
    **{f"gram_rows-slabs of {n} x {k}": partial(gram_rows, n, k) for n, k in SLABS},
    **{f"project_rows-{n} x {k}": partial(lambda *size: project_rows([normal(*size)]), n, k) for n, k in SIZES},
    **{f"project_rows-{name}": partial(project_small, make) for name, make in SMALL.items()},
    "project_rows-shorter": lambda: project_rows([normal(32, 1 << 14), normal(5, 3)], [2, 1], [3, 35]),
    **{f"expand_rows_update_-{n} x {k}": partial(lambda *size: expand_rows([normal(*size)]), n, k) for n, k in SIZES},
    **{f"expand_rows_update_-{name}": partial(lambda make: expand_rows(make()), make) for name, make in SMALL.items()},
    **{f"expand_rows_update_-{name}": partial(updates, options) for name, options in UPDATES.items()},
    "expand_rows_update_-large parameters": lambda: expand_rows([normal(3, 50_000) for _ in range(3)]),
    **{f"project-{shape}": partial(project, shape) for shape in FACTORS},
    **{f"expand_update_-{shape}": partial(expand, shape) for shape in FACTORS},
    "conv_sample_grads-unfolded": lambda: conv((20, 8, 4, 4), 6),
    "conv_sample_grads-unfolded, groups": lambda: conv((20, 8, 4, 5), 6, stride=(1, 2), groups=2),
    "conv_sample_grads-grouped": lambda: conv((20, 2, 9, 8), 3, dilation=(2, 1)),
    "conv_sample_grads-grouped, groups": lambda: conv((20, 4, 9, 8), 6, (2, 3), stride=(2, 1), groups=2),
}
IN_PARTS = [case for case in CASES if case.startswith(("conv_sample_grads", "project-", "expand_update_"))]


@pytest.mark.parametrize("case", CASES)
def test_tuned_code_is_the_definition(case):
    op = SPECS[case.partition("-")[0]]
    assert_is_definition(op, op.torch_impl, CASES[case]())


@pytest.mark.parametrize("case", IN_PARTS)
@pytest.mark.parametrize("threads", [1, 2])
def test_tuned_code_in_parts_is_the_definition(case, threads, set_threads, monkeypatch):
    """With small caches and several threads the same work goes in parts."""
    set_threads(threads)
    monkeypatch.setattr(cpu_conv, "_UNFOLDED_BYTES", 1 << 13)
    monkeypatch.setattr(cpu_conv, "_GROUPED_BYTES", 1 << 11)
    test_tuned_code_is_the_definition(case)


@pytest.mark.parametrize("case", ["groups and positions", "one position"])
def test_gram_in_slabs_of_samples_is_the_definition(case, monkeypatch):
    monkeypatch.setattr(cpu, "_PAIRS_AT_ONCE", 1000)
    op = SPECS["gram"]
    assert_is_definition(op, op.torch_impl, op.examples[case](torch.float32, CPU))


def test_a_gram_matrix_is_added_to_what_is_there():
    x_NK, y_NK = normal(131, 4097), normal(131, 100, seed=1)
    k_NN = y_NK @ y_NK.mT
    torch.testing.assert_close(cpu.add_gram_of_rows_(k_NN.clone(), x_NK), k_NN + x_NK @ x_NK.mT)


def test_projections_of_a_block_leave_the_rest_alone():
    y_LN = cpu.project_rows(*project_rows([normal(5, 7), normal(32, 1 << 14)], [1, 1], [3, 35]))
    assert y_LN[::2].eq(0).all()
    assert y_LN[1, 32:].eq(0).all()


def test_expansions_of_all_weights_are_there_once():
    j = SMALL["a batch and others"]()
    assert sorted(t for t, _ in cpu.expansions(j, [normal(len(x)) for x in j])) == list(range(len(j)))


def test_matrices_out_of_order_are_no_batch():
    j = adjacent(LEAST_BATCH, 6, 10)
    assert cpu.as_one_tensor(j).shape == (len(j), 6, 10)
    assert cpu.as_one_tensor(j[::-1]) is None
    assert cpu.as_one_tensor(j[::2]) is None
    assert cpu.as_one_tensor([x.mT for x in j]) is None
    assert cpu.as_one_tensor(list(normal(LEAST_BATCH, 10, 6).mT.unbind())) is None


@pytest.fixture
def _in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def deep() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(layer for _ in range(LEAST_BATCH) for layer in (nn.Linear(6, 6), nn.Tanh())))


def two_steps(model: nn.Module, optimizer: TENGraD) -> None:
    torch.manual_seed(2)
    x, y = torch.randn(12, 6), torch.randint(6, (12,))
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def rows_of_biases(optimizer: TENGraD) -> list[PerSample]:
    return [block["bias"] for block in optimizer._curvature.jacobians.values()]


@pytest.mark.usefixtures("_in_double")
def test_a_refresh_lays_small_rows_of_one_size_side_by_side():
    """The step equals that with rows which are not adjacent in memory, also after a checkpoint was loaded."""
    models = [deep() for _ in range(3)]
    together, apart, resumed = (TENGraD(model, seed=0, refresh_every=10) for model in models)
    for model, optimizer in zip(models, (together, apart, resumed), strict=True):
        two_steps(model, optimizer)
    for rows in rows_of_biases(apart):
        object.__setattr__(rows, "j_NK", rows.j_NK.clone())
    resumed.load_state_dict(resumed.state_dict())
    for optimizer, are_adjacent in ((together, True), (apart, False), (resumed, True)):
        assert (cpu.as_one_tensor([rows.j_NK for rows in rows_of_biases(optimizer)]) is not None) == are_adjacent
    for model, optimizer in zip(models, (together, apart, resumed), strict=True):
        two_steps(model, optimizer)
    for first, second, third in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(first, second)
        torch.testing.assert_close(first, third)
