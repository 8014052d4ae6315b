"""What compiling a Triton kernel must come to: registers, spills and shared memory against their budgets. Text only."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from experiments.kernels.compile_report import SPILL_BUDGET

# KiB of shared memory that a block may have: CUDA C++ Programming Guide, technical specifications per capability.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227}
DIRECTION = {"prepare": "forward", "scan": "forward", "reverse_scan": "backward", "gradients": "backward"}


@dataclass(frozen=True)
class Compiled:
    """One kernel as it was compiled. Registers and spills are those of a thread, shared_bytes of a block."""

    kernel: str
    dtype: str
    capability: int
    warps: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int

    @property
    def spilled(self) -> int:
        """Bytes a thread, stores or loads, whichever are more."""
        return max(self.spill_stores, self.spill_loads)

    def violations(self) -> list[str]:
        """What it breaks of the budgets, a sentence each."""
        budget, limit = SPILL_BUDGET[DIRECTION[self.kernel]], SHARED_KIB[self.capability]
        found = []
        if self.spilled > budget:
            found.append(f"{self.kernel} spills {self.spilled} bytes a thread, {budget} allowed")
        if self.shared_bytes > limit << 10:
            found.append(f"{self.kernel} takes {self.shared_bytes} bytes of shared memory, {limit} KiB allowed")
        return found

    def __str__(self):
        return (
            f"{self.kernel:12} {self.warps} warps, {self.registers:3} registers,"
            f" spills {self.spill_stores}/{self.spill_loads}, {self.shared_bytes / 1024:.1f} KiB shared"
        )


def summary(kernels: Iterable[Compiled]) -> list[str]:
    """Of every kernel, architecture and type what spills most and takes most shared memory, a line each."""
    groups: dict[tuple[str, int, str], list[Compiled]] = {}
    for x in kernels:
        groups.setdefault((x.kernel, x.capability, x.dtype), []).append(x)
    return [
        f"{kernel:12} sm_{capability} {dtype:8} spills {max(x.spilled for x in group):3} bytes,"
        f" {max(x.shared_bytes for x in group) / 1024:5.1f} KiB shared"
        for (kernel, capability, dtype), group in sorted(groups.items())
    ]


def assembler_report(text: str) -> tuple[int, int, int]:
    """(registers, bytes of spill stores, of spill loads) of the one kernel that `ptxas -v` tells of.

    Raises:
        ValueError: it tells of none, or of several.
    """
    registers = re.findall(r"Used (\d+) registers", text)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    if len(registers) != 1 or len(spills) != 1:
        raise ValueError(f"expected one kernel in the assembler's report:\n{text}")
    return int(registers[0]), int(spills[0][0]), int(spills[0][1])
