"""The parameters that forwards use: those that the optimizer has, or whole ones where it has parts (`fully_shard`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
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

    def follow(self) -> Mapping[str, CapturedLayer] | None:
        """After a forward, give a sharded model whole parameters; return the layers with these if they are new.

        Every rank must call this for the same forwards.
        """
        if not self._whole.is_needed or not self._whole.gather():
            return None
        return {
            name: replace(layer, parameters={key: self.of(p) for key, p in layer.parameters.items()})
            for name, layer in self.layers.items()
        }

    def of(self, parameter: Tensor) -> Tensor:
        """Return the parameter that a forward used, of one that the optimizer has."""
        return self._whole.of(parameter)

    @property
    def parts(self) -> Mapping[int, Tensor]:
        """Return the parameters that the optimizer has, by the ids of the whole ones; none if it has those itself."""
        return self._whole.parts

    def names_among(self, model: nn.Module, ids: Collection[int]) -> list[str]:
        """Return the names of the parameters whose ids are among these."""
        return [name for name, p in model.named_parameters() if id(self.of(p)) in ids]

    def kept(self) -> AbstractContextManager[None]:
        """Return a context for backward passes of our own, which change nothing of a sharded model."""
        return self._whole.kept()

    def for_rules(self) -> AbstractContextManager[None]:
        """Return a context in which rules that read parameters find whole ones; every rank must enter it."""
        layers = self.layers.values() if self._whole.is_needed else ()
        return self._whole.outside(any(rule_reads_parameters(one.layer) for one in layers))
