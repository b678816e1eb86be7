"""Bytes of any number as a tensor: what a state has of the generator and of the curvature."""

from __future__ import annotations

import ctypes
import io
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from tengrad_triton.optim.state.copies import without_sharing


class Packed(Tensor):
    """Bytes of any number as a tensor, uint8 [bytes]: a plain tensor in files and copies, and an object for DCP.

    `torch.distributed.checkpoint` loads a tensor only into one of the same size, but an object always.
    """

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).cpu().__reduce_ex__(protocol)

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __create_write_items__(self, fqn: str, _: Any) -> list[Any]:
        """Tell `torch.distributed.checkpoint` to write an object."""
        from torch.distributed.checkpoint.metadata import MetadataIndex  # noqa: PLC0415 (not every torch has it)
        from torch.distributed.checkpoint.planner import WriteItem, WriteItemType  # noqa: PLC0415

        return [WriteItem(index=MetadataIndex(fqn), type=WriteItemType.BYTE_IO)]


def packed_of(nested: Any, device: torch.device) -> Packed:
    """Return nested tensors and plain values as bytes on a device; no bytes for None. Equal values give equal bytes."""
    if nested is None:
        return torch.empty(0, dtype=torch.uint8, device=device).as_subclass(Packed)
    file = io.BytesIO()
    torch.save(without_sharing(nested), file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8).to(device).as_subclass(Packed)


def unpacked_of(packed: Any) -> Any:
    """Return what `packed_of` packed, on the CPU; raises `ValueError` for anything else."""
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.dim() != 1:
        got = f"a tensor {packed.dtype} {tuple(packed.shape)}" if isinstance(packed, Tensor) else repr(packed)[:40]
        raise ValueError(f"expected bytes (a tensor of one dimension, torch.uint8), got {got}")
    if not packed.numel():
        return None
    own = packed.as_subclass(Tensor).cpu().contiguous()
    try:
        return torch.load(io.BytesIO(ctypes.string_at(own.data_ptr(), own.numel())), "cpu", weights_only=True)
    except Exception as error:  # of torch's reader of archives, of the unpickler, ...
        raise ValueError(f"its {own.numel()} bytes cannot be read ({str(error).partition('. ')[0]})") from error
