"""What is known of a layer's type before it is called: whether a rule describes it, and what its calls account for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from tengrad_triton.layers.batch_norm import mixes_samples
from tengrad_triton.layers.contribution import Call, canonical, input_of
from tengrad_triton.layers.embedding import why_not_exact

_SEQUENTIAL = (nn.MultiheadAttention, nn.RNNBase)
_POINTWISE = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
_HARMLESS_OVERRIDES = frozenset({"extra_repr", "reset_parameters", "__init__", "__repr__"})


def why_no_rule(layer: nn.Module) -> str | None:
    """Return why no rule describes what ``layer`` computes, or None where one does.

    A rule describes the type it is registered for and the subclasses that compute the same thing. A subclass with a
    forward of its own, or a parametrized weight, is another layer.
    """
    known = next((c for c in type(layer).__mro__ if c in canonical.registry and c is not object), None)
    if known is None:
        return f"no rule for {type(layer).__name__}"
    if is_parametrized(layer):
        return "parametrized"
    inherited = {name for name in dir(known) if callable(getattr(known, name))} - _HARMLESS_OVERRIDES
    younger = type(layer).__mro__[: type(layer).__mro__.index(known)]
    own = [name for cls in younger for name in vars(cls) if name in inherited] + [
        n for n in vars(layer) if n == "forward"
    ]
    return f"{type(layer).__name__} has its own {own[0]}" if own else None


def refuse_inexact(name: str, layer: nn.Module) -> None:
    """Raise ValueError if an option of a layer makes the gradient that torch computes no derivative."""
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and (why := why_not_exact(layer)):
        raise ValueError(f"{name or type(layer).__name__} has {why}")


def accounted_for(layer: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return the parameters, by their names within the layer, whose every use is in a call of the layer.

    Beside its own these are the ones of submodules that it uses without calling them.
    """
    own = dict(layer.named_parameters(recurse=False, remove_duplicate=False))
    silent = [("parametrizations", module) for name, module in layer.named_children() if name == "parametrizations"]
    if isinstance(layer, nn.MultiheadAttention):
        silent.append(("out_proj", layer.out_proj))
    return own | {f"{prefix}.{name}": p for prefix, module in silent for name, p in module.named_parameters()}


def may_mix_samples(layer: nn.Module) -> bool:
    """Whether a layer is a batch norm that a rule describes."""
    return isinstance(layer, _BatchNorm) and why_no_rule(layer) is None


def is_uncalled(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module is used by its parent without being called."""
    parent, _, own = name.rpartition(".")
    attention = own == "out_proj" and isinstance(modules.get(parent), nn.MultiheadAttention)
    return attention or isinstance(modules[name], ParametrizationList)


def has_uncalled(layer: nn.Module) -> bool:
    """Whether a rule describes a layer by linear layers within it that it does not call."""
    return isinstance(layer, _SEQUENTIAL) and why_no_rule(layer) is None


def is_unrolled(layer: nn.Module) -> bool:
    """Whether a graph has to have a layer step by step: torch's own cannot be traced under `torch.func`."""
    return isinstance(layer, nn.RNNBase) and has_uncalled(layer)


def samples_dim(layer: nn.Module) -> int:
    """Return which dimension of a layer's inputs and outputs the samples are."""
    return 1 if isinstance(layer, _SEQUENTIAL) and not layer.batch_first else 0


def why_no_samples(layer: nn.Module, y: Tensor, samples: int, sequence_first: bool) -> tuple[str | None, bool]:
    """Return why a call's output ``y`` does not have the samples where a rule needs them, and whether they are second.

    Between layers that have the sequence first (``sequence_first``), others get their samples second.
    """
    if isinstance(layer, _SEQUENTIAL):
        dim = samples_dim(layer)
        fits = y.dim() == 3 and y.shape[dim] == samples
        return None if fits else f"its output {tuple(y.shape)} has no batch of {samples} in dimension {dim}", False
    sizes = (*y.shape[:2], -1, -1)
    if sequence_first and y.dim() > 2 and isinstance(layer, _POINTWISE) and sizes[1] == samples:
        return ("its first two dimensions are both as many as samples", False) if sizes[0] == samples else (None, True)
    return None if sizes[0] == samples else f"its output has {sizes[0]} rows where the batch has {samples}", False


def may_draw(layer: nn.Module) -> bool:
    """Whether some call of the layer may draw random numbers that its rule has to draw again."""
    return isinstance(layer, _SEQUENTIAL) and layer.dropout > 0


def draws(layer: nn.Module) -> bool:
    """Whether a call of the layer now draws random numbers that its rule has to draw again."""
    return may_draw(layer) and layer.training


def drops_out(layer: nn.Module) -> bool:
    """Whether a layer drops out units at present."""
    return draws(layer) or (isinstance(layer, _DropoutNd) and layer.training and layer.p > 0)


def looks_at_values(layer: nn.Module, call: Call) -> bool:
    """Whether the rule for a layer has to read numbers out of the tensors of a call."""
    return isinstance(layer, nn.EmbeddingBag) and input_of(call.args, call.kwargs).dim() == 1


def counts_uses(layer: nn.Module) -> bool:
    """Whether autograd's graph reaches the layer's parameters once a call, so that uses outside of it show."""
    return not isinstance(layer, _SEQUENTIAL)


def note_on(layer: nn.Module) -> str:
    """Return what the summary has to say of a layer's rows, if anything."""
    why = why_no_rule(layer)
    if why is not None:
        return f"explicit ({why})"
    return "batch statistics as constants" if mixes_samples(layer) else ""
