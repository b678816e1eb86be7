"""Rows by layer as one compiled graph, against those without one; what the graph depends on; when it is given up."""

import warnings
from concurrent.futures import ThreadPoolExecutor

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
    factor = [1.0]
    residual = lambda x: factor[0] * u(x)  # noqa: E731
    rows, parameters = compiled_by_layer(residual, "a"), list(u.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for factor[0] in range(1, 13):
            agrees(rows, residual, parameters, x)
    assert [str(warning.message) for warning in caught] == [
        "torch.compile failed on the residual 'a', which goes on without: it depends on something that differs from "
        "call to call: hold a number that changes in a tensor"
    ]


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
        residual = lambda x: u(x).sin()  # noqa: B023, E731
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


def test_what_has_no_graph_has_none_in_a_compiled_one():
    u, x = network(), points()

    def residual(x):
        with torch.no_grad():
            weights = u(x).square().exp()
        with torch.enable_grad():
            return weights * u(x)

    agrees(compiled_by_layer(residual, "a"), residual, list(u.parameters()), x)


def test_what_a_function_stores_is_stored():
    u, x, stored = network(), points(), {}

    def residual(x):
        stored["u"] = u(x)
        stored["r"] = stored["u"] * laplacian(u, x)
        return stored["r"]

    rows = compiled_by_layer(residual, "a")
    for _ in range(2):
        stored.clear()
        r, _ = rows(list(u.parameters()), (x,))
        assert torch.equal(stored["r"], r)
        torch.testing.assert_close(stored["u"], u(x).detach())
        agrees(rows, residual, list(u.parameters()), x)


def test_a_hook_that_is_added_later_is_called():
    u, x = network(), points()
    rows, evaluated = compiled_by_layer(u, "a"), compiling.compiled(u, "a")
    for _ in range(2):
        agrees(rows, u, list(u.parameters()), x)
        with torch.no_grad():
            torch.testing.assert_close(evaluated(x), u(x))
        u[1].register_forward_hook(lambda module, args, output: 2 * output)


def test_what_a_function_raises_is_raised_and_its_graph_is_kept():
    u, x, fails = network(), points(), [False]

    def residual(x):
        if fails[0]:
            raise ValueError("no such points")
        return u(x)

    rows, parameters = compiled_by_layer(residual, "a"), list(u.parameters())
    for fails[0] in (True, False, True, False):
        if fails[0]:
            with pytest.raises(ValueError, match="no such points"):
                rows(parameters, (x,))
        else:
            agrees(rows, residual, parameters, x)


def test_what_cannot_be_compiled_goes_on_after_one_warning():
    u, x = network(), points()
    residual = lambda x: u(x) * x.max().item()  # noqa: E731
    rows, parameters = compiled_by_layer(residual, "a"), list(u.parameters())
    with pytest.warns(UserWarning, match=r"'a', which goes on without: .*_local_scalar_dense"):
        agrees(rows, residual, parameters, x)
    agrees(rows, residual, parameters, x)


@pytest.mark.filterwarnings("default")  # torch may not be able to compile them
@pytest.mark.parametrize("name", ["torch.func", "cancelling", "coefficient", "autograd"])
def test_terms_of_other_ways_have_the_same_rows(name):
    case = CASES[name]()
    terms, parameters = Terms(case.model, {"a": case.residual}, None), list(case.model.parameters())
    points = terms.points_of({"a": case.points})["a"]
    expected = RowFinder(terms).of_term(terms.terms[0], parameters, points)
    finder = RowFinder(terms, compiles=True)
    for _ in range(3):
        close(finder.of_term(terms.terms[0], parameters, points), expected)
    assert finder.ways == {"a": case.way}


def test_no_level_of_forward_derivatives_outlives_an_error():
    def fails():
        with compiling._calling():
            torch._C._enter_dual_level()
            raise ValueError("within")

    with pytest.raises(ValueError, match="within"):
        fails()
    torch.func.jvp(torch.sin, (points(),), (points(),))  # raises within another level


def test_threads_compile_one_after_the_other():
    def found(network_of_thread):
        rows = compiled_by_layer(network_of_thread, "a")
        return rows(list(network_of_thread.parameters()), (x,))

    networks, x = [network() for _ in range(4)], points()
    with ThreadPoolExecutor(4) as pool:
        for u, rows in zip(networks, pool.map(found, networks), strict=True):
            close(rows, rows_by_layer(lambda u=u: u(x), list(u.parameters()), len(x)))


def test_rows_are_found_where_compilation_is_switched_off():
    u, x = network(), points()
    with torch.compiler.set_stance("force_eager"):
        agrees(compiled_by_layer(u, "a"), u, list(u.parameters()), x)


def test_what_begins_to_draw_random_numbers_is_compiled_no_more():
    u = nn.Sequential(nn.Linear(2, 8), nn.Dropout(), nn.Linear(8, 1)).double().eval()
    x, parameters = points(), list(u.parameters())
    terms = Terms(u, {"a": u}, None)
    finder = RowFinder(terms, compiles=True)
    for call in range(6):
        u.train(call >= 4)
        state = torch.get_rng_state()
        r, _ = finder.of_term(terms.terms[0], parameters, (x,))
        torch.set_rng_state(state)
        assert torch.equal(r, u(x).flatten())
        assert terms.is_compiled(terms.terms[0]) == (call < 4)


def test_a_finder_that_begins_anew_compiles_anew():
    u, x = network(), points()
    terms = Terms(u, {"a": u}, None)
    finder = RowFinder(terms, compiles=True)
    finder.of_term(terms.terms[0], list(u.parameters()), (x,))
    assert terms.is_compiled(terms.terms[0])
    finder.resume(dict(finder.ways))
    assert not terms.is_compiled(terms.terms[0])
    finder.of_term(terms.terms[0], list(u.parameters()), (x,))
    assert terms.is_compiled(terms.terms[0])


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
