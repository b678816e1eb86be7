"""The rows of all ranks: each rank gets what the samples of the others contribute to J.

What travels are the contributions in their canonical form, not rows: the factors of a weight with I inputs and O
outputs have P (I + O) numbers a sample, its rows I O. All ranks then have the same contributions, in the same memory
layout, and compute the same curvature. A step needs no further messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.capture.outputs import map_tensors
from tengrad_triton.curvature.concat import MicroBatches, can_be_joined, join_batches
from tengrad_triton.curvature.contributions import Contributions, gather
from tengrad_triton.distributed.ranks import Ranks
from tengrad_triton.layers import PerSampleGrads
from tengrad_triton.sharding.tensors import local

ALIGNMENT = 64  # bytes: every tensor begins at a multiple of this in a message
ByLayer = Mapping[str, Mapping[str, MicroBatches]]


@dataclass(frozen=True)
class Message:
    """What a rank tells the others before it sends the numbers themselves.

    Attributes:
        failure: what went wrong on the rank; None if nothing did.
        missing: why some of its layers have no rows, by name.
        form: what is equal for contributions of the same layers, types and sizes.
        batch_rows: the rows of each of its micro-batches.
        size: how many bytes it sends.
    """

    failure: str | None
    missing: Mapping[str, str]
    form: str
    batch_rows: Sequence[int]
    size: int


def gather_from_all(
    ranks: Ranks, layers: Sequence[LayerParams], capture: Capture, release_calls: bool
) -> tuple[Contributions, dict[str, str]]:
    """Do what `contributions.gather` does, for the samples of all ranks, in the order of the ranks.

    A rank may have no samples, and a layer may be unused on some of the ranks: its rows are zero there.

    Raises:
        RuntimeError: a rank could not gather its own contributions. Every rank raises.
    """
    contributions, missing, error = Contributions({}), dict[str, str](), None
    if capture.records or not capture.was_empty:
        contributions, missing, error = _attempted(layers, capture, release_calls)
    shapes, own = packed(contributions.by_layer, next(p.device for one in layers for p in one.parameters.values()))
    messages = ranks.gathered(Message(_text_of(error), missing, form_of(shapes), contributions.batch_rows, len(own)))
    _raise_failures(messages, error)
    if not any(message.batch_rows for message in messages):
        raise RuntimeError(
            "the curvature is due for a refresh, but the batches of all ranks have 0 samples: take no step for them"
        )
    all_missing = {name: why for message in messages for name, why in message.missing.items()}
    flat_RB = ranks.gathered_bytes(own, max(message.size for message in messages))
    if len({message.form for message in messages}) == 1:  # one copy of each tensor joins the ranks
        return Contributions(dict(unpacked(shapes, flat_RB))), all_missing
    found = [unpacked(*of_rank) for of_rank in zip(ranks.gathered(shapes), flat_RB.split(1), strict=True)]
    return Contributions(joined_parts(found, messages, layers, all_missing)), all_missing


def gather_own(
    ranks: Ranks, layers: Sequence[LayerParams], capture: Capture, release_calls: bool
) -> tuple[Contributions, dict[str, str]]:
    """Do what `contributions.gather` does, for the samples of this rank, if all ranks can.

    Raises:
        RuntimeError: a rank could not gather its contributions. Every rank raises: the others would wait for its step.
    """
    contributions, missing, error = _attempted(layers, capture, release_calls)
    messages = ranks.gathered(Message(_text_of(error), {}, "", contributions.batch_rows, 0))
    _raise_failures(messages, error)
    return contributions, missing


def announce(ranks: Ranks, error: Exception) -> None:
    """Tell the ranks that wait in one of the functions above that this one has failed before."""
    ranks.gathered(Message(_text_of(error), {}, "", [], 0))


def _attempted(
    layers: Sequence[LayerParams], capture: Capture, release_calls: bool
) -> tuple[Contributions, dict[str, str], Exception | None]:
    """Return this rank's contributions, and why some layers have none; or the error."""
    try:
        return *gather(layers, capture, release_calls), None
    except Exception as error:
        return Contributions({}), {}, error


