"""The settings of `GaussNewton` that do not change from step to step, and their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tengrad_triton.capture.blocks import BlocksChoice, find_layer_params, fisher_blocks_of
from tengrad_triton.distributed.ranks import check_alone
from tengrad_triton.least_squares.search import LINE_SEARCHES, LineSearch
from tengrad_triton.optim.validation import check_bool, check_choice, check_count, check_model, check_range


@dataclass(frozen=True)
class Settings:
    """See `GaussNewton`."""

    acceleration: bool
    line_search: LineSearch | None
    blocks: BlocksChoice
    max_rows: int | None
    sketch: int | None
    compiled: bool
    max_bytes: int

    def check(self) -> None:
        """Raise unless the settings are valid, one by one and together."""
        check_bool("acceleration", self.acceleration)
        check_bool("compiled", self.compiled)
        if self.line_search is not None:
            check_choice("line_search", self.line_search, LINE_SEARCHES)
        if isinstance(self.blocks, str):
            check_choice("blocks", self.blocks, ("network", "layer"))
        for name in ("max_rows", "sketch"):
            check_count(name, getattr(self, name), optional=True)
        check_count("max_bytes", self.max_bytes)
        if self.max_rows is not None and self.sketch is not None:
            raise ValueError("max_rows and sketch are two ways to do with fewer rows: give one of them")
        for name in ("max_rows", "sketch"):
            if getattr(self, name) is not None and self.blocks != "network":
                raise ValueError(f"{name} is for one system of the whole network: take it with blocks='network'")

    @property
    def accelerates(self) -> bool:
        """Whether steps have the geodesic acceleration, which needs J̃ᵀ times any residuals."""
        return self.acceleration and self.max_rows is None


def check_steps(lr: object, spring: float, settings: Settings) -> None:
    """Raise unless the settings that a schedule may change are valid."""
    check_range("lr", lr, 0.0)
    check_range("spring", spring, 0.0, below=1.0)
    if spring and settings.max_rows is not None:
        raise ValueError("spring needs the rows of all residuals: take it without max_rows")


def checked_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient.

    Raises:
        TypeError: the model is no module.
        ValueError: none requires a gradient, they have several types or devices, or they have no entries yet.
    """
    check_model(
        model, "give the module itself, not its parameters, and freeze by requires_grad_(False) what is not trained"
    )
    check_alone(model, "GaussNewton")
    trained = [p for p in model.parameters() if p.requires_grad]
    if any(is_lazy(p) for p in model.parameters()):
        raise ValueError("the model has lazy parameters, which have no shape yet: call it once on a batch of points")
    kinds = {(p.dtype, p.device) for p in trained}
    if len(kinds) > 1:
        listed = " and ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"all trained parameters must have one type and device, got {listed}: use model.double(), say")
    if trained[0].dtype not in (torch.float32, torch.float64):
        raise ValueError(f"GaussNewton needs float64 or float32 parameters, got {trained[0].dtype}: use model.double()")
    if trained[0].is_meta:
        raise ValueError("the parameters are on the device meta, which holds no numbers: use model.to_empty(device=…)")
    return trained


def check_are_the_models(parameters: Sequence[Tensor], model: nn.Module) -> None:
    """Raise ValueError unless the parameters are still those of the model, whose residuals depend on its own."""
    own = {id(p) for p in model.parameters()}
    for p in parameters:
        if id(p) not in own:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is no longer one of the model, which has another in its place: "
                "make a new GaussNewton of the model, or write into a parameter with p.data.copy_(…)"
            )


def check_saved(state_dict: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
    """Raise ValueError unless a saved state has one group, of as many parameters, with directions of their shapes."""
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    if len(state_dict["param_groups"]) != 1 or len(saved) != len(parameters):
        raise ValueError(
            f"the state is of {len(saved)} trained parameters, but the model has {len(parameters)}: it was saved for "
            "another model"
        )
    for index, parameter in zip(saved, parameters, strict=True):
        direction = state_dict["state"].get(index, {}).get("direction")
        if direction is not None and direction.shape != parameter.shape:
            raise ValueError(
                f"the state holds a direction of shape {tuple(direction.shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}: it was saved for another model"
            )


def columns_of(model: nn.Module, choice: BlocksChoice, parameters: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the columns of J̃ of each block of parameters; None for one block of all.

    Raises:
        ValueError: a list of blocks names a module without parameters, or one twice.
    """
    if choice == "network":
        return None
    layers = find_layer_params(model, [{"params": list(parameters)}], rows_without_rule=True)
    blocks = fisher_blocks_of(choice, layers, [layer.name for layer in layers])
    ends = torch.tensor([p.numel() for p in parameters]).cumsum(0).tolist()
    columns = {id(p): torch.arange(end - p.numel(), end) for p, end in zip(parameters, ends, strict=True)}
    owned = {layer.name: [id(layer.parameters[name]) for name in layer.trained()] for layer in layers}
    device = parameters[0].device
    by_block = [[columns[key] for name in names for key in owned[name]] for names in blocks.values()]
    return [torch.cat(parts).to(device) for parts in by_block if parts]
