"""What the TPU compiler's dumps say of a program: bundles, units in use, cycles. Reads text only, so it runs anywhere.

A bundle is what a core issues in one cycle unless it waits. A kernel or fusion has one file of the dump with a row for
each bundle, the slots of each unit that it uses. Loops stand in it once, also that over the grid.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIX = "final_hlo-static-per-bundle-utilization.txt"
FLAGS = (
    "--xla_jf_dump_to={folder}",
    "--xla_jf_dump_hlo_text=true",
    "--xla_jf_dump_llo_text=true",
    "--xla_jf_emit_annotations=true",
)


def init_args(folder: Path) -> str:
    """LIBTPU_INIT_ARGS of a process whose compilations are dumped to folder; read when libtpu is loaded."""
    return " ".join(FLAGS).format(folder=folder)


@dataclass(frozen=True)
class Schedule:
    """The program of one HLO operation."""

    name: str
    bundles: int
    used: dict[str, int]  # slots of each unit, over all bundles
    capacity: dict[str, int]  # slots of each unit in a bundle

    def use(self, unit: str) -> float:
        """The share of a unit's slots that is used."""
        return self.used[unit] / (self.bundles * self.capacity[unit])


def read_schedule(name: str, text: str) -> Schedule:
    """From a file of the dump: a line of names, one of capacities, then a row for each bundle."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("==")]
    units = [unit.strip() for unit in lines[0].split(",")]
    capacity, *rows = ([int(number) for number in line.split()] for line in lines[1:])
    if any(len(row) != len(units) for row in (capacity, *rows)):
        raise ValueError(f"{name}: {len(units)} units, but rows of other lengths")
    used = [sum(column) for column in zip(*rows, strict=True)] if rows else [0] * len(units)
    return Schedule(name, len(rows), dict(zip(units, used, strict=True)), dict(zip(units, capacity, strict=True)))


def schedules(folder: Path) -> dict[str, Schedule]:
    """Of every operation that was compiled, by its name in HLO."""
    found = {}
    for path in sorted(folder.glob(f"*-{SUFFIX}")):
        match = re.fullmatch(rf"\d+-(.+)-\d+-{SUFFIX}", path.name)
        if match is None:
            raise ValueError(f"name of a file of the dump: {path.name}")
        found[match[1]] = read_schedule(match[1], path.read_text())
    return found


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation of a compiled module, and the name of the one that is entered."""
    found: dict[str, list[str]] = defaultdict(list)
    entry = current = ""
    for line in hlo.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.<>-]+) \(.*\{\s*$", line)
        if start:
            current = start[2]
            entry = current if start[1] else entry
        elif line.startswith(" "):
            found[current].append(line)
    if not entry:
        raise ValueError("no entry computation")
    return found, entry


def operations(hlo: str, trips: int) -> Iterator[tuple[str, str, int]]:
    """(name, line, how often it runs) of what a program runs, loops opened; trips: of each `while`."""
    found, entry = _computations(hlo)

    def walk(name: str, times: int) -> Iterator[tuple[str, str, int]]:
        for line in found[name]:
            loop = re.search(r" while\(.*body=%?([\w.-]+)", line)
            if loop:
                yield from walk(loop[1], times * trips)
            elif operation := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line):
                yield operation[1], line, times

    yield from walk(entry, 1)


def estimated_cycles(hlo: str, trips: int) -> int:
    """XLA's own estimate of its fusions and copies; it has none of a kernel's."""
    cycles = lambda line: sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', line)))
    return sum(times * cycles(line) for _, line, times in operations(hlo, trips))


def issued(hlo: str, found: dict[str, Schedule], trips: int, grid_of: Callable[[str], int]) -> int:
    """Bundles of all operations, times how often they run and their grid; loops inside a fusion stand for one turn."""
    total = 0
    for name, _, times in operations(hlo, trips):
        if name in found:
            total += times * found[name].bundles * grid_of(name)
    return total


# Operations that move what several devices hold, with the result's type.
_COLLECTIVE = re.compile(
    r"= (?P<type>[^=]*?) (?P<kind>all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def collectives(hlo: str) -> list[tuple[str, list[tuple[int, ...]]]]:
    """(kind, shapes of its result) of each collective operation in the module."""
    found = []
    for line in hlo.splitlines():
        match = _COLLECTIVE.search(line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match["type"])
            found.append((match["kind"], [tuple(map(int, filter(None, shape.split(",")))) for shape in shapes]))
    return found
