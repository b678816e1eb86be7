"""Float32 products on tensor cores, in three parts of TF32, emulated: their error, and when a step may use them."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import Plan, TENGraD, compile_train_step, kernels
from tengrad_triton.curvature.choices import Choice
from tengrad_triton.kernels.spec import TF32X3
from tengrad_triton.tuning import measure
from tengrad_triton.tuning.plan import Measured
from tengrad_triton.tuning.precision import LEAST_DAMPING, TF32X3_ERROR, within_damping

N, K = 64, 400


def tf32(x):
    """What a tensor core reads of float32 numbers: it ignores the last 13 bits."""
    return (x.contiguous().view(torch.int32) & ~((1 << 13) - 1)).view(torch.float32)


def in_three_parts(x, y):
    """X Y as Triton's "tf32x3" computes it."""
    (x_high, x_low), (y_high, y_low) = ((tf32(z), tf32(z - tf32(z))) for z in (x, y))
    return x_low @ y_high + x_high @ y_low + x_high @ y_high


def step(j, v, damping, product):
    """(F + α I)⁻¹ V by the Woodbury identity with a relative damping, as `Curvature.step_` takes it, and α."""
    k_NN = product(j, j.mT)
    alpha = damping * max(1.0, k_NN.trace().item() / N)
    shifted = k_NN + N * alpha * torch.eye(N, dtype=j.dtype)
    w = torch.cholesky_solve(product(j, v[:, None]), torch.linalg.cholesky(shifted))
    return (v - product(j.mT, w)[:, 0]) / alpha


def rows(kind):
    generator = torch.Generator().manual_seed(0)
    j = torch.randn(N, K, generator=generator)
    if kind == "one direction":  # the largest eigenvalue is nearly the trace, and all errors have one sign
        j = j[:1].abs() * (1 + 1e-3 * j)
    if kind == "many scales":
        j = j * torch.logspace(0, -3, N)[:, None]
    return j, torch.randn(K, generator=generator)


@pytest.mark.parametrize("kind", ["alike", "one direction", "many scales"])
def test_the_error_of_a_product_is_as_declared(kind):
    j, v = rows(kind)
    for x, y in ((j, j.mT), (j, v[:, None]), (j.mT, j[:, :1])):
        error = (in_three_parts(x, y).double() - x.double() @ y.double()).norm()
        assert error <= TF32X3_ERROR * x.double().norm() * y.double().norm()


@pytest.mark.parametrize("damping", [1e3 * LEAST_DAMPING, 10 * LEAST_DAMPING, LEAST_DAMPING])
@pytest.mark.parametrize("kind", ["alike", "one direction", "many scales"])
def test_a_step_with_the_least_damping_is_as_exact_as_its_bound(kind, damping):
    """With |ΔK| ≤ e trace(K) and N α ≥ 8 e trace(K), the solution of K + N α I changes by at most a seventh."""
    j, v = rows(kind)
    truth = step(j.double(), v.double(), damping, torch.matmul)
    error = (step(j, v, damping, in_three_parts).double() - truth).norm() / v.norm()
    alpha = damping * max(1.0, j.double().square().sum().item() / N)
    assert error <= (8 * TF32X3_ERROR / damping) / 7 / alpha


@pytest.mark.parametrize(
    ("damping", "relative", "stays"),
    [(LEAST_DAMPING, True, True), (0.9 * LEAST_DAMPING, True, False), (1.0, False, False)],
)
def test_too_small_a_damping_takes_float32_kernels(damping, relative, stays):
    exact, coarse = Choice("per_sample", ("project_rows",)), Choice("factored", (f"gram:{TF32X3}", "project:small"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kept = within_damping({"exact": exact, "coarse": coarse}, damping, relative)
    assert kept == {"exact": exact, "coarse": coarse if stays else Choice("factored", ("project:small",))}
    assert [str(one.message).partition(": it")[0] for one in said] == (
        [] if stays else ["the plan's gram:tf32x3 for 'coarse' is not used"]
    )


PLANNED = ("expand_update_", "gram", "project")


def planned(model):
    """An optimizer of a layer of 6 inputs and 4 outputs, whose plan has `TF32X3` kernels for 8 samples."""
    seconds = {name: {"torch": 2.0, "triton": 1.0, TF32X3: 0.5} for name in PLANNED}
    plan = Plan({"N8 G1 P1 I6 O4 dense 32-bit": {"factored": Measured(seconds, 1)}})
    return TENGraD.unscaled(model, damping=1e-2, refresh_every=1, representation="factored", plan=plan)


def test_a_compiled_refresh_would_not_look_at_the_damping():
    model, x, y = nn.Sequential(nn.Linear(6, 4)), torch.randn(8, 6), torch.zeros(8, dtype=torch.long)
    optimizer = planned(model)
    optimizer.refresh_every = 2
    step = compile_train_step(model, F.cross_entropy, optimizer, backend="eager")
    for _ in range(2):
        step(x, y)
    assert step.why_plain == "the plan's tf32x3 kernels are allowed or not by the damping of each refresh"
    optimizer.param_groups[0]["damping"] = 1e-6
    with pytest.warns(UserWarning, match="needs relative_damping=True"):
        step(x, y)
    assert optimizer.choices()["0.weight"].kernel_overrides == ()
    step(x, y)  # reuses the curvature in float32


def test_the_damping_of_each_refresh_decides():
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(8, 6)
    optimizer = planned(model)

    def overrides(damping):
        optimizer.param_groups[0]["damping"] = damping
        F.cross_entropy(model(x), torch.zeros(8, dtype=torch.long)).backward()
        optimizer.step()
        return optimizer.choices()["0.weight"].kernel_overrides

    assert overrides(1e-2) == tuple(f"{name}:{TF32X3}" for name in PLANNED)
    with pytest.warns(UserWarning, match="needs relative_damping=True and a damping of at least 8e-06"):
        assert overrides(1e-6) == ()


def test_a_kernel_that_stores_nothing_is_dropped(monkeypatch):
    """The memory of its result may still hold that of an earlier kernel."""
    spec = next(spec for spec in kernels.SPECS if spec.name == "gram_rows")
    args = spec.examples["aligned and unaligned"](torch.float32, torch.device("cpu"))
    wrong = {"deep": torch.empty, TF32X3: lambda *shape: 1.01 * spec.torch_impl(*args)}

    def op(*args, config="default"):
        return (
            wrong[config](3, 70, 70) if config in wrong else spec.torch_impl(*args) * (1 + 5e-7 * (config == "small"))
        )

    monkeypatch.setattr(kernels, "gram_rows", op)
    before = torch.are_deterministic_algorithms_enabled()
    with pytest.warns(UserWarning, match="is dropped: its error is more than twice PyTorch's") as said:
        passed = measure._exact_configurations(spec, args)
    assert set(passed) == {"triton", "smallest"}
    assert len(said) == len(spec.config_names) - 1
    assert torch.are_deterministic_algorithms_enabled() == before
    wrong.clear()
    wrong[TF32X3] = lambda *shape: (1 + 5e-7) * spec.torch_impl(*args)
    with pytest.warns(UserWarning, match="small"):  # the same error, in a configuration that promises more
        assert set(measure._exact_configurations(spec, args)) == {"triton", "smallest", "deep", TF32X3}
