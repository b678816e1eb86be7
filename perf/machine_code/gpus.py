"""The GPUs that kernels are compiled for, and the limits that their makers publish.

A core is NVIDIA's streaming multiprocessor (SM), or AMD's compute unit. Sources:

    NVIDIA's cores   CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; how registers are
                     allocated: `cuda_occupancy.h` of the CUDA Toolkit
    AMD's cores      LLVM, "User Guide for AMDGPU Backend" (registers), and the CDNA 3 ISA guide (shared memory)
    rates            data sheets "NVIDIA H100 Tensor Core GPU" and "NVIDIA H200 Tensor Core GPU" for the SXM modules;
                     rates with sparsity are halved
    how many cores   white paper "NVIDIA H100 Tensor Core GPU Architecture"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KIB = 1 << 10


@dataclass(frozen=True)
class Architecture:
    """One instruction set, and the limits of one core that runs it.

    Attributes:
        name: as Triton's options and `nvdisasm` have it.
        gpus: examples of GPUs that have it.
        backend: ``"cuda"`` or ``"hip"``.
        warp_size: threads of a warp.
        warps: how many warps a core holds.
        programs: how many programs a core holds.
        warp_registers: how many warps' registers a core holds, in registers of a thread.
        register_unit: registers of a thread are allocated in multiples of this.
        shared: bytes of shared memory of a core.
        program_shared: the most bytes of shared memory of one program.
        reserved_shared: bytes that the system takes for each program.
    """

    name: str
    gpus: str
    backend: str
    warp_size: int
    warps: int
    programs: int
    warp_registers: int
    register_unit: int
    shared: int
    program_shared: int
    reserved_shared: int

    def occupancy(self, registers: int, shared: int, threads: int) -> float:
        """Return the share of a core's warps that programs with these resources can fill."""
        schedulers = 4  # of a core, each with its own registers and warps
        warps = threads // self.warp_size
        allocated = -(-max(registers, 1) // self.register_unit) * self.register_unit
        by_registers = schedulers * min(self.warp_registers // schedulers // allocated, self.warps // schedulers)
        by_shared = self.shared // max(shared + self.reserved_shared, 1)
        return min(by_registers // warps, by_shared, self.programs) * warps / self.warps


def _nvidia(name: str, gpus: str, shared: int) -> Architecture:
    """Return an architecture of NVIDIA whose cores differ from others' only in their shared memory, in KiB."""
    return Architecture(name, gpus, "cuda", 32, 64, 32, 2048, 8, shared * KIB, (shared - 1) * KIB, KIB)


ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _nvidia("sm_80", "A100", 164),
        _nvidia("sm_90", "H100, H200", 228),
        _nvidia("sm_100", "B200", 228),
        Architecture("gfx942", "MI300X", "hip", 64, 32, 16, 2048, 8, 64 * KIB, 64 * KIB, 0),
    )
}


@dataclass(frozen=True)
class Rates:
    """What a GPU can do at most, by its data sheet.

    Attributes:
        cores: how many cores it has.
        bytes_per_second: of its memory.
        flops_per_second: of each kind of arithmetic: "FFMA" in float32, and tensor cores by the type of the operands.
    """

    cores: int
    bytes_per_second: float
    flops_per_second: Mapping[str, float]


_HOPPER = {"FFMA": 67e12, "TF32": 494.5e12, "BF16": 989.5e12, "F16": 989.5e12}
RATES: Mapping[str, Rates] = {"H100": Rates(132, 3.35e12, _HOPPER), "H200": Rates(132, 4.8e12, _HOPPER)}
"""The devices of `roofline.predicted_seconds`, which run sm_90."""
