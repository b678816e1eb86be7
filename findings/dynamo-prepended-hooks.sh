#!/usr/bin/env bash
# torch 2.11.0: torch.compile fails on a module with two forward hooks that were registered with prepend=True.
#
# The hooks are objects of two classes. Dynamo makes a guard for an attribute of one hook and looks that attribute up on
# the other, as if prepending had not changed their order. Without prepend=True the same hooks compile, and with torch
# 2.13.0 both cases do. Prepended hooks are how a library sees a layer's output before the user's own hooks do; one
# prepended hook a module, which calls the others, works on every version.
#
# Seen with torch 2.11.0, Python 3.11, on Linux x86-64 without a GPU:
#   appended: the same as without compilation
#   prepended: InternalTorchDynamoError AttributeError: 'Shift' object has no attribute 'factor'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.11.0 numpy==2.3.5
cat > "$folder/hooks.py" <<'PYTHON'
import torch
from torch import nn


class Shift:
    def __init__(self, amount):
        self.amount = amount

    def __call__(self, layer, args, y):
        return y + self.amount


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, layer, args, y):
        return y * self.factor


def outcome(prepend):
    torch._dynamo.reset()
    layer, x = nn.Linear(4, 4), torch.randn(5, 4)
    for hook in (Shift(1.0), Scale(2.0)):
        layer.register_forward_hook(hook, prepend=prepend)
    try:
        result = torch.compile(layer, fullgraph=True, backend="eager")(x)
    except Exception as error:
        return f"{type(error).__name__} {str(error).splitlines()[0]}"
    return "the same as without compilation" if torch.allclose(result, layer(x)) else "something else"


print("appended:", outcome(prepend=False))
print("prepended:", outcome(prepend=True))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/hooks.py" | tee "$folder/seen"
grep -qx "appended: the same as without compilation" "$folder/seen"
grep -q "^prepended: InternalTorchDynamoError AttributeError: .* object has no attribute" "$folder/seen"
