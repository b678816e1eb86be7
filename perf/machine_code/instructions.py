"""Machine code as counts of instructions by kind.

ALL                         every instruction but padding
HGMMA, HMMA, UTCHMMA, MFMA  products on tensor cores, with the type of the operands where the instruction has it
FFMA, FFMA2                 one or two float32 multiply-adds of a thread
LDGSTS                      asynchronous copies from global to shared memory
LDG, STG                    loads from and stores to global memory; a suffix is the bits of a thread
LDL, STL                    loads and stores of spilled registers
BAR                         barriers of all threads of a program
"""

from __future__ import annotations

import re
from collections import Counter

_SASS = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)((?:\.\w+)*)", re.MULTILINE)
_WIDTHS = {"128": "128", "64": "64", "U16": "16", "S16": "16", "U8": "8", "S8": "8"}
TENSOR = ("HGMMA", "HMMA", "UTCHMMA", "MFMA")
"""The instructions of tensor cores."""
_TYPES = {"TF32", "BF16"}
_PLAIN = {"FFMA", "FFMA2", "LDL", "STL", "BAR"}


def count_sass(code: str) -> dict[str, int]:
    """Return the instructions of NVIDIA's machine code, as `nvdisasm` prints it, by kind."""
    kinds: Counter[str] = Counter()
    for name, suffixes in _SASS.findall(code):
        kinds["ALL"] += name != "NOP"
        modifiers = suffixes.split(".")
        if name in _PLAIN:
            kinds[name] += 1
        elif name in {"HGMMA", "HMMA"}:
            kinds[f"{name}.{next((x for x in modifiers if x in _TYPES), 'F16')}"] += 1
        elif name == "UTCHMMA":  # its operands' type is in a descriptor
            kinds[name] += 1
        elif name in {"LDGSTS", "LDG", "STG"}:
            kinds[f"{name}.{next((_WIDTHS[x] for x in modifiers if x in _WIDTHS), '32')}"] += 1
    return dict(sorted(kinds.items()))


_AMD = re.compile(r"^\s+([a-z]\w+)", re.MULTILINE)
_AMD_KINDS = (
    (re.compile(r"v_s?mfma\w*_x?([a-z]*\d+)(?:_1k)?$"), "MFMA.{}"),
    (re.compile(r"v_(?:fma|fmac|pk_fma)_f32"), "FFMA"),
    (re.compile(r"(?:global|buffer)_load_(\w+)"), "LDG.{}"),
    (re.compile(r"(?:global|buffer)_store_(\w+)"), "STG.{}"),
    (re.compile(r"scratch_load"), "LDL"),
    (re.compile(r"scratch_store"), "STL"),
    (re.compile(r"s_barrier"), "BAR"),
)
_AMD_WIDTHS = {"dword": "32", "dwordx2": "64", "dwordx3": "96", "dwordx4": "128", "ushort": "16", "short": "16"}


def count_amdgcn(code: str) -> dict[str, int]:
    """Return the instructions of AMD's machine code, as LLVM prints it, by kind."""
    kinds: Counter[str] = Counter()
    for name in _AMD.findall(code):
        kinds["ALL"] += name != "s_nop"
        for pattern, kind in _AMD_KINDS:
            if found := pattern.match(name):
                suffix = "".join(found.groups())
                kinds[kind.format(_AMD_WIDTHS.get(suffix, suffix.upper()))] += 1
    return dict(sorted(kinds.items()))
