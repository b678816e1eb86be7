"""The parameters that forwards use: those that the optimizer has, or whole ones where it has parts (`fully_shard`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from torch import Tensor, nn

from tengrad_triton.capture.blocks import CapturedLayer
from tengrad_triton.layers import rule_reads_parameters
from tengrad_triton.sharding.modules import WholeParameters


class UsedParameters:
    """Finds the parameters that the graphs of a model end in.

    Args:
        model: the model itself, with the parameters that the optimizer has.
        layers: the captured layers, by name, with these parameters.

    Attributes:
        layers: the argument ``layers``.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, CapturedLayer]) -> None:
        self._whole, self.layers = WholeParameters(model), layers

    @property
    def are_whole(self) -> bool:
        """Whether the optimizer has the parameters that forwards use, not parts of them."""
        return not self._whole.is_needed

    def before_forward(self) -> None:
        """Prepare a sharded model for a forward that `after_forward` follows; every rank must call it."""
        self._whole.before_forward()

    @contextmanager
    def after_forward(self) -> Iterator[Mapping[str, CapturedLayer] | None]:
        """Return a context in which a sharded model has whole parameters; it has the layers with these if they are new.

        Every rank must enter it for the same forwards.
        """
        with self._whole.outside(self._whole.is_needed) as is_new:
            layers = self.layers.items() if is_new else ()
            found = {
                name: replace(layer, parameters={key: self.of(p) for key, p in layer.parameters.items()})
                for name, layer in layers
            }
            yield found if is_new else None

    def gather(self) -> None:
        """As a backward begins, give a sharded model whole parameters; every rank must call this for the same ones."""
        if self._whole.is_needed:
            self._whole.gather()

    def free(self) -> None:
        """Free whole parameters, which a step has made old ones: a module that kept them would use them once more."""
        self._whole.free()

    def of(self, parameter: Tensor) -> Tensor:
        """Return the parameter that a forward used, of one that the optimizer has."""
        return self._whole.of(parameter)

    @property
    def parts(self) -> Mapping[int, Tensor]:
        """Return the parameters that the optimizer has, by the ids of the whole ones; none if it has those itself."""
        return self._whole.parts

    def names(self, model: nn.Module, ids: Collection[int]) -> dict[int, str]:
        """Return the names of those used parameters whose ids are among these, by their ids."""
        return {id(self.of(p)): name for name, p in model.named_parameters() if id(self.of(p)) in ids} if ids else {}

    def kept(self) -> AbstractContextManager[None]:
        """Return a context for backward passes of our own, which change nothing of a sharded model."""
        return self._whole.kept()

    def for_rules(self) -> AbstractContextManager[bool]:
        """Return a context in which rules that read parameters find whole ones; every rank must enter it."""
        layers = self.layers.values() if self._whole.is_needed else ()
        return self._whole.outside(any(rule_reads_parameters(one.layer) for one in layers))
