#!/usr/bin/env bash
# transformers 5.24.0: a Trainer that resumes a ViT from its own checkpoint loads none of the layers' weights. The file
# has them under other names than the model, and the resume takes what fits; the layers keep what they had.
#
# Seen with torch 2.13.0, accelerate 1.15.0, Python 3.11, on Linux x86-64 without a GPU, a ViT of two layers without
# dropout, AdamW at a constant rate, four steps and four more (the digits differ with the machine):
#
#     transformers 5.24.0
#     names in the checkpoint that the model has not: 32 of 40, such as vit.encoder.layer.0.attention.attention.key.bias
#     after the resume, before a step: 32 of 40 tensors are those of a new model
#     from_pretrained of the same folder: 0 of 40
#     parameters after eight steps, resumed at four, from those without a pause: 0.08; a BERT: 0.0
#
# The warning about names is at a level that train() shows beside others; loss and steps go on. save_pretrained writes
# the names of earlier versions, from_pretrained translates them back, and the Trainer reads the file by itself. A BERT,
# whose names are the same in both, resumes bit for bit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.3.5 transformers==5.24.0 accelerate==1.15.0
cat > "$folder/check.py" <<'PYTHON'
import sys

import torch
import transformers
from safetensors import safe_open
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

transformers.utils.logging.set_verbosity_error()
print("transformers", transformers.__version__)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
folder = sys.argv[1]


def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **sizes))


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, classifier_dropout=0.0, **sizes))


torch.manual_seed(1)
images = [{"pixel_values": torch.randn(1, 8, 8), "labels": torch.randint(3, ())} for _ in range(32)]
texts = [{"input_ids": torch.randint(20, (6,)), "labels": torch.randint(3, ())} for _ in range(32)]


def trainer(model, data, name, steps):
    arguments = TrainingArguments(
        f"{folder}/{name}", max_steps=steps, save_steps=4, report_to=[], use_cpu=True, learning_rate=1e-2,
        lr_scheduler_type="constant", disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=data)


def trained(make, data, name, steps, resume=None):
    made = trainer(make(), data, name, steps)
    made.train(resume_from_checkpoint=resume)
    return made.model


def apart(first, second):
    return max((x - y).abs().max().item() for x, y in zip(first.parameters(), second.parameters(), strict=True))


def as_new(model):
    new = vit().state_dict()
    return sum(torch.equal(value, new[name]) for name, value in model.state_dict().items())


differences = {}
for make, data in ((vit, images), (bert, texts)):
    name = make.__name__
    whole = trained(make, data, f"{name}-whole", 8)
    trained(make, data, name, 4)
    differences[name] = apart(whole, trained(make, data, name, 8, f"{folder}/{name}/checkpoint-4"))
with safe_open(f"{folder}/vit/checkpoint-4/model.safetensors", "pt") as file:
    kept = set(file.keys())
others = sorted(kept - vit().state_dict().keys())
print(f"names in the checkpoint that the model has not: {len(others)} of {len(kept)}, such as {others[0]}")
loading = trainer(vit(), images, "vit", 8)
loading._load_from_checkpoint(f"{folder}/vit/checkpoint-4")
count = len(vit().state_dict())
print(f"after the resume, before a step: {as_new(loading.model)} of {count} tensors are those of a new model")
loaded = as_new(ViTForImageClassification.from_pretrained(f"{folder}/vit/checkpoint-4"))
print(f"from_pretrained of the same folder: {loaded} of {count}")
print(
    "parameters after eight steps, resumed at four, from those without a pause: "
    f"{differences['vit']:.2f}; a BERT: {differences['bert']}"
)
assert len(others) == as_new(loading.model) == 32 and loaded == 0
assert differences["vit"] > 1e-3 and differences["bert"] == 0
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/check.py" "$folder" 2>/dev/null | grep -v "^{"
echo "as described"
