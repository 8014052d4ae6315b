"""Compiles every Hopper kernel for sm_90a where there is no GPU, and holds the compiler's report to the budget.

python -m experiments.kernels.compile_gpu [--only=SUBSTRING] [--dump=DIR]

runs in the environment of `make check-gpu-compile`: jax with its CUDA plugin and NVIDIA's assembler. It prints a line
per kernel (registers, bytes spilled, shared memory, …) and exits with 1 when one breaks the budget of
`compile_report.py`, does not compile, or has no report. Under `set_max_registers` the assembler's register count is
that of the launch; spills are real.

For any function of arrays:

    from experiments.kernels.compile_gpu import show
    show(function, jax.ShapeDtypeStruct((8, 2048, 16, 128), jax.numpy.bfloat16), ...)
"""

import argparse
import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import jax
from jax.experimental import topologies

from experiments.kernels.compile_report import (
    SPILL_BUDGET,
    MissingReport,
    VariantReport,
    read_reports,
    table,
    target_config,
)


def compile_variant(
    name: str, direction: str, function: Callable, arguments: tuple, dump: Path | None = None
) -> VariantReport:
    """Compiles function for an H100 and reports on its kernels; arguments are trees of shapes (None has none).

    A failure to lower or to compile becomes the report's error. PTX, the assembler's output and SASS go to the file
    "dump/name direction.txt" if dump is given. Raises ValueError for a direction that has no budget.
    """
    if direction not in SPILL_BUDGET:
        raise ValueError(f"direction: expected one of {list(SPILL_BUDGET)}, got {direction!r}")
    begun = time.perf_counter()
    error, kernels = None, ()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            printed = _compile(function, arguments, Path(scratch), disassemble=dump is not None)
            if dump is not None:
                dump.mkdir(parents=True, exist_ok=True)
                (dump / f"{name.replace('/', '_')} {direction}.txt").write_text(printed)
            kernels = tuple(read_reports(printed, Path(scratch)))
        except MissingReport as missing:
            error = f"report missing: {missing}"
        except Exception as failure:  # of any kind: the other variants are still to be reported on
            traceback.print_exception(failure)
            error = f"{type(failure).__name__}: {failure}"
    return VariantReport(name, direction, kernels, time.perf_counter() - begun, error)


def _compile(function: Callable, arguments: tuple, folder: Path, disassemble: bool) -> str:
    """What Mosaic GPU prints on compiling function; its files of the lowering go to folder."""
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target_config())
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
    anew = lambda *xs: function(*xs)  # a function seen before would not be lowered again, and leave no report
    traced = jax.jit(anew).trace(*jax.tree.map(place, arguments))
    with _mosaic_gpu(DUMP_TO=str(folder)):
        lowered = traced.lower()
    # Not DUMP_TO: besides what is needed it writes the module after every pass, which takes longer than compiling.
    printed = folder / "printed"
    sass = {"DUMP_SASS": "1"} if disassemble else {}  # "0" would ask for it too
    with _mosaic_gpu(DUMP_PTX="1", DUMP_PTXAS="1", **sass), _stdout_to(printed):
        lowered.compile()
    return printed.read_text()


@contextlib.contextmanager
def _mosaic_gpu(**settings: str) -> Generator[None]:
    """Environment variables of Mosaic GPU, which it reads anew for every kernel."""
    names = {f"MOSAIC_GPU_{name}": value for name, value in settings.items()}
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


@contextlib.contextmanager
def _stdout_to(path: Path) -> Generator[None]:
    """Sends to a file what C++ code prints, which knows nothing of `sys.stdout`."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    kept = os.dup(1)
    try:
        with path.open("wb") as file:
            os.dup2(file.fileno(), 1)
            try:
                yield
            finally:
                flush(None)
                os.dup2(kept, 1)
    finally:
        os.close(kept)


# Nothing here may touch a GPU, not even to ask of what kind it is, as the kernels do on tracing; nor take a compilation
# from a cache: the assembler would say nothing.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_compilation_cache", False)


def show(function: Callable, *arguments, direction: str = "forward", dump: str | None = None) -> None:
    """Compiles one function, prints the table and what breaks the budget."""
    name = getattr(function, "__name__", "function")
    report = compile_variant(name, direction, function, arguments, Path(dump) if dump else None)
    print("\n".join([table([report]), *report.violations()]))


def _assembler() -> str:
    """Version of the assembler that Mosaic GPU takes: the one of NVIDIA's package beside JAX."""
    roots = [Path(path) / "nvidia" for path in sys.path]
    found = next((path for root in roots for path in root.glob("*/bin/ptxas")), None)
    if found is None:
        return "ptxas not found beside jax"
    return subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]


def compile_all(variants: Iterable[tuple[str, str, Callable, tuple]], only: str, dump: Path | None) -> int:
    """Compiles those of the variants (name, direction, function, arguments) that `only` picks; the exit status."""
    print(f"jax {jax.__version__}, assembler {_assembler()}, target sm_90a of an H100", flush=True)
    reports, begun = [], time.perf_counter()
    for name, direction, function, arguments in variants:
        if only in f"{name} {direction}":
            reports.append(compile_variant(name, direction, function, arguments, dump))
            print(table(reports[-1:]).partition("\n")[2], flush=True)
    broken = [line for report in reports for line in report.violations()]
    kernels = sum(len(report.kernels) for report in reports)
    print(f"\n{table(reports)}\n\n{len(reports)} variants, {kernels} kernels, {time.perf_counter() - begun:.0f} s")
    print("\n".join(f"FAILED {line}" for line in broken) if broken else "all within the budget")
    return int(bool(broken) or not reports)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles the Hopper kernels and checks the compiler's report.")
    parser.add_argument("--only", default="", help="compile the variants whose name or direction holds this text")
    parser.add_argument(
        "--dump", type=Path, help="folder that gets a file of PTX, assembler's output and SASS for each variant"
    )
    given = parser.parse_args()
    from pallas_kernels.hopper import variants  # here: `show` needs none of them

    sys.exit(compile_all(variants(), given.only, given.dump))


if __name__ == "__main__":
    main()
