"""The products of a step as a CPU takes them, each way against its definition, in double precision."""

import importlib

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tengrad_triton import TENGraD
from tengrad_triton.curvature.jacobian import PerSample

passes = importlib.import_module("tengrad_triton.kernels.cpu")
gram = importlib.import_module("tengrad_triton.kernels.gram")  # the attribute of that name is the op

# Small and large, with numbers of rows and columns that can be split in ranges and ones that cannot.
SIZES = [(5, 7), (32, 1 << 14), (33, 1 << 14), (32, (1 << 14) + 1), (33, (1 << 14) + 1)]


@pytest.fixture(autouse=True)
def _in_double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_both_products_of_one_matrix(n, k):
    j_NK, v, w_N = torch.randn(n, k), torch.randn(k, 1, 1), torch.randn(n)
    y_LN = torch.ones(2, n + 3)
    passes.add_projections_(y_LN, [j_NK], [v], [1])
    torch.testing.assert_close(y_LN[1, :n], 1 + j_NK.mv(v.flatten()))
    assert y_LN[0].eq(1).all()
    assert y_LN[1, n:].eq(1).all()
    ((t, combined_K),) = passes.combinations([j_NK], [w_N])
    assert t == 0
    torch.testing.assert_close(combined_K, j_NK.mT.mv(w_N))


@pytest.mark.parametrize("count", [2, passes._FEW, passes._FEW + 5])
@pytest.mark.parametrize("behind", [True, False], ids=["behind each other", "apart"])
def test_both_products_of_many_small_matrices(count, behind):
    j_TNK = torch.randn(count, 6, 10)
    j = list(j_TNK.unbind()) if behind else [x.clone() for x in j_TNK]
    others = [torch.randn(6, 11), torch.randn(4, 15)]  # of another size, and of as many entries in another shape
    j = [others[0], *j, others[1]]
    v = [torch.randn(x.shape[1], 1, 1) for x in j]
    v[1] = v[1].view(5, 2, 1)  # a parameter of as many entries
    w, rows = [torch.randn(len(x)) for x in j], [t % 3 for t in range(len(j))]  # several add to one row
    y_LN, expected = torch.zeros(3, 8), torch.zeros(3, 8)
    for x, entries, row in zip(j, v, rows, strict=True):
        expected[row, : len(x)] += x.mv(entries.flatten())
    passes.add_projections_(y_LN, j, v, rows)
    torch.testing.assert_close(y_LN, expected)
    combined = dict(passes.combinations(j, w))
    assert combined.keys() == set(range(len(j)))
    for t, x in enumerate(j):
        torch.testing.assert_close(combined[t], x.mT.mv(w[t]))


def test_matrices_out_of_order_are_no_batch():
    j = list(torch.randn(passes._FEW, 6, 10).unbind())
    assert passes._together(j).shape == (len(j), 6, 10)
    assert passes._together(j[::-1]) is None
    assert passes._together(j[::2]) is None
    assert passes._together([x.mT for x in j]) is None
    transposed = torch.randn(passes._FEW, 10, 6).mT
    assert passes._together(list(transposed.unbind())) is None


@pytest.mark.parametrize("outputs", [5, 6, 8])
@pytest.mark.parametrize(("groups", "positions"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_both_products_of_factors(groups, positions, outputs):
    a, g = torch.randn(9, groups, positions, 4), torch.randn(9, groups, positions, outputs)
    v_GOI, w_N = torch.randn(groups, outputs, 4), torch.randn(9)
    j_NGOI = torch.einsum("ngpo,ngpi->ngoi", g, a)
    torch.testing.assert_close(passes.projected_outer(a, g, v_GOI), (j_NGOI * v_GOI).sum((1, 2, 3)))
    torch.testing.assert_close(passes.combined_outer(a, g, w_N), torch.einsum("n,ngoi->goi", w_N, j_NGOI))


def deep() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(layer for _ in range(passes._FEW) for layer in (nn.Linear(6, 6), nn.Tanh())))


def two_steps(model: nn.Module, optimizer: TENGraD) -> None:
    torch.manual_seed(2)
    x, y = torch.randn(12, 6), torch.randint(6, (12,))
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def rows_of_biases(optimizer: TENGraD) -> list[PerSample]:
    return [block["bias"] for block in optimizer._curvature.jacobians.values()]


def test_a_refresh_lays_small_rows_of_one_size_side_by_side():
    """The step is that of rows which lie apart, also after a checkpoint has put them where they are."""
    models = [deep() for _ in range(3)]
    together, apart, resumed = (TENGraD(model, seed=0, refresh_every=10) for model in models)
    for model, optimizer in zip(models, (together, apart, resumed), strict=True):
        two_steps(model, optimizer)
    for rows in rows_of_biases(apart):
        object.__setattr__(rows, "j_NK", rows.j_NK.clone())
    resumed.load_state_dict(resumed.state_dict())
    for optimizer, lie_together in ((together, True), (apart, False), (resumed, True)):
        assert (passes._together([rows.j_NK for rows in rows_of_biases(optimizer)]) is not None) == lie_together
    for model, optimizer in zip(models, (together, apart, resumed), strict=True):
        two_steps(model, optimizer)
    for first, second, third in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(first, second)
        torch.testing.assert_close(first, third)


@pytest.mark.parametrize("size", [(127, 4096), (128, 4095), (128, 4096), (131, 4097), (515, 4098)])
def test_a_gram_matrix_in_slabs(size):
    """Slabs of rows up to the diagonal, where there are enough of them, are the whole product."""
    x_NK = torch.randn(size)
    torch.testing.assert_close(gram._squared(x_NK), x_NK @ x_NK.mT)
    k_NN = x_NK[:, :100] @ x_NK[:, :100].mT
    torch.testing.assert_close(gram._add_squared_(k_NN.clone(), x_NK), k_NN + x_NK @ x_NK.mT)
