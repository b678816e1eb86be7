"""Every way finds the rows of a residual function: one `torch.autograd.grad` for each residual of the whole batch."""

import warnings

import pytest
import torch
from residual_cases import CASES, Case, network, points, slope
from torch import nn

from tengrad_triton.residuals.expanded import NotExpandableError
from tengrad_triton.residuals.rows import WAYS, RowFinder
from tengrad_triton.residuals.terms import Terms

TOLERANCE = 1e-9


def made(name):
    torch.manual_seed(0)
    case = CASES[name]()
    return case, [p for p in case.model.parameters() if p.requires_grad]


def one_by_one(case, parameters):
    """Return the residuals and, for each of them, its gradient, [R, k] of each parameter."""
    r = case.residual(*(x.clone().requires_grad_(x.requires_grad) for x in case.points))
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    grads = [torch.autograd.grad(entry, parameters, **options) for entry in r.flatten()]
    return r.detach().flatten(), [torch.stack([g.flatten() for g in part]) for part in zip(*grads, strict=True)]


def surroundings(model):
    return torch.get_rng_state(), [b.clone() for b in model.buffers()]


def assert_equal(found, expected):
    r, rows = expected
    assert (found[0].flatten() - r).norm() <= TOLERANCE * r.norm()
    size = sum(j.norm() for j in rows)
    for j, wanted in zip(found[1], rows, strict=True):
        assert (j.reshape(wanted.shape) - wanted).norm() <= TOLERANCE * size


def quietly(call):
    """Return what a function returns, and whether it warned that its way is slow."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, any("one backward pass for each residual" in str(w.message) for w in caught)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_single_backward_passes(name):
    case, parameters = made(name)
    expected = one_by_one(case, parameters)
    after = surroundings(case.model)
    case, parameters = made(name)
    terms = Terms(case.model, {"a": case.residual}, None)
    finder = RowFinder(terms)
    given = terms.points_of({"a": case.points})["a"]
    found, warned = quietly(lambda: finder.of_term(terms.terms[0], parameters, given))
    assert finder.ways == {"a": case.way}
    assert warned == (case.way == "backward")
    assert_equal(found, expected)
    assert found[0].dim() == 1
    assert all(j.shape == (len(found[0]), *p.shape) for j, p in zip(found[1], parameters, strict=True))
    assert not any(x.requires_grad for x in (found[0], *found[1]))
    now = surroundings(case.model)  # of one evaluation
    assert torch.equal(now[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(now[1], after[1], strict=True))
    assert all(p.grad is None and p.requires_grad for p in parameters)


@pytest.mark.parametrize("name", CASES)
def test_every_way_after_the_first_that_serves_finds_the_same_rows(name):
    """A way before that one may be wrong; which is why rows are compared."""
    case, parameters = made(name)
    expected = one_by_one(case, parameters)
    order = list(WAYS)
    for way in order[order.index(case.way) :]:
        case, parameters = made(name)
        terms = Terms(case.model, {"a": case.residual}, None)
        finder = RowFinder(terms)
        finder.resume({"a": way})
        given = terms.points_of({"a": case.points})["a"]
        assert_equal(quietly(lambda: finder.of_term(terms.terms[0], parameters, given))[0], expected)  # noqa: B023


@pytest.mark.parametrize("name", ["laplacian", "several outputs", "matrices", "several inputs"])
def test_rows_of_many_points_are_found_in_parts(name, monkeypatch):
    monkeypatch.setattr("tengrad_triton.residuals.ways._CHUNK_BYTES", 2000)
    case, parameters = made(name)
    found = WAYS["batched"](case.model, case.residual)(parameters, case.points)
    assert_equal(found, one_by_one(case, parameters))


def test_a_residual_that_changes_is_found_out_at_a_power_of_two():
    """It mixes points from its third call on."""
    torch.manual_seed(0)
    u, mixes = network(), []
    terms = Terms(u, {"a": lambda x: u(x) - u(x).mean() if mixes else u(x)}, None)
    finder, x, parameters = RowFinder(terms), (points(),), list(u.parameters())
    finder.of_term(terms.terms[0], parameters, x)
    finder.of_term(terms.terms[0], parameters, x)
    assert finder.ways == {"a": "by layer"}
    mixes.append(True)
    finder.of_term(terms.terms[0], parameters, x)
    _, warned = quietly(lambda: finder.of_term(terms.terms[0], parameters, x))
    assert warned
    assert finder.ways == {"a": "backward"}


def test_another_number_of_points_is_proven_too():
    """As many points as positions: a way that took positions for points would give wrong rows."""
    torch.manual_seed(0)
    u, others = nn.Linear(2, 3).double(), torch.rand(5, dtype=torch.float64)

    def residual(x):
        x = x.requires_grad_()
        return slope(lambda x: u(x).sin(), x)[..., 0] * (others * u.weight.sum()).sum()

    for function in (residual, lambda x: u(x).tanh().mean((1, 2)), lambda x: u(x).sum(2) * others):
        terms = Terms(u, {"a": function}, None)
        finder, parameters = RowFinder(terms), list(u.parameters())
        for count in (7, 7, 5, 1, 5, 7):
            x = (torch.rand(count, 5, 2, dtype=torch.float64),)
            expected = one_by_one(Case(u, function, "", x), parameters)
            assert_equal(quietly(lambda: finder.of_term(terms.terms[0], parameters, x))[0], expected)  # noqa: B023


def test_rows_that_are_not_finite_prove_nothing():
    torch.manual_seed(0)
    u, factor = network(), [float("nan")]
    terms = Terms(u, {"a": lambda x: (u(x) - u(x).mean()) * factor[0]}, None)
    finder, x, parameters = RowFinder(terms), (points(),), list(u.parameters())
    for _ in range(3):
        finder.of_term(terms.terms[0], parameters, x)
        assert finder.ways == {"a": "by layer"}
    factor[0] = 1.0
    _, warned = quietly(lambda: finder.of_term(terms.terms[0], parameters, x))
    assert warned


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, AssertionError])
def test_errors_that_say_nothing_about_a_way_do_not_change_it(error):
    torch.manual_seed(0)
    u, raising = network(), [True]

    def residual(x):
        if raising and torch._C._functorch.maybe_current_level() is not None:
            raise error
        return u(x) * u[0].weight.sum()

    terms = Terms(u, {"a": residual}, None)
    finder, x, parameters = RowFinder(terms), (points(),), list(u.parameters())
    with pytest.raises(error):
        finder.of_term(terms.terms[0], parameters, x)
    raising.clear()
    finder.of_term(terms.terms[0], parameters, x)
    assert finder.ways == {"a": "batched"}


def test_what_cannot_be_expanded_says_so():
    u = network()
    rows = WAYS["expanded"](u, lambda x: u(x).sum())
    with pytest.raises(NotExpandableError, match="one or more a point"):
        rows(list(u.parameters()), (points(),))
