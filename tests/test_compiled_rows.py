"""Rows by layer as one compiled graph, against those without one; what the graph depends on; when it is given up."""

import warnings

import pytest
import torch
from residual_cases import CASES, network, points
from torch import nn

from tengrad_triton import GaussNewton, laplacian
from tengrad_triton.residuals import compiling
from tengrad_triton.residuals.by_layer import NotByLayerError, rows_by_layer
from tengrad_triton.residuals.compiling import compiled_by_layer
from tengrad_triton.residuals.rows import RowFinder
from tengrad_triton.residuals.terms import Terms

TOLERANCE = 1e-13


@pytest.fixture(autouse=True)
def _traced_only(monkeypatch):
    """What Inductor makes of a graph is its own business, but for one test: it takes seconds."""
    torch.manual_seed(0)
    monkeypatch.setattr(compiling, "_BACKEND", "aot_eager")


def close(found, expected):
    for x, y in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert x.shape == y.shape
        assert (x - y).norm() <= TOLERANCE * (1 + y.norm())


CHANGING = {"noise", "dropout", "counted"}  # random numbers or buffers


@pytest.mark.filterwarnings("default")  # Dynamo makes what warns
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]().way == "by layer" and name not in CHANGING])
def test_rows_are_those_without_a_graph(name):
    case = CASES[name]()
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    rows = compiled_by_layer(case.residual, name)
    for _ in range(2):
        expected = rows_by_layer(lambda: case.residual(*case.points), parameters, len(case.points[0]))
        close(rows(parameters, case.points), expected)
        for p in parameters:
            p.data.mul_(1.1)


def scaled(u):
    """A residual that depends on a number which is no tensor, and the list that holds the number."""
    factor = [1.0]
    return factor, lambda x: factor[0] * laplacian(u, x) + u(x)


def agrees(rows, residual, parameters, x):
    close(rows(parameters, (x,)), rows_by_layer(lambda: residual(x), parameters, len(x)))


def test_a_number_that_changes_changes_the_rows():
    """As the weight of a term does in a curriculum: nothing of its value may stay in the graph."""
    u, x = network(), points()
    factor, residual = scaled(u)
    rows, parameters = compiled_by_layer(residual, "a"), list(u.parameters())
    for factor[0] in (1.0, 2.0, 1.0, -3.0):
        agrees(rows, residual, parameters, x)


def test_numbers_that_change_too_often_end_the_compilation_with_a_warning():
    u, x = network(), points()
    factor, residual = scaled(u)
    rows, parameters = compiled_by_layer(residual, "a"), list(u.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for factor[0] in range(1, 13):
            agrees(rows, residual, parameters, x)
    assert ["'a' are compiled no more" in str(warning.message) for warning in caught] == [True]


def test_only_some_numbers_of_points_have_graphs(monkeypatch):
    u, traced = network(), []
    original = compiling._RowsBackend._traced
    monkeypatch.setattr(
        compiling._RowsBackend, "_traced", lambda self, *args: traced.append(0) or original(self, *args)
    )
    _, residual = scaled(u)
    rows, parameters = compiled_by_layer(residual, "a"), list(u.parameters())
    for count in (3, 7, 5, 3, 2, 9, 7, 11):
        agrees(rows, residual, parameters, torch.rand(count, 2, dtype=torch.float64))
    assert len(traced) == 4


def test_a_single_point_has_rows_by_another_way():
    """There jets take one product for all positions, which uses the bias apart."""
    u, x = network(), points()[:1]
    _, residual = scaled(u)
    with pytest.raises(NotByLayerError):
        compiled_by_layer(residual, "a")(list(u.parameters()), (x,))


@pytest.mark.parametrize("name", sorted(CHANGING))
def test_what_draws_random_numbers_or_changes_buffers_is_not_compiled(name):
    case = CASES[name]()
    terms = Terms(case.model, {"a": case.residual}, None)
    finder, parameters = RowFinder(terms, compiles=True), list(case.model.parameters())
    for _ in range(2):
        finder.of_term(terms.terms[0], parameters, case.points)
    assert finder.ways == {"a": "by layer"}
    assert not terms.is_compiled(terms.terms[0])


def test_each_optimizer_has_its_own_graphs():
    """They share the code of their residual functions, by which Dynamo counts compilations."""
    for _ in range(10):
        u, x = network(), points()
        _, residual = scaled(u)
        agrees(compiled_by_layer(residual, "a"), residual, list(u.parameters()), x)


def test_parameters_that_a_term_does_not_use_have_rows_of_zeros():
    u, v, x = network(), nn.Linear(2, 1).double(), points()
    rows = compiled_by_layer(u, "a")((parameters := [*u.parameters(), *v.parameters()]), (x,))
    close(rows, rows_by_layer(lambda: u(x), parameters, len(x)))
    assert not rows[1][-1].any()


def test_a_parameter_that_is_frozen_has_no_rows_any_more():
    u, x = network(), points()
    rows, parameters = compiled_by_layer(u, "a"), list(u.parameters())
    agrees(rows, u, parameters, x)
    for frozen in (1, 2):  # biases
        parameters.pop(frozen).requires_grad_(False)
        agrees(rows, u, parameters, x)


def test_a_parameter_that_another_term_has_frozen_has_no_rows_any_more():
    u, v, x = network(), nn.Linear(2, 1).double(), points()
    rows = compiled_by_layer(u, "a")
    agrees(rows, u, [*u.parameters(), *v.parameters()], x)
    agrees(rows, u, [*u.parameters(), v.weight], x)


def test_steps_are_those_without_compilation():
    def made(compiled):
        torch.manual_seed(0)
        u = network()
        terms = {"inside": lambda x: laplacian(u, x) + 1, "edge": u, "mean": lambda x: u(x) * u[0].weight.sum()}
        return GaussNewton(u, terms, compiled=compiled)

    x, plain, fast = points(), made(False), made(True)
    for _ in range(8):
        given = {"inside": x, "edge": x[:3], "mean": x[:2]}
        assert float(fast.step(**given)) == pytest.approx(float(plain.step(**given)), rel=1e-7)
    assert [term.way for term in fast.summary().terms] == ["by layer", "by layer", "batched"]
