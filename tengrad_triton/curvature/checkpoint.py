"""The curvature as plain tensors and numbers, so that a checkpoint loads with ``torch.load(weights_only=True)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.curvature.build import unpack
from tengrad_triton.curvature.choices import OpsFor
from tengrad_triton.curvature.grouped import side_by_side
from tengrad_triton.curvature.woodbury import Curvature, Stack


def pack_curvature(curvature: Curvature) -> dict[str, Any]:
    """Return a curvature as nested dictionaries of tensors and numbers."""
    blocks = {name: {label: rows.pack() for label, rows in block.items()} for name, block in curvature.blocks.items()}
    return {
        "blocks": blocks,
        "systems": {system: list(names) for system, names in curvature.systems.items()},
        "stacks": [{"systems": list(s.systems), "inverse_LNN": s.inverse_LNN} for s in curvature.stacks],
        "window": list(curvature.window),
        "damping_L": curvature.damping_L,
        "failures_L": curvature.failures_L,
    }


def unpack_curvature(packed: Mapping[str, Any], blocks: Sequence[LayerParams], ops_for: OpsFor) -> Curvature:
    """Return the curvature that `pack_curvature` described, on the devices of the parameters of ``blocks``.

    Raises:
        ValueError: it belongs to other blocks than these.
    """
    known = {block.name: block for block in blocks}
    strangers = [name for name in packed["blocks"] if name not in known]
    if strangers:
        raise ValueError(
            f"the state holds curvature of {', '.join(strangers)}, and this optimizer's blocks are "
            f"{', '.join(known) or 'none'}: it was saved for another model"
        )
    restored, device = {}, torch.device("cpu")
    for name, rows in packed["blocks"].items():
        parameters = known[name].parameters
        restored[name] = {label: unpack(packed_rows, parameters[label], ops_for) for label, packed_rows in rows.items()}
        device = next(iter(parameters.values())).device
    stacks = [Stack(tuple(stack["systems"]), stack["inverse_LNN"].to(device)) for stack in packed["stacks"]]
    numbers = (packed[name].to(device) for name in ("damping_L", "failures_L"))
    return Curvature(side_by_side(restored), packed["systems"], stacks, tuple(packed["window"]), *numbers)
