"""For which batches, and which state of the model, a compiled function was made; and for which ones one is made.

A compiled function has fixed sizes. To compile costs as much as thousands of steps, so it has to pay: see `Prepared`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from tengrad_triton.capture.blocks import LayerParams
from tengrad_triton.compiled.graphs import STATIC_SETTINGS
from tengrad_triton.optim.step_access import StepAccess

C = TypeVar("C")
MOST = 4
"""The most signatures for which functions are compiled."""
_STATIC = (bool, int, float, str, type(None))
"""The types of leaves that are constants of a compiled function."""


class Signature(NamedTuple):
    """What a compiled function is specialized on. Two are equal if the function of one can take the other's batch.

    Attributes:
        batch: the structure of (x, y), and for each leaf the (shape, dtype) of a tensor or the (type, value) of others.
        model: the modes of the model's modules, which parameters are trainable, and the static settings of each group.
    """

    batch: tuple[Any, tuple[tuple[Any, Any], ...]]
    model: tuple[Any, ...]

    def __str__(self) -> str:
        """Return the batch as (x, y), with a tensor as its dtype and shape."""
        structure, leaves = self.batch
        return str(tree_unflatten([_Shown(_text_of(*leaf)) for leaf in leaves], structure))


class _Shown(str):
    __repr__ = str.__str__


def _text_of(shape_or_type: Any, dtype_or_value: Any) -> str:
    if isinstance(shape_or_type, type):
        return repr(dtype_or_value)
    return f"{str(dtype_or_value).removeprefix('torch.')}{list(shape_or_type)}"


def batch_signature(x: Any, y: Any) -> tuple[Any, tuple[tuple[Any, Any], ...]]:
    """Return `Signature.batch`.

    Raises:
        TypeError: a leaf is neither a tensor nor a bool, int, float, string or None.
    """
    leaves, structure = tree_flatten((x, y))
    described: list[tuple[Any, Any]] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            described.append((tuple(leaf.shape), leaf.dtype))
        elif isinstance(leaf, _STATIC):
            described.append((type(leaf), leaf))
        else:
            raise TypeError(_why_no_leaf(x, y))
    return structure, tuple(described)


def _why_no_leaf(x: Any, y: Any) -> str:
    paths, _ = tree_flatten_with_path({"x": x, "y": y})
    path, leaf = next((path, leaf) for path, leaf in paths if not isinstance(leaf, (Tensor, *_STATIC)))
    name = keystr(path).replace("['", "", 1).replace("']", "", 1)
    return (
        f"{name} is a {type(leaf).__name__}, but a batch consists of tensors, numbers, strings and None, in nested "
        "tuples, lists and dictionaries: convert it, for instance by dict(batch)"
    )


class ModelState:
    """Reads `Signature.model`; the modules and parameters are looked up again where the optimizer's layers change."""

    def __init__(self, access: StepAccess) -> None:
        self._access = access
        self._layers: Sequence[LayerParams] = []
        self._modules: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []

    def read(self) -> tuple[Any, ...]:
        """Return what is the case at present."""
        layers = self._access.layers
        if layers is not self._layers:
            self._layers, self._modules = layers, list(self._access.module.modules())
            self._parameters = [p for layer in layers for p in layer.parameters.values()]
        return (
            [module.training for module in self._modules],
            [parameter.requires_grad for parameter in self._parameters],
            [group[name] for group in self._access.groups for name in STATIC_SETTINGS if name in group],
        )

    def why_hooked(self) -> str | None:
        """Return why compiled code would miss what a backward pass does besides: hooks on gradients; None if none has.

        Several processes count, because `DistributedDataParallel` averages the gradients by such hooks.
        """
        if self._access.trains_together:
            return "several processes train the model, and compiled code would not average their gradients"
        hooked = next((p for p in self._parameters if p._backward_hooks or p._post_accumulate_grad_hooks), None)
        if hooked is None:
            return None
        layer, name = next((one, key) for one in self._layers for key, p in one.parameters.items() if p is hooked)
        return f"{layer.full_name_of(name)!r} has a hook on its gradient, which compiled code does not call"


class Prepared(Generic[C]):
    """The functions made for several signatures, and the rule for which ones they are kept and so compiled.

    A plain step prepares the functions for its signature. They are kept, and compiled, when the signature comes again:
    the first one to be kept may come again at any time, so a ragged first batch is nothing special. From then on only a
    signature that comes twice in a row is added, up to `MOST` of them, so a ragged last batch is never compiled for.
    """

    def __init__(self) -> None:
        self._layers: Sequence[LayerParams] = []
        self._kept: list[tuple[Signature, C]] = []
        self._waiting: list[tuple[Signature, C]] = []
        self._latest: Signature | None = None  # of those kept

    @property
    def latest(self) -> tuple[Signature, C] | None:
        """Return what was found last, or else what was prepared last; None if there is nothing."""
        kept = [entry for entry in self._kept if entry[0] == self._latest]
        known = kept or self._waiting
        return known[-1] if known else None

    @property
    def keeps_any(self) -> bool:
        """Whether some functions are kept, and so compiled."""
        return bool(self._kept)

    @property
    def takes_more(self) -> bool:
        """Whether functions for another signature would be kept if it came twice in a row."""
        return len(self._kept) < MOST

    def find(self, signature: Signature, layers: Sequence[LayerParams]) -> C | None:
        """Return the functions for a signature that has come now, or None if there are none.

        ``layers`` are the optimizer's: if they are others than at the last call, nothing of before is found.
        """
        if layers is not self._layers:
            self._layers, self._kept, self._waiting = layers, [], []
        again = [entry for entry in self._waiting if entry[0] == signature]
        self._kept += again
        if self._kept:  # from now on only what comes twice in a row counts
            self._waiting = []
        for own, functions in self._kept:
            if own == signature:
                self._latest = own
                return functions
        return None

    def put(self, signature: Signature, functions: C) -> None:
        """Set the functions for the signature of the last `find`."""
        places = [place for place, (own, _) in enumerate(self._kept) if own == signature]
        if places:
            self._kept[places[0]] = (signature, functions)
        elif self.takes_more:
            self._waiting = [*(entry for entry in self._waiting if entry[0] != signature), (signature, functions)][
                -MOST:
            ]
