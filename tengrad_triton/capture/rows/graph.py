"""What the autograd graph of a forward shows: the leaf tensors that it ends in, its structure, and routed samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_DETACHING = "_DetachedStatisticsBackward"  # it refers to a batch norm's parameters, which is no use of them
_REENTRANT = "CheckpointFunctionBackward"
# The operations that can mix samples in one forward and not in another one of the same structure: those that select
# entries by an index, that combine entries along a dimension, or that multiply by a matrix from the left. The numbers
# decide, such as an index that is sorted at first, or a weight of a mean that is zero. After each name: the attribute
# that tells along which dimension; an operation without one acts along all of them.
_MIXING = {
    **dict.fromkeys(("Index", "IndexPut"), "_saved_indices"),
    **dict.fromkeys(("IndexSelect", "IndexAdd", "IndexCopy", "Gather", "Scatter", "ScatterAdd", "Sort"), "_saved_dim"),
    **dict.fromkeys(("Roll", "Flip"), "_saved_dims"),
    **dict.fromkeys(("Take", "MaskedSelect"), ""),
    **dict.fromkeys(("Mean", "Sum", "Var", "Std", "VarMean", "StdMean", "Cumsum", "Cumprod", "Prod"), "_saved_dim"),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Logsumexp", "Amax", "Amin", "Max", "Min", "Norm"), "_saved_dim"),
    "LinalgVectorNorm": "_saved_dim",
}
_PRODUCTS = {"Mm": 1, "Addmm": 2}  # the place of the right factor among the arguments
_VIEWS = ("T", "Transpose", "Permute", "View", "ReshapeAlias", "UnsafeView", "ToCopy", "Unsqueeze", "Alias")
_LAST = 2**64 - 1  # how a node stores dimension -1


@dataclass(frozen=True)
class GraphWalk:
    """The result of one walk through the graph of some outputs.

    Attributes:
        leaves: how many edges end in each leaf tensor, by the leaf's id.
        structure: a number that is equal for graphs of the same operations in the same order, whatever their sizes.
        may_mix: whether an operation may mix samples here although it did not in another graph of the same structure.
        is_reentrant: whether a part is checkpointed with ``use_reentrant=True``.
        nodes: the nodes of the graph, without its leaves.
    """

    leaves: Counter[int]
    structure: int
    may_mix: bool
    is_reentrant: bool
    nodes: Container[Any]


def walk_graph(outputs: Sequence[Tensor], parameters: Iterable[Tensor], samples: int) -> GraphWalk:
    """Walk through the graph of ``outputs`` for ``samples`` samples.

    ``parameters`` give the leaves that they are numbers in the structure.
    """
    number_of = {id(p): index for index, p in enumerate(parameters)}
    leaves: Counter[int] = Counter()
    places: dict[Any, int] = {}
    trace: list[Any] = []
    may_mix, reentrant = False, False
    stack = [output.grad_fn for output in reversed(outputs)]
    while stack:
        node = stack.pop()
        if node is None or node in places:
            trace.append(places.get(node))
            continue
        places[node] = len(places)
        name = node.name()
        trace.append(name)
        may_mix = may_mix or _may_mix(node, name.partition("Backward")[0], samples)
        reentrant = reentrant or name == _REENTRANT
        for successor, place in node.next_functions:
            leaf = getattr(successor, "variable", None)
            if leaf is None:
                trace.append(place)
                stack.append(successor)
            else:
                trace.append(number_of.get(id(leaf), "leaf"))
                leaves[id(leaf)] += name != _DETACHING
    return GraphWalk(leaves, hash(tuple(trace)), may_mix, reentrant, places)


def _may_mix(node: Any, operation: str, samples: int) -> bool:
    """Whether the node can combine or select entries of the first dimension."""
    if operation in _PRODUCTS:
        return not _is_of_leaf(node.next_functions[_PRODUCTS[operation]][0])
    if operation == "Bmm":  # one product for each sample, or for some of each: attention
        factors = (getattr(node, name) for name in ("_saved_self", "_saved_mat2"))
        return any(x is not None and len(x) % samples for x in factors)
    attribute = _MIXING.get(operation)
    if not attribute or not hasattr(node, attribute):
        return attribute is not None
    dims = getattr(node, attribute)
    if attribute == "_saved_indices":  # an index for each of the first dimensions, None where there is none
        return dims[0] is not None
    dims = dims if isinstance(dims, tuple) else (dims,)
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    first = 2**64 - len(sizes) if sizes else None  # how a node stores the first dimension as a negative number
    # Without the sizes, any negative dimension but the last one may be the first.
    return not dims or any(dim in (None, 0) or (dim == first if sizes else 2**63 < dim < _LAST) for dim in dims)


def _is_of_leaf(node: Any) -> bool:
    """Whether a tensor is a constant, a leaf or a view of a leaf, such as the transposed weight of a linear layer."""
    while node is not None and not hasattr(node, "variable"):
        if node.name().partition("Backward")[0] not in _VIEWS:
            return False
        node = node.next_functions[0][0]
    return True
