"""Momenta and copies of a saved state as the parts of them that this process has (`fully_shard`).

`torch.optim` would take any tensor: a whole one, which no step can use, or the part of another rank, which has the
right size where a parameter divides evenly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from tengrad_triton.optim.state.wide import COPY, MOMENTUM
from tengrad_triton.sharding.tensors import is_sharded


def fitted_entries(
    state_dict: Mapping[str, Any], param_groups: Sequence[Mapping[str, Any]], names: Mapping[int, str]
) -> dict[Any, dict[str, Any]]:
    """Return the entries of a state, with momenta and copies that are whole cut to the parts of the parameters.

    Nothing is sent.

    Args:
        state_dict: the state, whose groups and sizes fit.
        param_groups: of the optimizer.
        names: those of the parameters, by id.

    Raises:
        ValueError: a momentum or a copy is the part of another rank, or of another number of ranks.
    """
    entries = {key: {**entry} for key, entry in state_dict["state"].items()}
    for parameter, index in _pairs(param_groups, state_dict["param_groups"]):
        entry = entries.get(index, {})
        for key in {MOMENTUM, COPY} & entry.keys():
            if isinstance(entry[key], Tensor):
                entry[key] = _fitted(entry[key], parameter, f"{key} of {names.get(id(parameter), index)!r}")
    return entries


def _pairs(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Tensor, Any]]:
    for group, saved in zip(groups, saved_groups, strict=True):
        yield from zip(group["params"], saved["params"], strict=True)


def _fitted(saved: Any, parameter: Any, name: str) -> Tensor:
    """Return a saved tensor as the part that belongs to a parameter's own part."""
    if not is_sharded(parameter):
        if is_sharded(saved):
            raise ValueError(f"the state's {name} is {_place(saved)}, but this parameter is whole; {_ADVICE}")
        return saved
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415 (slow, and imported already here)

    mesh, placements = parameter.device_mesh, parameter.placements
    if not is_sharded(saved):
        return distribute_tensor(saved.detach(), mesh, placements, src_data_rank=None)
    if _place_of(saved) != _place_of(parameter) or saved._local_tensor.shape != parameter._local_tensor.shape:
        raise ValueError(f"the state's {name} is {_place(saved)}, but this process has {_place(parameter)}; {_ADVICE}")
    size = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(saved._local_tensor, mesh, placements, run_check=False, **size)


_ADVICE = (
    "the file of a rank loads on that rank, of as many: use torch.distributed.checkpoint to go on with another number"
)


def _place_of(x: Any) -> tuple[Any, ...]:
    return tuple(x.device_mesh.get_coordinate() or ()), tuple(x.device_mesh.shape), tuple(x.placements)


def _place(x: Any) -> str:
    coordinate, sizes, placements = _place_of(x)
    return f"part {_plain(coordinate)} of {_plain(sizes)} with the placements {placements}"


def _plain(numbers: tuple[int, ...]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else str(numbers)
