"""What steps of models of `fully_shard` send, counted by the system."""

import pytest
import several_processes
import torch
from distributed_cases import sharded
from traffic import numbers_of_factors

from studies.processes import counting
from tengrad_triton import TENGraD
from tengrad_triton.recipes.models import conv_3c1f

EVERY, SAMPLES, WIDTH = 3, 8, 16


def sent_by_steps(rank, count, options):
    """Return what each forward and backward and each step sends, and what our equations say of refresh and reuse."""
    torch.manual_seed(0)
    model = conv_3c1f((1, 28, 28), 10, WIDTH)
    refresh = 4 * (count - 1) * SAMPLES * numbers_of_factors(model)
    optimizer = TENGraD(sharded(model), refresh_every=EVERY, **options)
    x, y = torch.randn(SAMPLES, 1, 28, 28), torch.randint(10, (SAMPLES,))
    found = counting.sent_by_steps(model, optimizer, x, y, 2 * EVERY)
    blocks, rows = len(optimizer._curvature.blocks), optimizer._curvature.rows
    coupled = [
        -(-p.shape[0] // count) * p.shape[1:].numel()
        for name, p in model.named_parameters()
        if optimizer._curvature.scales and has_matrix_of_outputs(optimizer._curvature, name)
    ]
    reuse = 4 * (2 * (count - 1) / count * blocks * (rows + 1) + (count - 1) * sum(coupled))
    grams = 4 * 2 * (count - 1) / count * blocks * rows**2
    return found, refresh + grams + reuse, reuse


def has_matrix_of_outputs(curvature, name):
    layer, _, param_name = name.rpartition(".")
    return curvature.scales[layer][param_name].rows.basis_Gnn is not None


@pytest.mark.skipif(not counting.COUNTS.exists(), reason="the system counts no bytes")
@pytest.mark.parametrize("options", [{}, {"scaling": "none", "damping": 0.1}], ids=["defaults", "no D"])
@pytest.mark.parametrize("count", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (4, 8))])
def test_steps_send_what_the_equations_say(count, options):
    for found, refresh, reuse in several_processes.run(count, sent_by_steps, count, options):
        usual = min(passes for passes, _ in found[1:])
        for step, (passes, own) in enumerate(found[1:], 1):
            # The parameters that a refresh gathers after the forward are not gathered in its backward.
            assert passes <= 1.02 * usual
            assert own <= (1.1 * reuse + 1000 if step % EVERY else 1.1 * refresh)  # 1000: of heads of messages
