"""The access of a compiled step to the private state of `TENGraD`. No other module uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tengrad_triton.capture.blocks import LayerParams, wide_dtype
from tengrad_triton.capture.hooks import Capture
from tengrad_triton.curvature.checkpoint import pack_moments
from tengrad_triton.curvature.choices import Choice, OpsFor
from tengrad_triton.curvature.refresh import failures_of
from tengrad_triton.curvature.target import rate_indices
from tengrad_triton.curvature.woodbury import Curvature, FisherBlocks
from tengrad_triton.optim.options import Options
from tengrad_triton.optim.state.wide import momentum_of
from tengrad_triton.optim.tengrad import TENGraD
from tengrad_triton.optim.whole_step import WholeStep


class StepAccess:
    """The members of a `TENGraD` that a compiled step reads, and the methods by which it changes them.

    Each access reads the optimizer again, because `TENGraD.add_param_group` and `TENGraD.load_state_dict` replace some
    of these objects.
    """

    def __init__(self, optimizer: TENGraD) -> None:
        self._optimizer = optimizer

    def __reduce__(self) -> NoReturn:
        """Refuse to copy a compiled step, whose code belongs to one model."""
        raise TypeError(
            "a compiled step is not copied: copy the model and the optimizer together, and call compile_train_step for "
            "the copies"
        )

    @property
    def module(self) -> nn.Module:
        """Return the model itself, not its `torch.compile` wrapper."""
        return self._optimizer._module

    @property
    def layers(self) -> Sequence[LayerParams]:
        """Return the layers of all parameters."""
        return self._optimizer._layers

    @property
    def capture(self) -> Capture:
        """Return the capture of the plain step."""
        return self._optimizer._capture

    @property
    def groups(self) -> Sequence[Mapping[str, Any]]:
        """Return the parameter groups."""
        return self._optimizer.param_groups

    @property
    def options(self) -> Options:
        """Return the settings that do not belong to a group."""
        return self._optimizer._options

    @property
    def adapts(self) -> bool:
        """Whether some group's damping is adapted by `LevenbergMarquardt`."""
        return self._optimizer.adapts

    @property
    def trains_together(self) -> bool:
        """Whether several processes train the model, or it is made for several (`fully_shard`)."""
        return self._optimizer._processes.several or self._optimizer._shards.is_cut

    @property
    def ops_for(self) -> OpsFor:
        """Return the function from kernel overrides to ops."""
        return self._optimizer._ops_for

    @property
    def generator(self) -> torch.Generator:
        """Return the generator that draws labels."""
        return self._optimizer._generator

    @property
    def curvature(self) -> Curvature | None:
        """Return the present curvature."""
        return self._optimizer._curvature

    @property
    def age(self) -> int:
        """Return the number of steps taken with the present curvature."""
        return self._optimizer._age

    @property
    def steps(self) -> int:
        """Return the number of steps taken so far."""
        return self._optimizer._steps

    @property
    def refresh_is_due(self) -> bool:
        """Whether the next step refreshes the curvature."""
        return self._optimizer._refresh_is_due()

    def choices(self) -> dict[str, Choice]:
        """Return how the J of each preconditioned parameter is stored at present, by the parameter's name."""
        return self._optimizer.choices()

    def numbers_of_groups(self) -> tuple[list[Tensor], list[Tensor], tuple[int, ...]]:
        """Return each group's settings and `Average`, if there is one, at fixed addresses, and its `rate_indices`."""
        o = self._optimizer
        known, dtype = o._group_settings, wide_dtype(self.layers)
        settings = o._settings(dtype)
        groups = enumerate(self.groups if o._scaling != "none" else [])
        averages = [known[index].average(group, dtype, o._steps) for index, group in groups]
        return settings, averages, rate_indices(self.groups)

    def momentum_of(self, parameter: Tensor) -> Tensor:
        """Return a parameter's momentum buffer."""
        return momentum_of(parameter, self._optimizer.state[parameter], wide_dtype(self.layers))

    def copies_of(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the wide copies of those parameters that are in narrower types; `advance` writes them back."""
        o, dtype = self._optimizer, wide_dtype(self.layers)
        o._wide.forget()
        copies = {name: o._wide.of(parameter, o.state[parameter], dtype)[0] for name, parameter in parameters.items()}
        return {name: copy for name, copy in copies.items() if copy is not parameters[name]}

    def before_refresh(self, blocks: FisherBlocks) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return each block's damping ε at this step, its count of failures, and the moments, packed."""
        moments = {} if self.curvature is None else pack_moments(self.curvature.moments)
        return self._optimizer._damping_of(blocks), failures_of(list(blocks), self.curvature), moments

    def step(self, take: Callable[[], Tensor]) -> Tensor:
        """Have ``take`` take the optimizer's next step: its step hooks run, and schedulers count the step."""
        loss = self._optimizer.step(WholeStep(take))
        assert loss is not None  # ``take`` returns one
        return loss

    def plain_step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Take the plain step, which is not compiled, without step hooks: for use within `step`."""
        loss = self._optimizer._step(closure)
        assert loss is not None  # the closure returns one
        return loss

    def zero_grad(self) -> None:
        """Reset the gradients, and drop the captured tensors."""
        self._optimizer.zero_grad()

    def detach_hooks(self) -> None:
        """Remove the hooks of the plain step from the model: the compiled functions capture without them."""
        self._optimizer.close()

    def attach_hooks_if_due(self) -> None:
        """Attach the hooks of the plain step if the next step refreshes."""
        self._optimizer._rearm()

    def release(self) -> None:
        """Free J before a refresh."""
        self._optimizer._release()

    def advance(self, curvature: Curvature, age: int) -> None:
        """Count a step with ``curvature``, which was the curvature of ``age`` steps before."""
        self._optimizer._wide.write_back()
        self._optimizer._advance(curvature, age)
