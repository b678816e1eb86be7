"""What a compiled kernel takes, and what would be wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from perf.machine_code.gpus import ARCHITECTURES, Architecture


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes.

    Attributes:
        registers: of a thread; on AMD the vector registers.
        spilled: bytes of a thread for registers that did not fit: its stack and local memory, on AMD its scratch.
        shared: bytes of shared memory.
        threads: of a program.
        dots: the operands of each kind of matrix product that the kernel asks for, and the precision if it is not ieee.
        instructions: how many the code has of each kind (see `instructions`).
    """

    registers: int
    spilled: int
    shared: int
    threads: int
    dots: list[str]
    instructions: Mapping[str, int]

    def occupancy(self, architecture: Architecture) -> float:
        """Return the share of a core's warps that programs can fill."""
        return architecture.occupancy(self.registers, self.shared, self.threads)


Matrix = Mapping[str, Mapping[str, Resources]]
"""The resources by the name of the architecture, and by the name of the configuration."""


def faults(matrix: Matrix) -> list[str]:
    """Return what is wrong with compiled kernels: spilled registers, too much shared memory, or no code."""
    found = []
    for target, by_name in matrix.items():
        most = ARCHITECTURES[target].program_shared
        for name, entry in by_name.items():
            where = f"{name} on {target}"
            if entry.spilled or {"LDL", "STL"} & entry.instructions.keys():
                found.append(f"{where} spills {entry.spilled} bytes of a thread")
            if entry.shared > most:
                found.append(f"{where} takes {entry.shared} bytes of shared memory; a program has at most {most}")
            if not any(kind.startswith("STG") for kind in entry.instructions):
                found.append(f"{where} is empty: the compiler dropped every store")
    return found
