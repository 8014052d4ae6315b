"""What compiling a Triton kernel must come to: registers, spills and shared memory against their budgets. Text only."""

import re
from dataclasses import dataclass

# KiB of shared memory that a block may have: CUDA C++ Programming Guide, technical specifications per capability.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227}
# Bytes a thread may spill, stores or loads, whichever are more: a little above what was seen. The plain kernels spill
# nothing or next to it; most is where options meet, decay and documents in the gradients of grouped heads.
SPILL_BUDGET = {
    "bfloat16": {"prepare": 0, "scan": 48, "reverse_scan": 0, "gradients": 320},
    "float16": {"prepare": 16, "scan": 144, "reverse_scan": 64, "gradients": 320},
}


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

    def violations(self) -> list[str]:
        """What it breaks of the budgets, a sentence each."""
        spilled, budget = max(self.spill_stores, self.spill_loads), SPILL_BUDGET[self.dtype][self.kernel]
        limit = SHARED_KIB[self.capability]
        found = []
        if spilled > budget:
            found.append(f"{self.kernel} spills {spilled} bytes a thread, {budget} allowed")
        if self.shared_bytes > limit << 10:
            found.append(f"{self.kernel} takes {self.shared_bytes} bytes of shared memory, {limit} KiB allowed")
        return found

    def __str__(self):
        return (
            f"{self.kernel:12} {self.warps} warps, {self.registers:3} registers,"
            f" spills {self.spill_stores}/{self.spill_loads}, {self.shared_bytes / 1024:.1f} KiB shared"
        )


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
