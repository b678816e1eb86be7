"""Properties of a layer that follow from its type and options, such as whether a rule covers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from tengrad_triton.layers.batch_norm import mixes_samples
from tengrad_triton.layers.contribution import Call, canonical, first_tensor
from tengrad_triton.layers.conv import Convolution, Transposed
from tengrad_triton.layers.embedding import why_not_exact
from tengrad_triton.sharding.modules import plain_type

_MOVED = (nn.Linear, *get_args(Convolution), *get_args(Transposed))
_SEQUENTIAL = (nn.MultiheadAttention, nn.RNNBase)
_POINTWISE = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
_HARMLESS_OVERRIDES = frozenset({"extra_repr", "reset_parameters", "__init__", "__repr__"})
_PARAMETRIZATIONS, _OUT_PROJ = "parametrizations", "out_proj"  # names of uncalled submodules


def why_no_rule(layer: nn.Module) -> str | None:
    """Return why no rule covers ``layer``, or None if one does.

    A rule covers the type it is registered for and the subclasses that compute the same function. It does not cover a
    subclass with its own forward, or a layer with a parametrized weight.
    """
    kind = plain_type(layer)
    known = next((c for c in kind.__mro__ if c in canonical.registry and c is not object), None)
    if known is None:
        return f"no rule for {kind.__name__}"
    if is_parametrized(layer):
        return "parametrized"
    inherited = {name for name in dir(known) if callable(getattr(known, name))} - _HARMLESS_OVERRIDES
    subclasses = kind.__mro__[: kind.__mro__.index(known)]
    overridden = [name for cls in subclasses for name in vars(cls) if name in inherited]
    overridden += [name for name in vars(layer) if name == "forward"]
    return f"{kind.__name__} has its own {overridden[0]}" if overridden else None


def only_moves_entries(layer: nn.Module) -> bool:
    """Whether the layer's rule only moves entries into outer products, so that half precision holds the factors."""
    known = next((c for c in type(layer).__mro__ if c in canonical.registry), None)
    return known in _MOVED


def require_exact_gradient(name: str, layer: nn.Module) -> None:
    """Check that the gradient torch computes for a layer's parameters is the derivative of the loss.

    Raises:
        ValueError: an option of the layer makes it differ; the message names the option and its remedy.
    """
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and (why := why_not_exact(layer)):
        raise ValueError(f"{name or type(layer).__name__} has {why}")


