"""Compiled residuals: the same steps, and one warning of what is not; and what a profiler shows of a step."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tengrad_triton import GaussNewton, laplacian
from tengrad_triton.residuals import compiling
from tengrad_triton.residuals.compiling import compiled


def made(**settings):
    torch.manual_seed(0)
    u = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer = GaussNewton(u, {"inside": lambda x: laplacian(u, x) + 1, "edge": u}, **settings)
    return u, optimizer, {"inside": torch.rand(30, 2).double(), "edge": torch.rand(8, 2).double()}


@pytest.mark.slow
def test_compiled_steps_are_the_plain_ones():
    (_, plain, points), (_, fast, _) = made(), made(compiled=True)
    for _ in range(10):
        assert float(fast.step(**points)) == pytest.approx(float(plain.step(**points)), rel=1e-7)
    assert {term.way for term in fast.summary().terms} == {"by layer"}


def test_what_cannot_be_compiled_is_named(monkeypatch):
    def fails(*_):
        raise NotImplementedError("no rule")

    monkeypatch.setattr(compiling, "_BACKEND", fails)
    with pytest.warns(UserWarning, match=r"the residual 'inside', which goes on without: .*no rule"):
        assert (call := compiled(torch.sin, "inside"))(x := torch.ones(1)) == x.sin()
    assert call(x) == x.sin()


def test_what_a_function_raises_is_raised_as_it_is():
    def fails(x):
        raise NotImplementedError("no rule")

    with pytest.raises(NotImplementedError, match="no rule"):
        compiled(fails, "inside")(torch.ones(1))


def test_a_profiler_shows_the_phases():
    _, optimizer, points = made()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        optimizer.step(**points)
    assert {"capture", "curvature", "solve"} <= {event.key for event in trace.key_averages()}
