#!/usr/bin/env bash
# torch 2.13.0: after torch.utils.swap_tensors, register_post_accumulate_grad_hook on a parameter has no effect.
#
# swap_tensors gives a parameter object another tensor implementation, which is how Module.to converts parameters where
# torch.__future__.set_swap_module_params_on_conversion(True) is set. The object keeps its dictionary of hooks, and the
# implementation that calls them has gone with the other object. A hook that is registered later is added to that
# dictionary, is returned with a handle, and is never called; nothing is said. It happens only to parameters that had
# such a hook before (even if it was removed since). A hook on the parameter's AccumulateGrad node, which
# torch.autograd.graph.get_gradient_edge returns, is called in both cases.
#
# Seen with torch 2.13.0, Python 3.11, on Linux x86-64 without a GPU:
#   had a hook before, swapped: on the parameter False, on its node True
#   had no hook before, swapped: on the parameter True, on its node True
#   had a hook before, not swapped: on the parameter True, on its node True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > "$folder/swap.py" <<'PYTHON'
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge


def called(had_hook, swaps):
    parameter = nn.Parameter(torch.ones(3))
    if had_hook:
        parameter.register_post_accumulate_grad_hook(lambda p: None).remove()
    if swaps:
        torch.utils.swap_tensors(parameter, nn.Parameter(torch.full((3,), 2.0)))
    seen = set()
    parameter.register_post_accumulate_grad_hook(lambda p: seen.add("parameter"))
    loss = (parameter * 3).sum()
    get_gradient_edge(parameter).node.register_hook(lambda *_: seen.add("node"))
    loss.backward()
    assert parameter.grad.tolist() == [3.0] * 3
    return f"on the parameter {'parameter' in seen}, on its node {'node' in seen}"


for had_hook, swaps in ((True, True), (False, True), (True, False)):
    title = f"had {'a' if had_hook else 'no'} hook before, {'swapped' if swaps else 'not swapped'}"
    print(f"{title}: {called(had_hook, swaps)}")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/swap.py" | tee "$folder/seen"
grep -qx "had a hook before, swapped: on the parameter False, on its node True" "$folder/seen"
grep -qx "had no hook before, swapped: on the parameter True, on its node True" "$folder/seen"
grep -qx "had a hook before, not swapped: on the parameter True, on its node True" "$folder/seen"
