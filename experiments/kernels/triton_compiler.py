"""Compiles the Triton kernels for GPUs that are not there: a `call` for `pallas_kernels.triton.launch`.

Registers and spills are what NVIDIA's assembler, which ships with Triton, reports for the kernel's PTX.
"""

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from experiments.kernels.triton_report import Compiled, assembler_report
from pallas_kernels.triton.launch import Call

_POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}


def _assemble(ptx: str, capability: int) -> tuple[int, int, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={architecture}",
            path,
            "-o",
            path.with_suffix(".cubin"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr}")
    return assembler_report(done.stderr)


def compiler(capability: int, dtype: str, seen: Callable[[Compiled], None]) -> Call:
    """A `call` that compiles every launch for sm_`capability`, hands `seen` the report, and returns zeros.

    dtype is that of query, key and value. Arguments are specialised as jax-triton does: arrays are aligned to 16 bytes,
    nothing is known of sizes.
    """

    def call(launch, /):
        pointer = lambda x: _POINTERS[jnp.dtype(x.dtype).name]
        types = [*map(pointer, launch.inputs), *["i32"] * len(launch.sizes), *map(pointer, launch.outputs)]
        signature = dict(zip(launch.kernel.arg_names, types, strict=False))
        signature |= dict.fromkeys(launch.constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name.startswith("*")}
        kernel = triton.compile(
            ASTSource(launch.kernel, signature, dict(launch.constants), aligned),
            target=GPUTarget("cuda", capability, 32),
            options=dict(num_warps=launch.tile.warps, num_stages=launch.tile.stages),
        )
        registers, stores, loads = _assemble(kernel.asm["ptx"], capability)
        name, warps = launch.kernel.__name__, launch.tile.warps
        seen(Compiled(name, dtype, capability, warps, registers, stores, loads, kernel.metadata.shared))
        return tuple(np.zeros(x.shape, x.dtype) for x in launch.outputs)

    return call
