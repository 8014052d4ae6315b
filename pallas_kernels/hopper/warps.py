"""Tiles of a warpgroup by its registers: what Pallas has no words for, or only with a barrier of threads more.

Of a tile [64, 64] in TILE layout a warp has 16 rows, in four blocks [16, 16]. A thread (g, t) = (lane // 4, lane % 4)
has of a block a pair of neighbours in a row of each quarter [8, 8], at row g, columns 2t and 2t + 1: upper left, lower
left, upper right, lower right. That is a left operand of `mma.sync`, and an accumulator.

Where kernels are interpreted, all of it is plain JAX.
"""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm, scf

from pallas_kernels.hopper.mosaic import CHUNK, F32, ROWS, TILE, interpreting

BLOCK = 16


def diagonal(tile):
    """The diagonal of a tile [C, C] float32, [C] in ROWS layout."""
    if interpreting():
        return jnp.diagonal(tile)
    result = plgpu.ShapeDtypeStruct((CHUNK,), F32, layout=ROWS)
    return plgpu.inline_mgpu(arg_types=(TILE,), return_type=result)(_diagonal)(tile)


def put_rows(ref, values):
    """ref[...] = values, [C] float32 in ROWS layout, without the barriers of threads before and behind it."""
    if interpreting():
        ref[...] = values
    else:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROWS))(_put_rows)(ref, values)


def put_transposed(ref, tile):
    """ref[...] = tileᵀ in device memory, number by number: Pallas stores pairs, which lie apart there."""
    if interpreting():
        ref[...] = tile.T
    else:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))(_put_transposed)(ref, tile)


def scaled_if(flag, tile, numbers_s):
    """tile [C, C] times numbers_s [C] float32 by column where flag, which all threads agree on, else as it is.

    A branch, in the registers of the tile: Pallas's takes a tile that is chosen twice.
    """
    if interpreting():
        return jnp.where(flag, tile * numbers_s[...][None], tile).astype(tile.dtype)
    result = plgpu.ShapeDtypeStruct(tile.shape, tile.dtype, layout=TILE)
    types = plgpu.Layout.WG_SPLAT(()), TILE, plgpu.RefType()
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(_scaled_if)(flag, tile, numbers_s)


def emptied_if(flag, tile):
    """Zeros where flag, else tile, float32, as `scaled_if` does."""
    if interpreting():
        return jnp.where(flag, 0.0, tile)
    result = plgpu.ShapeDtypeStruct(tile.shape, F32, layout=TILE)
    types = plgpu.Layout.WG_SPLAT(()), TILE
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(_emptied_if)(flag, tile)


# ---- MLIR: numbers ----


def i32():
    return ir.IntegerType.get_signless(32)


def f32():
    return ir.F32Type.get()


def integer(i) -> Any:
    return mgpu.c(i, i32())


def add(x, y) -> Any:
    return arith.addi(x, integer(y) if isinstance(y, int) else y)


def times(x, y) -> Any:
    return arith.muli(x, integer(y))


def less(x, y) -> Any:
    return arith.cmpi(arith.CmpIPredicate.slt, x, integer(y))


def odd(x) -> Any:
    return arith.cmpi(arith.CmpIPredicate.eq, arith.andi(x, integer(1)), integer(1))


def where(condition, x, y):
    """Of lists of equal length."""
    return [arith.select(condition, one, other) for one, other in zip(x, y, strict=True)]


def numbers_of(register):
    """Both of a pair."""
    return [llvm.extractelement(register, integer(i)) for i in range(2)]


def pair(first, second) -> Any:
    both: Any = llvm.mlir_undef(ir.VectorType.get((2,), first.type))
    for i, number in enumerate((first, second)):
        both = llvm.insertelement(both, number, position=integer(i))
    return both


def zeros():
    return pair(mgpu.c(0.0, f32()), mgpu.c(0.0, f32()))


def number_of(register) -> Any:
    """The one of a register of a ROWS layout."""
    return llvm.extractelement(register, integer(0))


def like(tile, registers):
    """A tile of registers in the order of `tile.registers.flat`."""
    shaped = np.asarray(registers, dtype=object).reshape(tile.registers.shape)
    return mgpu.FragmentedArray(_registers=shaped, _layout=tile.layout, _is_signed=None)


