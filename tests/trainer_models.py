"""Models of Hugging Face with two layers of width 32 or less, from configurations, and data for them."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY, TOKENS, CLASSES = 5, 6, 3
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(dropout=0.0):
    config = BertConfig(
        vocab_size=VOCABULARY, intermediate_size=24, max_position_embeddings=TOKENS, num_labels=CLASSES,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **SMALL,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def gpt2(dropout=0.0):
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=TOKENS, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(dropout=0.0):
    config = LlamaConfig(
        vocab_size=VOCABULARY, intermediate_size=24, num_key_value_heads=1, max_position_embeddings=TOKENS,
        attention_dropout=dropout, **SMALL,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def vit(dropout=0.0):
    config = ViTConfig(
        intermediate_size=24, image_size=8, patch_size=4, num_channels=1, num_labels=CLASSES,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **SMALL,
    )  # fmt: skip
    return ViTForImageClassification(config)


def sentences(count):
    """Return samples of tokens with one label each."""
    draws = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (count, TOKENS), generator=draws)
    return [{"input_ids": x, "labels": x.sum() % CLASSES} for x in tokens]


def texts(count):
    """Return samples of tokens, each of which is a label too; some are ignored."""
    found = []
    for place, sample in enumerate(sentences(count)):
        labels = sample["input_ids"].clone()
        labels[: place % 3] = -100
        found.append({"input_ids": sample["input_ids"], "labels": labels})
    return found


def images(count):
    """Return images [1, 8, 8] with one label each."""
    pixels = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [{"pixel_values": x, "labels": (x.sum() > 0).long()} for x in pixels]


MODELS = {"bert": (bert, sentences), "gpt2": (gpt2, texts), "llama": (llama, texts), "vit": (vit, images)}


def flat(model):
    """Return all parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
