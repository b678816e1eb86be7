"""Validate settings; raise with the value and the accepted range."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tengrad_triton.curvature.target import Trained
from tengrad_triton.layers import require_exact_gradient
from tengrad_triton.misspellings import did_you_mean
from tengrad_triton.sharding.modules import reshard
from tengrad_triton.sharding.tensors import check_not_sharded, check_of_model, check_placements

INFINITY = float("inf")


def is_number(value: Any) -> bool:
    """Whether a setting is a number. True and False do not count as numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_number(name: str, value: Any) -> None:
    """Raise unless a setting is a number."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_range(name: str, value: Any, least: float, below: float = INFINITY) -> None:
    """Raise unless a setting is a number in [least, below)."""
    check_number(name, value)
    if not least <= value < below:
        wanted = f"in [{least:g}, {below:g})" if below < INFINITY else f"at least {least:g} and finite"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_bound(name: str, value: Any) -> None:
    """Raise unless a bound on a step is positive and finite, or None for no bound."""
    if value is not None and not is_number(value):
        raise TypeError(f"{name} must be a number, or None for no bound, got {value!r}")
    if value is not None and not 0 < value < INFINITY:
        raise ValueError(f"{name} must be positive, or None for no bound, got {value!r}")


def check_count(name: str, value: Any, optional: bool = False) -> None:
    """Raise unless a setting is a whole number of at least 1, or None if it is optional."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_bool(name: str, value: Any) -> None:
    """Raise unless a setting is True or False: any text would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise unless a setting is one of the allowed values."""
    if value not in allowed:
        meant = did_you_mean(value, allowed)
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{meant}")


def seed_of(seed: Any) -> int:
    """Return the seed, or torch's initial one for None; raise unless it is a whole number."""
    if seed is None:
        return torch.initial_seed()
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise TypeError(f"seed must be a whole number, or None for torch's initial seed, got {seed!r}")
    return int(seed)


_MODEL_FIRST = (
    "parameters go to params=, and a transformers.Trainer, whose optimizer_cls_and_kwargs gives them first, takes "
    "tengrad_triton.integrations.transformers.ForTrainer in place of this class"
)


def check_model(model: Any, advice: str = _MODEL_FIRST, takes_shards: bool = False) -> torch.device:
    """Raise unless the model is a module with trainable parameters; return the device of the first one.

    ``advice`` is for who gave something else; ``takes_shards`` says whether a process may have a part of each.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; {advice}")
    reshard(model)
    (check_placements if takes_shards else check_not_sharded)(model.named_parameters())
    devices = [parameter.device for parameter in model.parameters() if parameter.requires_grad]
    if not devices:
        raise ValueError(f"{type(model).__name__} has no trainable parameters: nothing to optimize")
    return devices[0]


def check_interval(steps: Any) -> None:
    """Raise unless ``refresh_every`` is a whole number of at least 1 step."""
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"refresh_every must be a whole number of steps or a function of the step, got {steps!r}")
    if steps < 1:
        raise ValueError(f"refresh_every must be at least 1, got {steps}")


def check_group(group: Mapping[str, Any]) -> None:
    """Raise unless the settings of a parameter group are valid, one by one and together."""
    _check_lr(group["lr"])
    if not is_number(group["damping"]):
        raise TypeError(f"damping must be a number, 'lm' or a function of the step, got {group['damping']!r}")
    if not 0 < group["damping"] < INFINITY:
        raise ValueError(
            f"damping must be positive, got {group['damping']}: F + damping D is not invertible otherwise "
            "(D is the identity with scaling='none')"
        )
    check_range("weight_decay", group["weight_decay"], 0.0)
    check_range("momentum", group["momentum"], 0.0, below=1.0)
    for name in ("nesterov", "decoupled_weight_decay", "maximize"):
        check_bool(name, group[name])
    spring = group.get("spring", 0.0)  # a setting of TENGraD only
    check_range("spring", spring, 0.0, below=1.0)
    if group["nesterov"] and (group["momentum"] == 0 or spring):
        raise ValueError("nesterov=True needs momentum and no spring: it looks ahead along the momentum")
    if spring and group["weight_decay"] and not group["decoupled_weight_decay"]:
        raise ValueError(
            f"spring={spring} keeps the last natural gradient, and weight decay would be mixed into it: "
            "use decoupled_weight_decay=True"
        )


_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "min_momentum", "base_momentum"}
"""What torch's schedulers write into a parameter group."""


def arguments_of(optimizer: type) -> list[str]:
    """Return the settings that an optimizer's class takes by keyword, those of its base classes included."""
    own = (inspect.signature(vars(cls)["__init__"]) for cls in optimizer.__mro__ if "__init__" in vars(cls))
    return list(dict.fromkeys(p.name for s in own for p in s.parameters.values() if p.kind is p.KEYWORD_ONLY))


def check_keys(group: Mapping[str, Any], known: Collection[str], optimizer: type) -> None:
    """Raise ValueError if a key of a parameter group is a misspelt setting, or one that has no effect in a group.

    Other keys are the user's own, which torch's optimizers allow.

    Args:
        group: the parameter group.
        known: the settings that a group may have.
        optimizer: its class; what else its constructor takes holds for all groups.
    """
    arguments = arguments_of(optimizer)
    for key in group.keys() - {"params", *known} - _OF_SCHEDULERS:
        if key in arguments:
            raise ValueError(f"{key!r} has no effect in a parameter group: pass {key}= to {optimizer.__name__}")
        if meant := did_you_mean(key, known):
            raise ValueError(f"a parameter group has no setting {key!r}{meant}: its settings are {', '.join(known)}")


