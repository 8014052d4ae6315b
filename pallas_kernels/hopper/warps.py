"""Tiles of a warpgroup by its registers: products of 16×16 blocks, one a warp, without a wait and shared memory.

wgmma shares its right operand among the four warps of a warpgroup and is waited for; here each warp multiplies its own
blocks with `mma.sync`. Pallas's `plgpu.mma` would share the right operand too, so the instructions are written here.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.hopper.mosaic import CHUNK, F32, TILE, interpreting

BLOCK = 16


def block_products(x, y):
    """x_b @ y_b for the four blocks of x and y, [C, 16] float16, blocks one below the other: [C, 16] float32."""
    if interpreting():
        blocks = lambda z: z.astype(F32).reshape(CHUNK // BLOCK, BLOCK, BLOCK)
        return jnp.matmul(blocks(x), blocks(y), precision=jax.lax.Precision.HIGHEST).reshape(CHUNK, BLOCK)
    result = plgpu.ShapeDtypeStruct((CHUNK, BLOCK), F32, layout=TILE)
    return plgpu.inline_mgpu(arg_types=(TILE, TILE), return_type=result)(_block_products)(x, y)


def joined(blocks):
    """Tiles [C, 16] side by side, [C, 64]: one store to shared memory, and not four with a barrier each."""
    if interpreting():
        return jnp.concatenate(blocks, axis=1)
    shape = CHUNK, BLOCK * len(blocks)
    result = plgpu.ShapeDtypeStruct(shape, blocks[0].dtype, layout=TILE)
    return plgpu.inline_mgpu(arg_types=(TILE,) * len(blocks), return_type=result)(_joined)(*blocks)


def _joined(_, *blocks):
    registers = np.concatenate([block.registers for block in blocks], axis=1)
    return mgpu.FragmentedArray(_registers=registers, _layout=blocks[0].layout, _is_signed=None)


def _block_products(_, x, y):
    """As above, in registers.

    A thread has of a block two neighbours in a row of each 8×8 quarter; flat: upper left, lower left, upper right,
    lower right. That is a left operand, and an accumulator. A right operand holds neighbours in a column: each quarter
    is transposed.
    """
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    left: list[Any] = [mgpu.utils.bitcast(register, i32) for register in x.registers.flat]
    right: list[Any] = [_transposed(mgpu.utils.bitcast(register, i32)) for register in y.registers.flat]
    zero: Any = mgpu.c(0.0, f32)
    out = []
    for half in right[:2], right[2:]:  # eight columns each
        four: Any = llvm.inline_asm(
            ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>"),
            [*left, *half, zero],
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$10,$10,$10};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f",
        )
        numbers = [llvm.extractvalue(f32, four, [i]) for i in range(4)]
        out += [_pair(*numbers[:2]), _pair(*numbers[2:])]
    return mgpu.FragmentedArray(
        _registers=np.asarray(out, dtype=object).reshape(x.registers.shape), _layout=x.layout, _is_signed=None
    )


def _transposed(quarter: Any) -> Any:
    """An 8×8 matrix of 16-bit numbers that the threads of a warp hold two neighbours each of."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [quarter], "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r")


def _pair(first, second):
    i32 = ir.IntegerType.get_signless(32)
    pair: Any = llvm.mlir_undef(ir.VectorType.get((2,), first.type))
    positions: list[Any] = [mgpu.c(i, i32) for i in range(2)]
    for number, position in zip((first, second), positions, strict=True):
        pair = llvm.insertelement(pair, number, position=position)
    return pair
