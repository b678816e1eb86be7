"""Parameters that are `DTensor`s: whether they are, the part that this process has, and how they are cut.

Nothing here imports `torch.distributed.tensor`, which takes a second: without it there are no such parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a `DTensor`, of which this process has a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """Return the part of a tensor that this process has: the tensor itself where it is a plain one."""
    return x._local_tensor if is_sharded(x) else x  # type: ignore[attr-defined]


def check_not_sharded(named: Iterable[tuple[str, Any]]) -> None:
    """Raise `ValueError` if a parameter is a `DTensor`; they come with their names."""
    if any(is_sharded(p) for _, p in named):
        raise ValueError(
            "the parameters are DTensors, of which each process has a part (fully_shard, tensor parallelism): this "
            "needs whole parameters, as with DistributedDataParallel. TENGraD itself takes models of fully_shard"
        )


def check_of_model(named: Iterable[tuple[str, Any]], is_cut: bool) -> None:
    """Raise `ValueError` for placements that are not served, or parameters that are sharded unlike the model's."""
    named = list(named)
    check_placements(named)
    for name, p in named:
        if is_sharded(p) != is_cut:
            own, others = ("sharded", "are not") if is_sharded(p) else ("not sharded", "are")
            raise ValueError(
                f"{name} is {own}, but the model's parameters {others}: give the optimizer those that the model has "
                "after fully_shard, and not in a forward"
            )


def check_placements(named: Iterable[tuple[str, Any]]) -> None:
    """Raise `ValueError` unless no parameter is a `DTensor`, or all are, cut along their first dimension.

    They may be replicated along other dimensions of one mesh (HSDP).

    Args:
        named: parameters with their names.
    """
    found = list(named)
    sharded = [(name, p) for name, p in found if is_sharded(p)]
    if not sharded:
        return
    whole = [name for name, p in found if not is_sharded(p)]
    if whole:
        raise ValueError(
            f"{sharded[0][0]!r} is sharded, but {whole[0]!r} is not: call fully_shard(model) on the whole model too, "
            "after its layers, without ignored_params, so that every parameter is"
        )
    meshes = {p.device_mesh for _, p in sharded}
    if len(meshes) > 1:
        raise ValueError(f"the parameters are on {len(meshes)} meshes, expected one: {', '.join(map(str, meshes))}")
    for name, p in sharded:
        cut = [(dim, one) for dim, one in enumerate(p.placements) if not one.is_replicate()]
        if len(cut) != 1 or not cut[0][1].is_shard(0) or type(cut[0][1]).__name__ != "Shard":
            raise ValueError(
                f"{name!r} has the placements {p.placements}, expected one Shard(0), as fully_shard makes it: each "
                "rank has the curvature of its own outputs, so tensor-parallel plans and other cuts are not served"
            )
