#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint.load takes an optimizer itself, as it takes a model. A new AdamW gets its
# learning rates from it but none of its moments and step counts, although the checkpoint has them, and nothing is said.
#
# Seen with Python 3.11, on Linux x86-64 without a GPU, one process, AdamW after three steps of a small layer:
#
#     torch 2.13.0
#     in the checkpoint: optimizer.state.0.exp_avg, optimizer.state.0.exp_avg_sq, optimizer.state.0.step, and 3 more
#     a new model: equal; a new AdamW: lr 0.1, entries of 0 parameters; warnings about the optimizer: 0
#     an AdamW that took a step: exp_avg equal, step 3; its next step is that of the first one: True
#     a new AdamW, next step: that of the first one: False
#     a new AdamW by set_optimizer_state_dict: next step that of the first one: True
#
# Loading asks an object for its state_dict and fills what is there; a new optimizer has no entries yet, so there is
# nothing to fill, and names that only the checkpoint has are no error. The functions of checkpoint.state_dict make the
# entries first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
cat > "$folder/check.py" <<'PYTHON'
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

print("torch", torch.__version__.partition("+")[0])
folder = sys.argv[1]


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()


def made(steps, lr=0.1):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def loaded(steps):
    model, optimizer = made(steps, lr=0.7)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    return model, optimizer, [str(one.message) for one in said if "distributed is disabled" not in str(one.message)]


def same_next_step(model, optimizer):
    first, own = made(3)
    step(first, own)
    step(model, optimizer)
    return torch.equal(first.weight, model.weight)


warnings.simplefilter("ignore")
trained, of_trained = made(3)
dcp.save({"model": trained, "optimizer": of_trained}, checkpoint_id=folder)
kept = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
names = sorted(name for name in kept if "optimizer.state." in name)
print("in the checkpoint:", ", ".join(names[:3]) + f", and {len(names) - 3} more")
model, optimizer, said = loaded(0)
equal = torch.equal(model.weight, trained.weight)
print(
    f"a new model: {'equal' if equal else 'not equal'}; a new AdamW: lr {optimizer.param_groups[0]['lr']}, entries of "
    f"{len(optimizer.state)} parameters; warnings about the optimizer: {len(said)}"
)
assert equal and not optimizer.state and not said and optimizer.param_groups[0]["lr"] == 0.1
started, of_started, _ = loaded(1)
averages = of_started.state[started.weight], of_trained.state[trained.weight]
assert torch.equal(averages[0]["exp_avg"], averages[1]["exp_avg"])
said = f"an AdamW that took a step: exp_avg equal, step {averages[0]['step']:.0f}"
same = same_next_step(started, of_started)
print(f"{said}; its next step is that of the first one: {same}")
assert same
same = same_next_step(model, optimizer)
print("a new AdamW, next step: that of the first one:", same)
assert not same
other, of_other = made(0)
dcp.load({"model": other}, checkpoint_id=folder)
state = get_optimizer_state_dict(other, of_other)
dcp.save({"optimizer": get_optimizer_state_dict(trained, of_trained)}, checkpoint_id=f"{folder}/by-name")
dcp.load({"optimizer": state}, checkpoint_id=f"{folder}/by-name")
set_optimizer_state_dict(other, of_other, state)
same = same_next_step(other, of_other)
print("a new AdamW by set_optimizer_state_dict: next step that of the first one:", same)
assert same
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/check.py" "$folder/checkpoint" 2>/dev/null
echo "as described"
