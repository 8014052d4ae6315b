"""Products on the tensor cores that begin from nothing, with addresses of 32 bits.

Pallas's product begins from a tile of zeros. The assembler leaves these out, but not where a branch comes before, and
where registers are short it may put the tile where the state is. Here the first instruction is told not to add.

Where kernels are interpreted it is plain JAX.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

from pallas_kernels.hopper.mosaic import CHUNK, F32, SQUARE, TILE, interpreting
from pallas_kernels.hopper.warps import BLOCK, add, f32, i32, integer, numbers_of, pair

SWIZZLE = 128  # bytes, those of a row of a tile
_TILED = plgpu.RefType((plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(SWIZZLE)))
_STEPS = range(CHUNK // BLOCK)  # an instruction multiplies so many columns of the left operand


def times_transposed(lefts, right_s, init=None):
    """init + Σ left @ right_sᵀ, [C, C] float32, not waited for: one group, as `plgpu.wgmma_wait` counts them.

    Behind the wait `lax.optimization_barrier` keeps arithmetic on the result from being moved before it.

    Args:
        lefts: each an array [C, C] of 16 bits in TILE layout, or shared memory that holds its transpose.
        right_s: [C, C] in shared memory.
        init: [C, C] float32 or None for zeros.
    """
    if interpreting():
        total = jnp.zeros(SQUARE, F32) if init is None else init
        for left in lefts:
            left = left if isinstance(left, jax.Array) else left[...].T
            total = total + jnp.dot(left, right_s[...].T, preferred_element_type=F32)
        return total
    inputs = [right_s, *lefts] if init is None else [right_s, init, *lefts]
    types = tuple(TILE if isinstance(x, jax.Array) else _TILED for x in inputs)
    result = plgpu.ShapeDtypeStruct(SQUARE, F32, layout=TILE)
    issue = lambda _, right, *rest: _issue(right, rest) if init is None else _issue(right, rest[1:], rest[0])
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(issue)(*inputs)


# ---- MLIR ----


def _issue(right_s, lefts, init=None):
    held = iter(_fenced([x for x in (init, *lefts) if isinstance(x, mgpu.FragmentedArray)]))
    total = None if init is None else [x for register in next(held).registers.flat for x in numbers_of(register)]
    right, right_step = _descriptor(right_s, logical_k_major=True)
    dtype: Any = ir.MemRefType(right_s.type).element_type
    for left in lefts:
        if isinstance(left, mgpu.FragmentedArray):
            registers = [mgpu.utils.bitcast(register, i32()) for register in next(held).registers.flat]
            operands = [registers[4 * step : 4 * step + 4] for step in _STEPS]
        else:
            first, left_step = _descriptor(left, logical_k_major=False)
            operands = [[_advanced(first, step * left_step)] for step in _STEPS]
        for step, operand in zip(_STEPS, operands, strict=True):
            total = _product(total, operand, _advanced(right, step * right_step), dtype)
    nvvm.wgmma_commit_group_sync_aligned()
    layout, numbers = TILE.to_mgpu(), total or []
    pairs = np.asarray([pair(*numbers[i : i + 2]) for i in range(0, len(numbers), 2)], dtype=object)
    shaped = pairs.reshape(layout.registers_shape(SQUARE))
    return mgpu.FragmentedArray(_registers=shaped, _layout=layout, _is_signed=None)


def _fenced(arrays):
    """Arrays in registers, so that products may read and write them."""
    fenced = mgpu.optimization_barrier(*arrays) if arrays else []
    nvvm.wgmma_fence_aligned()
    return fenced if isinstance(fenced, list | tuple) else [fenced]


def _descriptor(ref, logical_k_major):
    """Of the transpose of ref [C, C], as a right or a left operand: (its address in 16 bytes, all else of it), and how
    many bytes the next step's part of it lies behind."""
    made: Any = mma_utils.create_descriptor(
        mgpu.memref_transpose(ref, (1, 0, 3, 2)),
        swizzle=SWIZZLE,
        large_tile=SQUARE,
        group_size=SQUARE,
        logical_k_major=logical_k_major,
        split_const=True,
    )
    ((_, rest), (_, strides)), _, _ = made
    address = llvm.lshr(llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(ref)), integer(4))
    return (address, rest), strides[0]


def _advanced(descriptor, count) -> Any:
    """The descriptor of what lies so many bytes behind, as one number."""
    i64 = ir.IntegerType.get_signless(64)
    address, rest = descriptor
    address = add(address, mma_utils.encode_addr(count)) if count else address
    signed = rest - (1 << 64 if rest >> 63 else 0)
    return llvm.or_(llvm.zext(i64, address), llvm.ConstantOp(i64, ir.IntegerAttr.get(i64, signed)).result)


def _product(total, left, right, dtype):
    """total (None: zeros) + left @ right: left four registers, or the descriptor of what is stored transposed."""
    count, begun, held = CHUNK // 2, total is not None, len(left) == 4  # numbers of a thread
    changed = total if begun else []
    behind = count + len(changed)  # number of the first operand: inputs that are tied to results have numbers too
    out = ", ".join(f"${i}" for i in range(count))
    a = ", ".join(f"${behind + i}" for i in range(len(left)))
    operands = f"{{{a}}}" if held else a
    flags = "1, 1, 0" if held else "1, 1, 1, 0"  # neither is negated; transposed in shared memory is the left one
    kind = f"m64n{CHUNK}k{BLOCK}.f32.{dtype}.{dtype}"
    ties = [*["=f"] * count, *map(str, range(len(changed))), *["r" if held else "l"] * len(left), "l"]
    result: Any = llvm.inline_asm(
        llvm.StructType.get_literal([f32()] * count),
        [*changed, *left, right],
        f"{{ .reg .pred p; setp.ne.b32 p, {int(begun)}, 0; wgmma.mma_async.sync.aligned.{kind} "
        f"{{{out}}}, {operands}, ${behind + len(left)}, p, {flags}; }}",
        ",".join(ties),
        has_side_effects=True,
    )
    return [llvm.extractvalue(f32(), result, [i]) for i in range(count)]
