"""Compiles the TPU kernels where there is no TPU, for five generations, and reports on what the compiler makes of them.

python -m experiments.kernels.compile_tpu [--parts=variants,step,schedule] [--only=SUBSTRING] [--generations=v4,v5e,…]

runs in the environment of `make check-tpu-compile`: jax with the libtpu that belongs to it. Exits with 1 when anything
does not compile, which is so when a kernel needs more VMEM than its TPU has, or breaks what is stated here.

variants: every kernel of `pallas_kernels.tpu.variants`, for every generation.
step: a training step of the 340M model on meshes of 4x4 chips, with its memory and its collectives: none gathers
    activations, neither along heads nor along rows.
schedule: bundles per token and value head of this library's kernels, of `xla` and of deltanet-tpu, and how much of the
    matrix units they use; see README.md for what these counts say.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from experiments.kernels.tpu_schedule import init_args

PARTS = ("variants", "step", "schedule")
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
MESHES = {"v5e": "v5e:4x4", "v6e": "v6e:4x4"}


def check_variants(generations: list[str], only: str) -> list[str]:
    """Compiles every variant; what failed, a sentence each."""
    from experiments.kernels.tpu_programs import compile_for
    from pallas_kernels import tpu

    failed = []
    variants = [variant for variant in tpu.variants() if only in variant[0]]
    for generation in generations:
        begun = time.perf_counter()
        for name, _, function, arguments in variants:
            try:
                compile_for(TOPOLOGIES[generation], function, *arguments)
            except Exception as error:  # of any kind: the other variants are still to be compiled
                failed.append(f"{name} for {generation}: {type(error).__name__}: {str(error)[:300]}")
                print(failed[-1], flush=True)
        seconds = time.perf_counter() - begun
        print(f"{generation}: {len(variants)} kernels in {seconds:.0f} s, {len(failed)} failed so far", flush=True)
    return failed


def check_step(generations: list[str]) -> list[str]:
    """Compiles the training step for a mesh; what is wrong with it."""
    from experiments.kernels.tpu_programs import ROW, compiled_step
    from experiments.kernels.tpu_schedule import collectives

    wrong = []
    for generation in generations:
        if generation not in MESHES:
            continue
        compiled, mesh = compiled_step(MESHES[generation])
        memory, text = compiled.memory_analysis(), compiled.as_text()
        found = collectives(text)
        mebibytes = lambda size: f"{size / 2**20:.0f} MiB"
        kernels = text.count('custom_call_target="tpu_custom_call"')
        print(
            f"340M training step on {MESHES[generation]}, mesh {dict(mesh.shape)}: per chip "
            f"{mebibytes(memory.argument_size_in_bytes)} of arguments, {mebibytes(memory.temp_size_in_bytes)} of "
            f"temporaries; {kernels} kernel calls; {dict(Counter(kind for kind, _ in found))}"
        )
        moved = Counter((kind, shape) for kind, shapes in found for shape in shapes if len(shape) > 1)
        for (kind, shape), count in sorted(moved.items()):
            print(f"    {kind} of {shape} x {count}")
        for kind, shapes in found:
            tokens = [shape for shape in shapes if any(size % ROW == 0 for size in shape)]
            if kind in ("all-gather", "all-to-all") and tokens:
                wrong.append(f"step for {generation}: {kind} of activations {tokens}")
        if not kernels:
            wrong.append(f"step for {generation}: no kernel in it")
    return wrong


def check_schedule(generations: list[str], only: str) -> list[str]:
    """Prints the table of bundles, each program compiled in a process of its own, whose dump is then read."""
    from experiments.kernels.tpu_programs import HEADING, programs

    wrong = []
    print("\n".join(HEADING), flush=True)
    for name in programs():
        if only not in name:
            continue
        for generation in generations:
            with tempfile.TemporaryDirectory() as folder:
                environment = os.environ | {"LIBTPU_INIT_ARGS": init_args(Path(folder))}
                command = [sys.executable, "-m", "experiments.kernels.tpu_programs", name, generation, folder]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
            row = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
            if not row and name.startswith("deltanet-tpu"):  # another project's: what it does not compile is a result
                row = [f"| {name} | {generation} | does not compile | | | | | |"]
            if not row:
                wrong.append(f"{name} for {generation}: {done.stderr.strip().splitlines()[-1:]}")
            print(*row, sep="\n", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles the TPU kernels and checks what the compiler says.")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to do, of " + ", ".join(PARTS))
    parser.add_argument("--only", default="", help="variants and programs whose name holds this text")
    parser.add_argument("--generations", default=",".join(TOPOLOGIES), help="of " + ", ".join(TOPOLOGIES))
    given = parser.parse_args()
    parts, generations = given.parts.split(","), given.generations.split(",")
    unknown = [x for x in parts if x not in PARTS] + [x for x in generations if x not in TOPOLOGIES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    wrong = []
    if "variants" in parts:
        wrong += check_variants(generations, given.only)
    if "step" in parts:
        wrong += check_step(generations)
    if "schedule" in parts:
        wrong += check_schedule(generations, given.only)
    print("\n".join(f"FAILED {line}" for line in wrong) if wrong else "all as it should be")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