def _check_lr(lr: Any) -> None:
    if not isinstance(lr, Tensor):
        check_range("lr", lr, 0.0)
    elif lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor with one element, got shape {tuple(lr.shape)}")


def check_loss(loss_fn: Callable[[Any, Any], Tensor], output: Tensor, y: Any, loss: Tensor) -> None:
    """Raise unless the loss is a scalar that does not change when the batch is doubled.

    Args:
        loss_fn: takes the output and the target.
        output: what the model returned, samples first.
        y: the target, a tensor or nested tensors. What has an entry for each sample is doubled; where the loss fails
            with that, as with one entry for each token, every tensor is.
        loss: what ``loss_fn`` returned for them.
    """
    if loss.dim() != 0:
        raise ValueError(f"loss_fn must return a scalar mean over the samples, got shape {tuple(loss.shape)}")

    def loss_of_doubled(is_doubled: Callable[[Tensor], bool]) -> Tensor:
        twice = tree_map_only(Tensor, lambda t: torch.cat([t, t]) if is_doubled(t) else t, y)
        return loss_fn(torch.cat([output, output]), twice)

    with torch.no_grad():
        try:
            doubled = loss_of_doubled(lambda t: t.dim() > 0 and len(t) == len(output))
        except (RuntimeError, ValueError):
            doubled = loss_of_doubled(lambda t: t.dim() > 0)
    if not torch.isclose(doubled, loss, rtol=1e-2):
        raise ValueError(
            f"loss_fn must return a mean over the samples: it gave {loss.item():.4g} for a batch and "
            f"{doubled.item():.4g} for the same batch twice"
        )


def check_layout(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError unless a state has the entries that each state of an optimizer has."""
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if not isinstance(state_dict.get(key), kind):
            expected = f"a state_dict of an optimizer, with a {kind.__name__} {key!r}"
            raise ValueError(f"expected {expected}; got {sorted(map(str, state_dict))}")
    if not all(isinstance(x, Mapping) for x in (*state_dict["state"].values(), *state_dict["param_groups"])):
        raise ValueError("an entry of the state is no dictionary: it is damaged")


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the names of a model's parameters, by their ids."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def check_saved_groups(
    state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    model: nn.Module,
    settings: Set[str],
) -> None:
    """Raise ValueError unless the groups and momenta of a state fit the optimizer's groups and parameters.

    Args:
        state_dict: the state.
        param_groups: of the optimizer.
        model: has the parameters' names.
        settings: those that a group of this optimizer may have.
    """
    names = names_of(model)
    saved_groups, count = state_dict["param_groups"], len(param_groups)
    if len(saved_groups) != count:
        raise ValueError(f"the state has {len(saved_groups)} parameter groups, but this optimizer has {count}")
    for index, (group, saved) in enumerate(zip(param_groups, saved_groups, strict=True)):
        own = [names.get(id(p), f"parameter {at}") for at, p in enumerate(group["params"])]
        keys = saved.get("params", [])
        if len(keys) != len(own):
            raise ValueError(
                f"parameter group {index} of the state has {len(keys)} parameters, but this optimizer's has {len(own)} "
                f"({_some(own)}): it was saved for another model"
            )
        if missing := sorted((group.keys() & settings) - saved.keys()):
            raise ValueError(f"parameter group {index} of the state has no {_some(missing)}: it is damaged")
        try:
            check_group(saved)
        except (ValueError, TypeError) as error:
            raise ValueError(f"parameter group {index} of the state: {error}") from error
        for parameter, name, key in zip(group["params"], own, keys, strict=True):
            entry = state_dict["state"].get(key, {})
            _check_kept(entry.get("momentum_buffer"), "momentum", parameter, name)
            _check_kept(entry.get("wide_copy"), "copy", parameter, name)


def _check_kept(saved: Any, what: str, parameter: Tensor, name: str) -> None:
    if saved is None:
        return
    if not isinstance(saved, Tensor) or not saved.is_floating_point():
        got = saved.dtype if isinstance(saved, Tensor) else type(saved).__name__
        raise ValueError(f"the state holds a {what} of type {got} for {name!r}: it is damaged")
    if saved.shape != parameter.shape:
        raise ValueError(
            f"the state holds a {what} of shape {tuple(saved.shape)} for a parameter of shape "
            f"{tuple(parameter.shape)}, {name!r}: it was saved for another model"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def check_parameters(param_groups: Sequence[Mapping[str, Any]], is_cut: bool = False) -> None:
    """Raise unless the trainable parameters of all groups are real floating point, on one device, like the model's."""
    named = [(f"parameter {k}", p) for k, p in enumerate(p for group in param_groups for p in group["params"])]
    check_of_model(named, is_cut)
    trained = [p for _, p in named if p.requires_grad]  # frozen ones may be of any type, such as integers
    check_dtypes(trained)
    devices = dict.fromkeys(str(p.device) for p in trained)
    if len(devices) > 1:
        raise ValueError(
            f"the optimizer's parameters are on {', '.join(devices)}, but must be on one device: move them by "
            "model.to(device), or freeze the others"
        )


def check_dtypes(trained: Sequence[Tensor]) -> None:
    """Raise unless these parameters are real floating point."""
    for parameter in trained:
        if not parameter.is_floating_point():
            raise TypeError(f"parameters must be real floating point, got {parameter.dtype}")


def check_trained(trained: Sequence[Trained]) -> None:
    """Raise unless a step can update these parameters: what was frozen when the optimizer was made may be thawed.

    Raises:
        ValueError: an option of a layer makes its gradient differ from the derivative of the loss.
    """
    for layer in {layer.name: layer for layer, _, _ in trained}.values():
        require_exact_gradient(layer.name, layer.layer)
