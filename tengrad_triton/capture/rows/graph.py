"""What the autograd graph of a forward shows: the leaf tensors that it ends in, its structure, and routed samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_DETACHING = "_DetachedStatisticsBackward"  # it refers to a batch norm's parameters, which is no use of them
_REENTRANT = "CheckpointFunctionBackward"
# The nodes that can route samples to others by numbers that are not part of the graph's structure, such as an index,
# and the attributes that tell along which dimension they do. Nodes without such an attribute do it along all of them.
_ROUTING = {
    **dict.fromkeys(("Index", "IndexPut"), "_saved_indices"),
    **dict.fromkeys(("IndexSelect", "IndexAdd", "IndexCopy", "Gather", "Scatter", "ScatterAdd", "Sort"), "_saved_dim"),
    **dict.fromkeys(("Roll", "Flip"), "_saved_dims"),
    **dict.fromkeys(("Take", "MaskedSelect"), ""),
}
_LAST = 2**64 - 1  # how a node stores dimension -1


@dataclass(frozen=True)
class GraphWalk:
    """The result of one walk through the graph of some outputs.

    Attributes:
        leaves: how many edges end in each leaf tensor, by the leaf's id.
        structure: a number that is equal for graphs of the same operations in the same order, whatever their sizes.
        routes_samples: whether an operation selects entries of its first dimension by an index. Which samples it mixes
            can differ between two graphs of the same structure.
        is_reentrant: whether a part is checkpointed with ``use_reentrant=True``.
    """

    leaves: Counter[int]
    structure: int
    routes_samples: bool
    is_reentrant: bool


def walk_graph(outputs: Sequence[Tensor], parameters: Iterable[Tensor]) -> GraphWalk:
    """Walk through the graph of ``outputs``; ``parameters`` give the leaves that they are numbers in the structure."""
    number_of = {id(p): index for index, p in enumerate(parameters)}
    leaves: Counter[int] = Counter()
    places: dict[Any, int] = {}
    trace: list[Any] = []
    routes, reentrant = False, False
    stack = [output.grad_fn for output in reversed(outputs)]
    while stack:
        node = stack.pop()
        if node is None or node in places:
            trace.append(places.get(node))
            continue
        places[node] = len(places)
        name = node.name()
        trace.append(name)
        routes = routes or _routes_samples(node, name)
        reentrant = reentrant or name == _REENTRANT
        for successor, place in node.next_functions:
            leaf = getattr(successor, "variable", None)
            if leaf is None:
                trace.append(place)
                stack.append(successor)
            else:
                trace.append(number_of.get(id(leaf), "leaf"))
                leaves[id(leaf)] += name != _DETACHING
    return GraphWalk(leaves, hash(tuple(trace)), routes, reentrant)


def _routes_samples(node: Any, name: str) -> bool:
    """Whether the node selects entries of the first dimension."""
    attribute = _ROUTING.get(name.partition("Backward")[0])
    if not attribute:
        return attribute is not None
    dims = getattr(node, attribute)
    if attribute == "_saved_indices":  # an index for each of the first dimensions, None where there is none
        return dims[0] is not None
    # Any other negative dimension may be the first: how many dimensions there are is not known here.
    return any(dim == 0 or 2**63 < dim < _LAST for dim in (dims if isinstance(dims, tuple) else (dims,)))
