#!/usr/bin/env bash
# transformers 5.24.0: BertForSequenceClassification and others take num_items_in_batch and leave it out of their loss.
# The Trainer relies on it and no longer divides by the number of micro-batches: with k of them the gradient, and the
# logged loss, are k times those of the whole batch.
#
# Seen with torch 2.13.0, accelerate 1.15.0, Python 3.11, on Linux x86-64 without a GPU, the norm of the gradient of one
# batch of eight, in one part, in two and in four, no dropout (the digits differ with the machine):
#
#     transformers 5.24.0
#     BertForSequenceClassification: 0.25, 0.50, 1.00; with model_accepts_loss_kwargs = False: 0.25, 0.25, 0.25
#     LlamaForSequenceClassification: 2.46, 4.93, 9.86; with model_accepts_loss_kwargs = False: 2.46, 2.46, 2.46
#     GPT2LMHeadModel: 1.48, 1.48, 1.48
#
# No error and no warning. AdamW hides most of it, clipping and SGD do not. BertForMaskedLM does the same. The losses of
# causal language models divide by num_items_in_batch.
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
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

transformers.utils.logging.set_verbosity_error()
print("transformers", transformers.__version__)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 20}
still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Norm(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()


def norms(make, labels, accepts=None):
    torch.manual_seed(1)
    ids = [torch.randint(1, 20, (6,)) for _ in range(8)]
    data = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": labels(x)} for x in ids]
    found = []
    for parts in (1, 2, 4):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            sys.argv[1], max_steps=1, per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts,
            max_grad_norm=0.0, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        )
        norm = Norm()
        trainer = Trainer(make(), arguments, train_dataset=data, callbacks=[norm])
        if accepts is not None:
            trainer.model_accepts_loss_kwargs = accepts
        trainer.train()
        found.append(norm.found)
    return found


def text(numbers):
    return ", ".join(f"{number:.2f}" for number in numbers)


def of_text(ids):
    return ids.sum() % 2


for make in (
    lambda: BertForSequenceClassification(BertConfig(**sizes, **still, classifier_dropout=0.0)),
    lambda: LlamaForSequenceClassification(LlamaConfig(**sizes, pad_token_id=0)),
):
    by_default, without = norms(make, of_text), norms(make, of_text, accepts=False)
    print(f"{type(make()).__name__}: {text(by_default)}; with model_accepts_loss_kwargs = False: {text(without)}")
    one, two, four = by_default
    assert abs(two / one - 2) < 1e-3 and abs(four / one - 4) < 1e-3
    assert max(without) / min(without) < 1.001
quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
config = GPT2Config(vocab_size=20, n_embd=32, n_layer=2, n_head=2, **quiet)
language = norms(lambda: GPT2LMHeadModel(config), torch.clone)
print(f"GPT2LMHeadModel: {text(language)}")
assert max(language) / min(language) < 1.001
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/check.py" "$folder/out" 2>/dev/null | grep -v "^{"
echo "as described"
