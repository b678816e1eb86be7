"""What rounding and compression of J do to a step: as much as docs/math.md says, and no more."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tengrad_triton import TENGraD
from tengrad_triton.curvature.jacobians.per_sample import PerSample

DAMPING = 0.05


def model_and_batch(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)),
    )
    return model.to(dtype), torch.randn(30, 2, 6, 6, dtype=dtype), torch.randint(3, (30,))


def one_step(representation, dtype=torch.float64, **options):
    """Return each parameter's natural gradient (lr 1, no momentum), its gradient, and the optimizer."""
    model, x, y = model_and_batch(dtype)
    settings = {"lr": 1.0, "damping": DAMPING, "momentum": 0.0, "weight_decay": 0.0, "seed": 0}
    optimizer = TENGraD.paper(model, representation=representation, **settings, **options)
    before = copy.deepcopy(dict(model.named_parameters()))
    F.cross_entropy(model(x), y).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    naturals = {name: (before[name] - p).detach() for name, p in model.named_parameters()}
    return naturals, grads, optimizer


def block_norm(tensors, block):
    return torch.cat([t.flatten() for name, t in tensors.items() if name.rpartition(".")[0] == block]).norm().item()


@pytest.mark.parametrize("tol", [0.5, 0.1, 0.01, 1e-3, 1e-6])
def test_compression_keeps_its_bound(tol):
    exact, grads, _ = one_step("per_sample")
    ours, _, optimizer = one_step("compressed", tol=tol)
    for block in optimizer._curvature.jacobians:
        difference = block_norm({name: ours[name] - exact[name] for name in exact}, block)
        assert difference <= tol * block_norm(grads, block) / DAMPING


def test_compression_saves_rows_and_converges_to_the_exact_step():
    ranks = []
    for tol in (0.5, 0.1, 0.01, 1e-12):
        naturals, _, optimizer = one_step("compressed", tol=tol)
        ranks.append(sum(len(rows["weight"].j_NK) for rows in optimizer._curvature.jacobians.values()))
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]
    exact, _, _ = one_step("per_sample")
    for name, natural in exact.items():
        assert torch.allclose(naturals[name], natural, rtol=1e-9, atol=1e-9 * natural.abs().max().item())


def test_compression_to_nothing_is_the_gradient_step():
    naturals, grads, optimizer = one_step({"5.weight": "compressed", "7.weight": "compressed"}, tol=1 - 1e-9)
    assert all(len(optimizer._curvature.jacobians[name]["weight"].j_NK) == 0 for name in ("5", "7"))
    for name in ("5.weight", "5.bias", "7.weight", "7.bias"):
        assert torch.allclose(naturals[name], grads[name] / DAMPING, rtol=1e-9)


def test_compressed_state_is_reused_and_resumed():
    model, x, y = model_and_batch()
    optimizer = TENGraD(model, representation="compressed", tol=0.1, refresh_every=2, seed=0)
    twin = copy.deepcopy(model)
    resumed = TENGraD(twin, representation="compressed", tol=0.1, refresh_every=2, seed=1)

    def step(net, opt):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()

    step(model, optimizer)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(model, optimizer)
        step(twin, resumed)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert any(choice.representation == "compressed" for choice in optimizer.choices().values())


def test_rounded_rows_are_the_same_in_every_product():
    """The step with J in bfloat16 is the exact one for the rounded J, up to float32's own error."""
    ours, grads, optimizer = one_step("per_sample_bf16", dtype=torch.float32)
    for block, rows in optimizer._curvature.jacobians.items():
        assert rows["weight"].representation == "per_sample_bf16"
        stored = torch.cat([part.j_NK.double() for part in rows.values()], 1)
        v = torch.cat([natural_order(grads[f"{block}.{label}"]) for label in rows])
        natural = torch.cat([natural_order(ours[f"{block}.{label}"]) for label in rows])
        exact, in_float32 = dense(stored, v.double()), dense(stored.float(), v)
        error = (natural - exact).norm()
        assert error <= 2 * (in_float32 - exact).norm()


def natural_order(tensor):
    """Flatten as J's rows are: a convolution's input channel last."""
    return (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).flatten()


def dense(j_NK, v_K):
    fisher = j_NK.mT @ j_NK / len(j_NK) + DAMPING * torch.eye(len(v_K), dtype=v_K.dtype)
    return torch.linalg.solve(fisher, v_K)


@pytest.mark.parametrize("tol", [0.0, 1.0, -1, "small", float("nan")])
def test_tol_out_of_range(tol):
    with pytest.raises(TypeError if isinstance(tol, str) else ValueError, match="tol must be"):
        TENGraD(model_and_batch()[0], tol=tol)


def test_half_of_the_memory():
    _, _, wide = one_step("per_sample", dtype=torch.float32)
    _, _, narrow = one_step("per_sample_bf16", dtype=torch.float32)

    def weights(optimizer):
        blocks = optimizer._curvature.jacobians
        return sum(blocks[name]["weight"].nbytes for name in by_sample)

    # In full precision a weight with fewer entries than samples is kept in as many rows as it has entries.
    by_sample = [name for name, rows in wide._curvature.jacobians.items() if rows["weight"].row_kind == "samples"]

    assert weights(narrow) * 2 == weights(wide)
    assert all(isinstance(rows["bias"], PerSample) for rows in narrow._curvature.jacobians.values())