# ---- MLIR: threads and shared memory ----


class At:
    """Shared memory from a ref on, counted in numbers of 32 bits."""

    def __init__(self, ref: Any):
        self.base = mgpu.utils.memref_ptr(ref)

    def pointer(self, index):
        flags = llvm.GEPNoWrapFlags.none
        return llvm.getelementptr(ir.Type.parse("!llvm.ptr<3>"), self.base, [index], [-(2**31)], f32(), flags)

    def store(self, number, index):
        llvm.store(number, self.pointer(index))

    def load(self, index, count) -> Any:
        """count neighbours, at a multiple of them."""
        return llvm.load(ir.VectorType.get((count,), f32()), self.pointer(index), alignment=4 * count)


class Thread:
    """Numbers of the calling thread."""

    def __init__(self):
        # volatile, so that what is made of it is not kept in registers throughout the loop over chunks
        tid: Any = llvm.inline_asm(i32(), [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)
        self.lane = arith.andi(tid, integer(31))
        self.warp = arith.andi(arith.shrui(tid, integer(5)), integer(3))
        self.group, self.pair = arith.shrui(self.lane, integer(2)), arith.andi(self.lane, integer(3))


# ---- MLIR: what is above ----


def own_block(thread, tile):
    """The warp's block on the diagonal, of the registers of a tile [C, C]."""
    blocks = [tile[4 * i : 4 * i + 4] for i in range(4)]
    low, high = (where(less(thread.warp, i + 1), blocks[i], blocks[i + 1]) for i in (0, 2))
    return where(less(thread.warp, 2), low, high)


def _diagonal(_, tile):
    thread = Thread()
    block = own_block(thread, list(tile.registers.flat))
    source = add(times(thread.group, 4), arith.shrui(thread.group, integer(1)))
    out = []
    for register in (block[0], block[3]):
        first, second = numbers_of(register)
        mine = arith.select(odd(thread.group), second, first)
        number = nvvm.shfl_sync(integer(-1), mine, source, integer(31), nvvm.ShflKind.idx)
        one = llvm.mlir_undef(ir.VectorType.get((1,), f32()))
        out.append(llvm.insertelement(one, number, position=integer(0)))
    layout = ROWS.to_mgpu()
    registers = np.asarray(out, dtype=object).reshape(layout.registers_shape((CHUNK,)))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _put_rows(_, ref, values):
    thread, at = Thread(), At(ref)
    for half, register in enumerate(values.registers.flat):
        at.store(number_of(register), add(add(times(thread.warp, BLOCK), thread.group), half * 8))


def _put_transposed(_, ref, tile):
    tile.foreach(lambda number, at: memref.store(number, ref, at[::-1]))


def _scaled_if(_, flag, tile, numbers_s):
    kind, wide = tile.registers.flat[0].type, tile.mlir_dtype == f32()
    # through a branch as whole registers: else the halves of pairs of 16 bits would go apart
    whole = (lambda pair: pair) if wide else lambda pair: mgpu.utils.bitcast(pair, i32())

    def scaled(registers):
        thread, numbers = Thread(), At(numbers_s)
        out = []
        for column in range(0, CHUNK, 8):
            by: Any = numbers.load(add(times(thread.pair, 2), column), 2)
            for register in registers[column // 4 : column // 4 + 2]:
                full: Any = register if wide else arith.extf(by.type, mgpu.utils.bitcast(register, kind))
                product = arith.mulf(full, by)
                out.append(product if wide else whole(arith.truncf(kind, product)))
        return out

    out = _changed_if(flag, [whole(pair) for pair in tile.registers.flat], scaled)
    return like(tile, out if wide else [mgpu.utils.bitcast(register, kind) for register in out])


def _emptied_if(_, flag, tile):
    return like(tile, _changed_if(flag, list(tile.registers.flat), lambda registers: [zeros()] * len(registers)))


def _changed_if(flag, registers, change):
    branch: Any = scf.IfOp(flag.registers.flat[0], [register.type for register in registers], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], "", "", has_side_effects=True)  # else it makes a choice of it
        scf.yield_(change(registers))
    with ir.InsertionPoint(branch.else_block):
        scf.yield_(registers)
    return list(branch.results)
