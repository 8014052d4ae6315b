"""Compiles the Triton kernels for GPUs that are not there: those that a `call` for `pallas_kernels.triton.launch` saw.

Registers and spills are what NVIDIA's assembler, which ships with Triton, reports when Triton runs it.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from experiments.kernels.triton_report import Compiled, assembler_report
from pallas_kernels.triton.gradients import gradients, reverse_scan
from pallas_kernels.triton.launch import Call
from pallas_kernels.triton.prepare import prepare
from pallas_kernels.triton.scan import scan

_POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}
_KERNELS = {kernel.__name__: kernel for kernel in (prepare, scan, reverse_scan, gradients)}


@dataclass(frozen=True)
class Kernel:
    """All that the code of a launch depends on: launches that agree in it need compiling once."""

    name: str
    dtype: str  # of query, key and value
    capability: int
    types: tuple[str, ...]  # of the arguments, by Triton's names
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int


def recorder(capability: int, dtype: str, seen: Callable[[Kernel], None]) -> Call:
    """A `call` that hands `seen` the kernel of every launch, and returns zeros."""

    def call(launch, /):
        pointer = lambda x: _POINTERS[jnp.dtype(x.dtype).name]
        types = [*map(pointer, launch.inputs), *["i32"] * len(launch.sizes), *map(pointer, launch.outputs)]
        name, constants, tile = launch.kernel.__name__, tuple(sorted(launch.constants.items())), launch.tile
        seen(Kernel(name, dtype, capability, tuple(types), constants, tile.warps, tile.stages))
        return tuple(np.zeros(x.shape, x.dtype) for x in launch.outputs)

    return call


def compiled(kernel: Kernel) -> Compiled:
    """Compiles for a GPU that need not be there. Arguments are specialised as jax-triton does: arrays are aligned to 16
    bytes, nothing is known of sizes."""
    function = _KERNELS[kernel.name]
    signature = dict(zip(function.arg_names, kernel.types, strict=False))
    signature |= dict.fromkeys(dict(kernel.constants), "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.types) if name.startswith("*")}
    printed = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(printed):
        knobs.compilation.always_compile = True  # what comes from Triton's cache comes without the assembler's report
        knobs.nvidia.dump_ptxas_log = True
        binary = triton.compile(
            ASTSource(function, signature, dict(kernel.constants), aligned),
            target=GPUTarget("cuda", kernel.capability, 32),
            options=dict(num_warps=kernel.warps, num_stages=kernel.stages),
        )
    used = assembler_report(printed.getvalue())
    return Compiled(kernel.name, kernel.dtype, kernel.capability, kernel.warps, *used, binary.metadata.shared)
