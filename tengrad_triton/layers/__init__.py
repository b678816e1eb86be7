"""Layer types, and the canonical form into which a rule for each brings its calls. Nothing outside knows layer types.

A file a family of layers; `form` is what they all return, `support` what is known before a layer is called.
"""

from tengrad_triton.layers import attention, conv, dense, embedding, norm, recurrent  # they register their rules
from tengrad_triton.layers.form import (
    Call,
    Canonical,
    Explicit,
    Form,
    Lookup,
    Outer,
    Windows,
    canonical,
    canonical_rows,
    input_of,
    matrix_view,
)
from tengrad_triton.layers.statistics import frozen_scale, mixes_samples
from tengrad_triton.layers.support import (
    accounted_for,
    counts_uses,
    draws,
    drops_out,
    is_silent,
    may_draw,
    may_mix_samples,
    note_on,
    refuse_inexact,
    samples_dim,
    why_no_rule,
    why_no_samples,
)
from tengrad_triton.layers.within import rng_state

__all__ = [
    "Call",
    "Canonical",
    "Explicit",
    "Form",
    "Lookup",
    "Outer",
    "Windows",
    "accounted_for",
    "attention",
    "canonical",
    "canonical_rows",
    "conv",
    "counts_uses",
    "dense",
    "draws",
    "drops_out",
    "embedding",
    "frozen_scale",
    "input_of",
    "is_silent",
    "matrix_view",
    "may_draw",
    "may_mix_samples",
    "mixes_samples",
    "norm",
    "note_on",
    "recurrent",
    "refuse_inexact",
    "rng_state",
    "samples_dim",
    "why_no_rule",
    "why_no_samples",
]
