"""Every shipped configuration compiled for GPUs that need not be there: nothing spills, and copies are as promised."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from tengrad_triton.kernels import SPECS
from tengrad_triton.kernels.spec import HAS_TRITON

if not HAS_TRITON or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's compiler", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CUDA = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 90, 100)}
HIP = {"gfx942": GPUTarget("hip", "gfx942", 64)}
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, "gfx942": 64 << 10}  # bytes that a program may have


def _label(row, config):
    constants = "-".join(str(value) for value in config.constants.values())
    return f"{row.name}-{config.kernel.__name__}-{config.types.split()[0].removeprefix('*')}-{constants}"


def _cases(targets):
    return [
        pytest.param(config, target, id=f"{name}-{_label(row, config)}")
        for name, target in targets.items()
        for row in SPECS
        for config in row.configs
    ]


def compile_config(config, target):
    """Compile one configuration for one target, with every argument but the unaligned ones a multiple of 16."""
    names = config.kernel.arg_names
    types = dict(zip([name for name in names if name not in config.constants], config.types.split(), strict=True))
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name not in config.unaligned}
    signature = types | dict.fromkeys(config.constants, "constexpr")
    source = ASTSource(fn=config.kernel, signature=signature, constexprs=dict(config.constants), attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=target, options=options)


def _tool(name, *arguments):
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def cuda_resources(compiled, folder):
    """Registers, bytes of local memory and the machine code of a kernel compiled for CUDA."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    return registers, stack + local, _tool("nvdisasm", "-c", str(cubin))


def hip_resources(compiled):
    """Vector registers, bytes of scratch memory and the machine code of a kernel compiled for AMD."""
    code = compiled.asm["amdgcn"]
    # Scalar registers that spill go to lanes of vector registers, not to memory.
    registers, scratch = (
        int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, scratch, code


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def _fresh_cache(monkeypatch, cache):
    # Shared by the tests, because some ops share configurations.
    monkeypatch.setenv("TRITON_CACHE_DIR", cache)


@pytest.mark.usefixtures("_fresh_cache")
@pytest.mark.parametrize(("config", "target"), _cases(CUDA))
def test_config_compiles_for_cuda_without_spills(config, target, tmp_path):
    compiled = compile_config(config, target)
    _, spilled, code = cuda_resources(compiled, tmp_path)
    assert spilled == 0
    assert compiled.metadata.shared <= SHARED_MEMORY[target.arch]
    assert not re.search(r"\b(STL|LDL)\b", code)
    assert re.search(r"\bSTG\b", code), "an empty kernel: the compiler dropped every store"
    # Every float32 dot asks for ieee, which the compiler has been seen to ignore.
    assert "tf32" not in compiled.asm["ptx"]
    if config.async_copies:
        assert re.search(r"\bLDGSTS\.\S*128", code)


@pytest.mark.usefixtures("_fresh_cache")
@pytest.mark.parametrize(("config", "target"), _cases(HIP))
def test_config_compiles_for_amd_without_spills(config, target):
    compiled = compile_config(config, target)
    _, spilled, code = hip_resources(compiled)
    assert spilled == 0
    assert compiled.metadata.shared <= SHARED_MEMORY[target.arch]
    assert re.search(r"\b(global|buffer)_store", code), "an empty kernel: the compiler dropped every store"
