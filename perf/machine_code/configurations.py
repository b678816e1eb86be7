"""The launch configurations of all ops, and their names."""

from __future__ import annotations

import re

from perf.machine_code.gpus import Architecture
from tengrad_triton.kernels import SPECS
from tengrad_triton.kernels.spec import Config


def configurations(architecture: Architecture) -> dict[str, Config]:
    """Return the launch configurations for an architecture by name, each once even where several ops share it."""
    unique = {id(config): config for spec in SPECS for config in spec.configs}.values()
    configs = [config for config in unique if architecture.backend in config.backends]
    named = {name_of(config): config for config in configs}
    if len(named) < len(configs):
        raise ValueError(f"{len(configs)} launch configurations have only {len(named)} names; see name_of")
    return named


def name_of(config: Config) -> str:
    """Return a name that tells a launch configuration from all others, without spaces within its parts."""
    floats = dict.fromkeys(re.findall(r"\*(\w*fp?\d+)", config.types))
    constants = (f"{name}={value}" for name, value in config.constants.items())
    size = f"warps={config.num_warps}", f"stages={config.num_stages}"
    return " ".join((kernel_of(config), config.name, "+".join(floats) or "none", *constants, *size))


def kernel_of(config: Config) -> str:
    """Return the name of the kernel without what all kernels' names have."""
    return config.kernel.__name__.strip("_").removesuffix("_kernel")
