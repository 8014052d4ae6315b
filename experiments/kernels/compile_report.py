"""What the compiler says of a kernel, and the budget that holds it. Reads text only, so it runs anywhere.

Asked to, Mosaic GPU prints for each kernel that it compiles the PTX and, after it, what NVIDIA's assembler says; and
writes, when a kernel is lowered, the module with its launch to a file `NAME_0.after_layout_inference.txt`. Read from
them: registers, bytes spilled, shared memory, barriers, and the assembler's complaints.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# Bytes a thread may spill, stores or loads, whichever are more.
SPILL_BUDGET = {"forward": 0, "backward": 128}
# Codes of "Potential Performance Loss" that are no failure. ptxas prints one when it makes wgmmas wait for each other
# (C7510 to C7520, by reason) and when it ignores setmaxnreg: both cost a kernel most of its speed.
ALLOWED_LOSSES: frozenset[str] = frozenset()

_TARGET = (Path(__file__).parent / "h100.txtpb").read_text()
_RESERVED_SHARED_BYTES = 1024  # that CUDA keeps of every block's


def target_config() -> str:
    """The H100 as XLA's GpuTargetConfigProto in text."""
    return _TARGET


def device_limit(field: str) -> int:
    """An integer field of the target, such as `registers_per_core_limit`."""
    (value,) = re.findall(rf"^\s*{field}: (\d+)$", _TARGET, re.MULTILINE)
    return int(value)


class MissingReport(ValueError):
    """The compiler did not say what is needed."""