def call_parameters(layer: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return the parameters that a call of the layer uses directly, by their names within the layer.

    These are the layer's own and those of submodules that it uses without calling them.
    """
    direct = dict(layer.named_parameters(recurse=False, remove_duplicate=False))
    uncalled = [(name, module) for name, module in layer.named_children() if name == _PARAMETRIZATIONS]
    if isinstance(layer, nn.MultiheadAttention):
        uncalled.append((_OUT_PROJ, layer.out_proj))
    return direct | {f"{prefix}.{name}": p for prefix, module in uncalled for name, p in module.named_parameters()}


def owned_parameters(name: str, modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters that a module owns, each under one name only, by their names within the module.

    A module owns the parameters that it holds directly. A parametrized module also owns those of its parametrizations.

    Args:
        name: the module's name.
        modules: all modules of the model, by name.
    """
    module = modules[name]
    if is_uncalled(name, modules):
        parametrization = name.rpartition(".")[0].endswith(_PARAMETRIZATIONS)
        return {} if parametrization else dict(module.named_parameters(recurse=False))
    owned = {key: p for key, p in call_parameters(module).items() if not key.startswith(f"{_OUT_PROJ}.")}
    first_names = {p: key for key, p in reversed(owned.items())}
    return {key: p for key, p in owned.items() if first_names[p] == key}


def is_uncalled(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module's parent uses its parameters without calling it; ``modules`` are those of the model, by name."""
    parent, _, last = name.rpartition(".")
    attention = last == _OUT_PROJ and isinstance(modules.get(parent), nn.MultiheadAttention)
    return attention or isinstance(modules[name], ParametrizationList)


def has_uncalled(layer: nn.Module) -> bool:
    """Whether the layer's rule needs the inputs and output gradients of uncalled linear layers."""
    return isinstance(layer, _SEQUENTIAL) and why_no_rule(layer) is None


def is_unrolled(layer: nn.Module) -> bool:
    """Whether a compiled step unrolls the layer over time: `torch.func` cannot transform torch's own forward of it."""
    return isinstance(layer, nn.RNNBase) and has_uncalled(layer)


def samples_dim(layer: nn.Module) -> int:
    """Return which dimension of a layer's inputs and outputs counts the samples: 0, or 1 if the sequence is first."""
    return 1 if isinstance(layer, _SEQUENTIAL) and not layer.batch_first else 0


def locate_samples(
    layer: nn.Module, shape: Sequence[int], samples: int, sequence_first: bool
) -> tuple[str | None, bool]:
    """Find which dimension of a call's output counts the samples.

    Args:
        layer: the layer that was called.
        shape: of the first tensor that it returned.
        samples: N, the number of samples.
        sequence_first: whether some layer of the model takes [sequence, samples, …]. Pointwise layers, such as Linear,
            may then get this order too.

    Returns:
        why_not: why the samples are not in a dimension that the layer's rule can use, or None if they are.
        samples_second: whether they are in the second dimension although the rule expects the first.
    """
    if isinstance(layer, _SEQUENTIAL):
        dim = samples_dim(layer)
        fits = len(shape) == 3 and shape[dim] == samples
        return None if fits else f"its output {tuple(shape)} has no batch of {samples} in dimension {dim}", False
    first, second = (*shape[:2], -1, -1)[:2]
    if sequence_first and len(shape) > 2 and isinstance(layer, _POINTWISE) and second == samples:
        ambiguous = first == samples
        return ("its first two dimensions are both as large as the batch", False) if ambiguous else (None, True)
    if first == samples:
        return None, False
    return f"its output has {first} entries in dimension 0 where the batch has {samples} samples", False


def may_mix_samples(layer: nn.Module) -> bool:
    """Whether the layer is a batch norm that a rule covers, and so mixes samples in some of its modes."""
    return isinstance(layer, _BatchNorm) and why_no_rule(layer) is None


def may_draw_random_numbers(layer: nn.Module) -> bool:
    """Whether a call of the layer in training mode draws random numbers that its rule has to draw again."""
    return isinstance(layer, _SEQUENTIAL) and layer.dropout > 0


def draws_random_numbers(layer: nn.Module) -> bool:
    """Whether a call of the layer in its present mode draws random numbers that its rule has to draw again."""
    return may_draw_random_numbers(layer) and layer.training


def drops_out(layer: nn.Module) -> bool:
    """Whether the layer drops out units in its present mode."""
    return draws_random_numbers(layer) or (isinstance(layer, _DropoutNd) and layer.training and layer.p > 0)


def rule_reads_values(layer: nn.Module, call: Call) -> bool:
    """Whether the layer's rule reads values from the tensors of ``call``, which a compiled graph cannot do."""
    return isinstance(layer, nn.EmbeddingBag) and first_tensor(call.args, call.kwargs).dim() == 1


def has_rule_of_linear(layer: nn.Module) -> bool:
    """Return whether the layer is a linear one with the library's own rule, which no user has replaced."""
    return canonical.dispatch(type(layer)) is canonical.dispatch(nn.Linear) and plain_type(layer) is nn.Linear


def rule_reads_parameters(layer: nn.Module) -> bool:
    """Return whether the layer's rule may read its parameters: a user's rule, or one that repeats some of the call."""
    module = canonical.dispatch(type(layer)).__module__ or ""
    finds_largest = isinstance(layer, nn.EmbeddingBag) and layer.mode == "max"
    return not module.startswith(__package__) or isinstance(layer, _SEQUENTIAL) or finds_largest


def graph_counts_calls(layer: nn.Module) -> bool:
    """Whether each call adds one edge to autograd's graph for each parameter.

    If the graph has more edges that end in a parameter than its layer has calls, the parameter is used elsewhere too.
    """
    return not isinstance(layer, _SEQUENTIAL)


def summary_note(layer: nn.Module) -> str:
    """Return the note of `TENGraD.summary` about the layer's rows, or an empty string."""
    why = why_no_rule(layer)
    if why is not None:
        return f"explicit ({why})"
    return "detached batch statistics" if mixes_samples(layer) else ""
