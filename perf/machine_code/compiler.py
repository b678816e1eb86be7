"""Compile a launch configuration for a GPU that need not be there, and read its resources from the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from perf.machine_code.configurations import configurations
from perf.machine_code.gpus import ARCHITECTURES, Architecture
from perf.machine_code.instructions import count_amdgcn, count_sass
from perf.machine_code.resources import Resources
from tengrad_triton.kernels.spec import Config

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_config(config: Config, architecture: Architecture) -> Any:
    """Compile one configuration, with every argument but the unaligned ones a multiple of 16."""
    names = config.kernel.arg_names
    kinds = [tuple(kind.split(",")) if "," in kind else kind for kind in config.types.split()]
    types = dict(zip([name for name in names if name not in config.constants], kinds, strict=True))
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name not in config.unaligned}
    signature = types | dict.fromkeys(config.constants, "constexpr")
    source = ASTSource(fn=config.kernel, signature=signature, constexprs=dict(config.constants), attrs=aligned)
    # Every version fuses multiply and add unless it is told otherwise; 3.9 warns that 3.10 will not.
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target_of(architecture), options=options)


def target_of(architecture: Architecture) -> GPUTarget:
    """Return an architecture as Triton names it."""
    arch = int(architecture.name.removeprefix("sm_")) if architecture.backend == "cuda" else architecture.name
    return GPUTarget(architecture.backend, arch, architecture.warp_size)


def resources_of(compiled: Any, architecture: Architecture) -> Resources:
    """Read the resources of a compiled kernel."""
    read = _of_cubin if architecture.backend == "cuda" else _of_amdgcn
    registers, spilled, instructions = read(compiled)
    threads = compiled.metadata.num_warps * architecture.warp_size
    return Resources(registers, spilled, compiled.metadata.shared, threads, _dots(compiled.asm["ttir"]), instructions)


def resources(name: str, target: str) -> Resources:
    """Compile the configuration of that name for that architecture, and return its resources."""
    architecture = ARCHITECTURES[target]
    return resources_of(compile_config(configurations(architecture)[name], architecture), architecture)


def _of_cubin(compiled: Any) -> tuple[int, int, dict[str, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", "-ndf", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, count_sass(code)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def _of_amdgcn(compiled: Any) -> tuple[int, int, dict[str, int]]:
    code = compiled.asm["amdgcn"]
    # Scalar registers that spill go to lanes of vector registers, not to memory.
    registers, scratch = (
        int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, scratch, count_amdgcn(code)


_DOT = re.compile(r"tt\.dot [^:{\n]*?(?:inputPrecision = (\w+) )?(?:\{[^}\n]*\} )?: tensor<\d+x\d+x(\w+)>")


def _dots(ttir: str) -> list[str]:
    return sorted({f"{kind} {precision}".strip() for precision, kind in _DOT.findall(ttir)})