def _text_of(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


def _raise_failures(messages: Sequence[Message], error: Exception | None) -> None:
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message.failure is not None:
            raise RuntimeError(f"rank {rank} could not refresh the curvature, so no rank does: {message.failure}")


def packed(by_layer: ByLayer, device: torch.device) -> tuple[ByLayer, Tensor]:
    """Return contributions with tensors without entries, and the entries of all of them as bytes.

    What occurs several times, such as the input of several layers, is sent once.
    """
    shapes: dict[Hashable, Tensor] = {}
    kept: list[Tensor] = []

    def without_entries(x: Tensor) -> Tensor:
        # Layers have detached tensors of their own, in the same memory; a tensor without entries has a storage too.
        key = x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype
        if key not in shapes:
            kept.append(x)
            shapes[key] = torch.empty(x.shape, dtype=x.dtype, device="meta")
        return shapes[key]

    skeleton = map_tensors(without_entries, by_layer)
    flat = torch.zeros(sum(_room_of(x) for x in kept), dtype=torch.uint8, device=device)
    for part, x in zip(flat.split([_room_of(x) for x in kept]), kept, strict=True):
        part[: x.nbytes].view(x.dtype).copy_(x.detach().flatten())
    return skeleton, flat


def form_of(by_layer: ByLayer) -> str:
    """Return a text that is equal for contributions that `packed` described alike, with the same tensors shared."""
    places: dict[int, str] = {}

    def described(x: Tensor) -> str:
        return places.setdefault(id(x), f"{len(places)} {x.dtype} {list(x.shape)}")

    return hashlib.sha256(repr(map_tensors(described, by_layer)).encode()).hexdigest()


def unpacked(by_layer: ByLayer, flat_RB: Tensor) -> ByLayer:
    """Return the contributions that `packed` described, of some ranks in turn, from the bytes of each of them."""
    known: dict[int, Tensor] = {}
    at = 0

    def with_entries(x: Tensor) -> Tensor:
        nonlocal at
        if id(x) not in known:
            rows = flat_RB[:, at : at + x.nbytes].view(x.dtype).unflatten(1, x.shape)
            known[id(x)] = rows.flatten(0, 1).contiguous()
            at += _room_of(x)
        return known[id(x)]

    return map_tensors(with_entries, by_layer)


def _room_of(x: Tensor) -> int:
    return -(-x.nbytes // ALIGNMENT) * ALIGNMENT


def joined_parts(
    found: Sequence[ByLayer], messages: Sequence[Message], layers: Sequence[LayerParams], missing: Mapping[str, str]
) -> dict[str, Mapping[str, MicroBatches]]:
    """Return the contributions of all ranks by layer; zero rows where a rank did not use a layer."""
    in_turn: dict[str, Mapping[str, list[MicroBatches]]] = {}
    for layer in layers:
        params = next((own[layer.name] for own in found if layer.name in own), None)
        if params is None or layer.name in missing:
            continue
        in_turn[layer.name] = {
            param_name: _in_turn(
                [
                    _of_rank(own.get(layer.name), param_name, layer.parameters[param_name], message)
                    for own, message in zip(found, messages, strict=True)
                ]
            )
            for param_name in params
        }
    return _with_joined_batches(in_turn)


def _in_turn(of_ranks: Sequence[MicroBatches]) -> list[MicroBatches]:
    """Return the first micro-batches of all ranks, then the second ones: exact rows are in the order of one process."""
    return [[calls for calls in own if calls is not None] for own in zip_longest(*of_ranks)]


def _with_joined_batches(
    in_turn: Mapping[str, Mapping[str, list[MicroBatches]]],
) -> dict[str, Mapping[str, MicroBatches]]:
    """Return the micro-batches of all ranks as one where all layers allow that: one takes the host less time."""
    parameters = [own for params in in_turn.values() for own in params.values()]
    places = range(len(parameters[0]) if parameters else 0)
    joins = [all(can_be_joined(own[place]) for own in parameters) for place in places]

    def of_parameter(own: list[MicroBatches]) -> MicroBatches:
        batches: list[Any] = []
        for joins_them, of_ranks in zip(joins, own, strict=True):
            batches += [join_batches(of_ranks)] if joins_them else of_ranks
        return batches

    return {name: {key: of_parameter(own) for key, own in params.items()} for name, params in in_turn.items()}


def _of_rank(own: Mapping[str, Any] | None, param_name: str, parameter: Tensor, message: Message) -> MicroBatches:
    if own is not None:
        return own[param_name]
    like = local(parameter.detach())
    return [[PerSampleGrads(like.new_zeros(n, *parameter.shape))] for n in message.batch_rows]
