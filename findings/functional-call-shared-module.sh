#!/usr/bin/env bash
# torch 2.13.0: torch.func.functional_call leaves a module that is at two places of a model with the tensor that was to
# replace its parameter for the call only. 2.11.0 and 2.14.1 do the same (pytorch/pytorch, issue 164759).
#
# Seen with torch 2.13.0, Python 3.11, on Linux x86-64 without a GPU:
#
#     torch 2.13.0
#     one place, ties on: the parameter is back
#     two places, ties on: a plain tensor is left, which model.parameters() returns
#     two places, one name, ties off: the parameter is back
#
# With ties, torch looks up every name of the replaced tensor, and swaps under each of them. A module at two places has
# two names for one slot: the second swap keeps the first replacement as what is to be put back. An optimizer that was
# made before then trains a Parameter that the model has lost. One name for each module, without ties, is put back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > "$folder/check.py" <<'PYTHON'
import torch
from torch import nn
from torch.func import functional_call

print("torch", torch.__version__.split("+")[0])


def after_a_call(model, owner, names, **options):
    before = owner.weight
    new = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name in names}
    functional_call(model, new, (torch.ones(2, 3),), **options)
    if owner.weight is before:
        return "the parameter is back"
    left = "a plain tensor is left" if type(owner.weight) is torch.Tensor else "something else is left"
    return left + (", which model.parameters() returns" if owner.weight is next(model.parameters()) else "")


def at_two_places():
    layer = nn.Linear(3, 3, bias=False)
    return nn.Sequential(nn.Sequential(layer, nn.Tanh()), nn.Sequential(layer, nn.Tanh())), layer


alone = nn.Linear(3, 3, bias=False)
print("one place, ties on:", after_a_call(nn.Sequential(alone), alone, {"0.weight"}))
print("two places, ties on:", after_a_call(*at_two_places(), {"0.0.weight"}))
print("two places, one name, ties off:", after_a_call(*at_two_places(), {"0.0.weight"}, tie_weights=False))
PYTHON
"$folder/venv/bin/python" "$folder/check.py" 2>/dev/null | tee "$folder/output"
diff "$folder/output" - <<'OUTPUT'
torch 2.13.0
one place, ties on: the parameter is back
two places, ties on: a plain tensor is left, which model.parameters() returns
two places, one name, ties off: the parameter is back
OUTPUT
echo "as described"