@dataclass(frozen=True)
class KernelReport:
    """One compiled kernel. Registers and bytes of spills and stack are those of a thread."""

    kernel: str
    registers: int  # at launch; setmaxnreg moves them between warpgroups later
    set_registers: tuple[int, ...]  # what each setmaxnreg of the code asks for
    threads: int  # of a block
    stack: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int  # of a block
    barriers: int  # named ones, of 16
    losses: tuple[str, ...]  # lines that tell of lost performance
    notes: tuple[str, ...]  # codes of the other remarks

    @property
    def blocks_per_sm(self) -> int:
        """How many blocks fit on a multiprocessor at once."""
        registers = -(-self.registers // 8) * 8 * self.threads
        return min(
            device_limit("registers_per_core_limit") // registers,
            device_limit("threads_per_core_limit") // self.threads,
            device_limit("shared_memory_per_core") // (self.shared_bytes + _RESERVED_SHARED_BYTES),
        )

    def violations(self, direction: str) -> list[str]:
        """What of the budget for direction, "forward" or "backward", it breaks."""
        budget, spilled = SPILL_BUDGET[direction], max(self.spill_stores, self.spill_loads)
        broken = []
        if spilled > budget:
            broken.append(f"spills {spilled} bytes a thread, {budget} allowed {direction}")
        broken += [line for line in self.losses if not ALLOWED_LOSSES.intersection(_codes(line))]
        if self.blocks_per_sm < 1:
            broken.append("no block fits on a multiprocessor")
        return broken


def _codes(line: str) -> list[str]:
    return re.findall(r"\((C\d+)\)", line)


def _only(pattern: str, text: str, what: str) -> tuple[str, ...]:
    """The groups of the one match of pattern."""
    found = list(re.finditer(pattern, text))
    if len(found) != 1:
        raise MissingReport(f"{what}: expected once, found {len(found)} times")
    return found[0].groups()


def _read_kernel(text: str) -> KernelReport:
    """The report from one kernel's PTX and the assembler's output; shared_bytes is 0, for neither tells it."""
    (entry,) = _only(r"Compiling entry function '([^']+)' for 'sm_90a'", text, "entry function for sm_90a")
    registers, barriers = _only(r"Used (\d+) registers(?:, used (\d+) barriers)?", text, "registers")
    (threads,) = _only(r"\.maxntid (\d+)(?:, 1)*\s", text, "threads of a block")
    # functions that were not inlined have a line each
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    if not frames:
        raise MissingReport("spills: not reported")
    stack, stores, loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
    remarks = [line.strip() for line in text.splitlines() if line.startswith("ptxas")]
    losses = [line for line in remarks if "Performance Loss" in line or "serialized" in line]
    return KernelReport(
        kernel=entry.removesuffix("_mosaic_gpu_kernel"),
        registers=int(registers),
        set_registers=tuple(map(int, re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32 (\d+)", text))),
        threads=int(threads),
        stack=stack,
        spill_stores=stores,
        spill_loads=loads,
        shared_bytes=0,
        barriers=int(barriers or 0),
        losses=tuple(losses),
        notes=tuple(sorted({code for line in remarks if line not in losses for code in _codes(line)})),
    )


def _read_launches(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes of shared memory) of every kernel that was lowered."""
    launches = []
    for path in folder.glob("*.after_layout_inference.txt"):
        name = path.name.partition(".")[0].rpartition("_")[0]
        (shared,) = _only(r"dynamic_shared_memory_size %c(\d+)_i32", path.read_text(), f"shared memory of {name}")
        launches.append((name, int(shared)))
    return launches


def read_reports(printed: str, folder: Path) -> list[KernelReport]:
    """The reports of all kernels of a program, in the order in which they were compiled.

    Args:
        printed: what Mosaic GPU printed while compiling, with PTX.
        folder: where it wrote its files while lowering.

    Raises:
        MissingReport: there is no kernel, one was lowered but not compiled, or what is read of one is not there.
    """
    reports = [_read_kernel(text) for text in printed.split("// Generated by LLVM NVPTX Back-End")[1:]]
    launches = _read_launches(folder)
    if not launches:
        raise MissingReport("no Mosaic GPU kernel was lowered")
    lowered, compiled = Counter(name for name, _ in launches), Counter(report.kernel for report in reports)
    if lowered != compiled:
        raise MissingReport(f"lowered {dict(lowered)}, but compiled {dict(compiled)}")
    # Kernels are compiled in another order than lowered: of several with one name each is given the most.
    shared = {name: max(size for other, size in launches if other == name) for name in lowered}
    return [replace(report, shared_bytes=shared[report.kernel]) for report in reports]


@dataclass(frozen=True)
class VariantReport:
    """What became of one variant: its kernels, or why there are none."""

    name: str
    direction: str
    kernels: tuple[KernelReport, ...]
    seconds: float
    error: str | None = None

    def violations(self) -> list[str]:
        """What it breaks of the budget, a sentence each."""
        if self.error is not None:
            return [f"{self.name}: {self.error}"]
        broken = [(kernel.kernel, line) for kernel in self.kernels for line in kernel.violations(self.direction)]
        return [f"{self.name}, {kernel}: {line}" for kernel, line in broken]


_COLUMNS = (
    *("variant", "direction", "kernel", "registers", "set to", "spill st/ld", "stack", "shared KiB", "threads"),
    *("blocks/SM", "barriers", "remarks", "seconds"),
)


def _rows(variant: VariantReport) -> Iterable[Sequence[str]]:
    if variant.error is not None:
        yield variant.name, variant.direction, "failed", *[""] * 9, f"{variant.seconds:.1f}"
    for place, kernel in enumerate(variant.kernels):
        losses = {code for line in kernel.losses for code in _codes(line) or ["loss"]}
        yield (
            *(variant.name, variant.direction, kernel.kernel, str(kernel.registers)),
            "/".join(map(str, kernel.set_registers)),
            f"{kernel.spill_stores}/{kernel.spill_loads}",
            *(str(kernel.stack), f"{kernel.shared_bytes / 1024:.1f}", str(kernel.threads)),
            *(str(kernel.blocks_per_sm), str(kernel.barriers)),
            " ".join([*(f"{code}!" for code in sorted(losses)), *kernel.notes]),
            "" if place else f"{variant.seconds:.1f}",
        )


def table(variants: Iterable[VariantReport]) -> str:
    """One line per kernel, in columns."""
    rows = [_COLUMNS, *(row for variant in variants for row in _rows(variant))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
