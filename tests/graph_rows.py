"""The oracle for any model and loop: rows by one backward pass for each sample through the graph of another forward."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from dense import batch_statistics, blocks_of
from one_step import Recording, natural
from torch.nn.modules.batchnorm import _BatchNorm

from tengrad_triton import TENGraD
from tengrad_triton.likelihoods import likelihood_of

ALPHA = 0.1
SETTINGS = {
    "lr": 1.0, "damping": ALPHA, "scaling": "none", "momentum": 0.0, "refresh_every": 1,
}  # fmt: skip


def optimizer_of(model, fisher, likelihood="categorical", **options):
    """Return a TENGraD whose step is −(F + α I)⁻¹ V, and the likelihood that keeps its labels."""
    drawn = Recording(likelihood_of(likelihood))
    chosen = likelihood if fisher == "exact" else drawn
    return TENGraD(model, likelihood=chosen, fisher=fisher, **{**SETTINGS, **options}), drawn


def rows_of_graph(model, seen, cotangents):
    """Return {name: [R·N, *shape]}: the gradients of every sample's rows, through the graph of the outputs ``seen``.

    ``cotangents`` are R lists of tensors shaped like ``seen``.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = {name: [] for name in named}
    for of_row in cotangents:
        for n in range(len(seen[0])):
            masked = [torch.zeros_like(cotangent) for cotangent in of_row]
            for mask, cotangent in zip(masked, of_row, strict=True):
                mask[n] = cotangent[n]
            options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            for name, grad in zip(
                named, torch.autograd.grad(seen, list(named.values()), masked, **options), strict=True
            ):
                rows[name].append(grad)
    return {name: torch.stack(of_name) for name, of_name in rows.items()}


def cotangents_of(fisher, seen, loss, likelihood, target, total):
    """Return R lists of derivatives [N, …] of the samples' own losses, or of the likelihood, with respect to ``seen``.

    ``loss`` is the caller's, of ``total`` samples in all its forwards.
    """
    if fisher == "empirical":
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        return [[total * grad for grad in torch.autograd.grad(loss, seen, **options)]]
    if fisher == "sampled":
        return [torch.autograd.grad(likelihood.nll(seen[0], target), seen, retain_graph=True)]
    factor_RN = likelihood.hessian_factor(seen[0])
    return [[factor] for factor in factor_RN * len(factor_RN) ** 0.5]


def dense_steps(blocks, rows, grads):
    """Return {name: (F + α I)⁻¹ V}, flat, for blocks of names, F = Jᵀ J / rows; names without rows are left out."""
    flat = {name: j.reshape(len(j), -1) for name, j in rows.items()}
    with_rows = [[name for name in block if name in rows] for block in blocks]
    solved = natural(flat, grads, [block for block in with_rows if block], ALPHA)
    return {name: step.flatten() for name, step in solved.items()}


def check_steps(
    make,
    batches,
    fisher,
    *,
    loss=F.cross_entropy,
    see=None,
    before=None,
    likelihood="categorical",
    mixes=False,
    **options,
):
    """Take a step for each batch; every parameter's has to be that of the dense solve with rows through the graph.

    Args:
        make: returns the model.
        batches: pairs of the model's input and a target.
        fisher: which rows.
        loss: of what the model returns and a target.
        see: from what the model returns to the tensor that the likelihood sees; by default all of it.
        before: called with the model, the optimizer and the number of the step before each forward.
        likelihood: a name.
        mixes: whether rows go through the statistics of batch norms.
        options: of the optimizer.
    """
    see = see or (lambda output: output)
    torch.manual_seed(0)
    model = make().double()
    optimizer, drawn = optimizer_of(model, fisher, likelihood, **options)
    for number, (x, y) in enumerate(batches):
        if before is not None:
            before(model, optimizer, number)
        optimizer.zero_grad()
        drawn.targets.clear()
        state = torch.get_rng_state()
        loss(model(x), y).backward()
        torch.set_rng_state(state)
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        detached = not mixes and any(isinstance(module, _BatchNorm) for module in model.modules())
        with unseen(optimizer), batch_statistics(model, x) if detached else nullcontext():
            output = model(x)
            seen = see(output)
            seen = [seen] if isinstance(seen, torch.Tensor) else list(seen)
            target = drawn.targets[0] if drawn.targets else None
            total = loss(output, y)
            if fisher == "empirical" and isinstance(output, torch.Tensor):  # what is seen may be a view of it
                cotangents = [[len(seen[0]) * see(torch.autograd.grad(total, output, retain_graph=True)[0])]]
            else:
                cotangents = cotangents_of(fisher, seen, total, likelihood_of(likelihood), target, len(seen[0]))
            rows = {name: j for name, j in rows_of_graph(model, seen, cotangents).items() if name in grads}
        optimizer.step()
        blocks = [list(rows)] if options.get("blocks") == "network" else blocks_of(model)
        assert_steps(model, old, dense_steps(blocks, rows, grads), f"step {number}")


def assert_steps(model, old, steps, when):
    """Raise unless every parameter has moved by its step, from ``old``, within 1e-9 of the step's own norm."""
    whole = torch.cat(list(steps.values())).norm()
    for name, expected in steps.items():
        actual = (old[name] - model.get_parameter(name).detach()).flatten()
        # A gradient that is zero but for rounding errors has no relative precision.
        error = ((actual - expected).norm() / torch.maximum(expected.norm(), 1e-6 * whole)).item()
        assert error < 1e-9, f"{when}, {name}: relative error {error:.1e}"


def unseen(optimizer):
    """Within the context, forwards of the model are not recorded."""
    return optimizer._capture._flags.own.set()
