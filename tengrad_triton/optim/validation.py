"""Errors at the door: what came, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tengrad_triton.optim.options import is_number


def check_model(model: Any) -> None:
    """Reject what is no module with something to train."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; parameters go to params=")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no trainable parameters: nothing to optimize")


def check_refresh_every(steps: Any) -> None:
    """Reject what is no number of steps."""
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"refresh_every must be a whole number of steps or a function of the step, got {steps!r}")
    if steps < 1:
        raise ValueError(f"refresh_every must be at least 1, got {steps}")


def check_group(group: Mapping[str, Any]) -> None:
    """Reject settings of one parameter group."""
    _check_lr(group["lr"])
    if not is_number(group["damping"]):
        raise TypeError(f"damping must be a number, 'lm' or a function of the step, got {group['damping']!r}")
    if not 0 < group["damping"] < float("inf"):
        raise ValueError(f"damping must be positive, got {group['damping']}: F + damping I is not invertible otherwise")
    check_range("weight_decay", group["weight_decay"], 0.0)
    check_range("momentum", group["momentum"], 0.0, below=1.0)
    spring = group.get("spring", 0.0)  # TENGraD's alone
    check_range("spring", spring, 0.0, below=1.0)
    if group["nesterov"] and (group["momentum"] == 0 or spring):
        raise ValueError("nesterov=True needs momentum and no spring: it looks ahead along the momentum")
    if spring and group["weight_decay"] and not group["decoupled_weight_decay"]:
        raise ValueError(
            f"spring={spring} keeps the last natural gradient, which weight decay would be mixed with: "
            "use decoupled_weight_decay=True"
        )
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise TypeError(f"parameters must be real floating point, got {parameter.dtype}")


def _check_lr(lr: Any) -> None:
    if not isinstance(lr, Tensor):
        check_range("lr", lr, 0.0)
    elif lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor with one element, got shape {tuple(lr.shape)}")


def check_range(name: str, value: Any, least: float, below: float = float("inf")) -> None:
    """Reject what is no number in [least, below)."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not least <= value < below:
        wanted = f"in [{least:g}, {below:g})" if below < float("inf") else f"at least {least:g} and finite"
        raise ValueError(f"{name} must be {wanted}, got {value}")
