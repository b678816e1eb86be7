"""Errors at the door: what came, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tengrad_triton.fisher import FISHERS
from tengrad_triton.plan import REPRESENTATIONS

_CHOICES = {"fisher": FISHERS, "blocks": ("layer",), "unsupported": ("sgd", "error"), "backend": ("auto", "torch")}


def check_settings(
    model: nn.Module, refresh_every: Any, max_bytes: Any, tol: Any, representation: Any, **choices: Any
) -> None:
    """Reject settings of the optimizer as a whole; ``choices`` are those that are one of a few words."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; parameters go to params=")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no trainable parameters: nothing to optimize")
    if not callable(refresh_every):
        check_refresh_every(refresh_every)
    if not _is_number(max_bytes) or max_bytes < 0:
        raise ValueError(f"max_bytes must be at least 0, got {max_bytes!r}")
    if not _is_number(tol) or not 0 < tol < 1:
        raise ValueError(f"tol must be in (0, 1), got {tol!r}")
    for name, value in choices.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, _CHOICES[name]))}, got {value!r}")
    _check_representation(representation)


def _check_representation(representation: Any) -> None:
    known = ("auto", *REPRESENTATIONS)
    for value in representation.values() if isinstance(representation, Mapping) else [representation]:
        if value not in known:
            raise ValueError(f"representation must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_refresh_every(steps: Any) -> None:
    """Reject what is no number of steps."""
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"refresh_every must be a whole number of steps or a function of the step, got {steps!r}")
    if steps < 1:
        raise ValueError(f"refresh_every must be at least 1, got {steps}")


def check_group(group: Mapping[str, Any]) -> None:
    """Reject settings of one parameter group."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor with one element, got shape {tuple(lr.shape)}")
    else:
        _check_range("lr", lr, 0.0)
    if not _is_number(group["damping"]):
        raise TypeError(f"damping must be a number or a function of the step, got {group['damping']!r}")
    if not 0 < group["damping"] < float("inf"):
        raise ValueError(f"damping must be positive, got {group['damping']}: F + damping I is not invertible otherwise")
    _check_range("weight_decay", group["weight_decay"], 0.0)
    _check_range("momentum", group["momentum"], 0.0, below=1.0)
    if group["nesterov"] and group["momentum"] == 0:
        raise ValueError("nesterov=True needs momentum, got momentum=0")
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise TypeError(f"parameters must be real floating point, got {parameter.dtype}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_range(name: str, value: Any, least: float, below: float = float("inf")) -> None:
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not least <= value < below:
        wanted = f"in [{least:g}, {below:g})" if below < float("inf") else f"at least {least:g} and finite"
        raise ValueError(f"{name} must be {wanted}, got {value}")
