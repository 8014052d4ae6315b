"""The inverse of a unit triangular tile in the registers of a warpgroup: `mma.sync`, and no wgmma with its waits.

wgmma shares its right operand among the four warps of a warpgroup and is waited for; here each warp multiplies its own
blocks [16, 16], of which it has a row. Pallas's `plgpu.mma` would share the right operand too, so the instructions are
written here; how registers hold a tile: `pallas_kernels.hopper.warps`.

With blocks numbered from 0 and L below the diagonal:

    X_bb          quarters [8, 8] on the diagonal by substitution in float32, a column a thread, then what links them
    X_10, X_32    - X_bb L_b,b-1 X_b-1,b-1: warps 1 and 3, of what warps 0 and 2 have made
    [X_20 X_21]     [X_22   0 ] [L_20 L_21] [X_00   0 ]
    [X_30 X_31]   - [X_32 X_33] [L_30 L_31] [X_10 X_11]: warps 2 and 3, of what warps 0 and 1 have made

What one warp needs of another goes through shared memory: numbers of columns first, then inverses in float16. Threads
meet three times.
"""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, nvvm, scf

from pallas_kernels.hopper.mosaic import CHUNK, F32, ROWS, SQUARE, TILE, interpreting
from pallas_kernels.hopper.warps import (
    BLOCK,
    At,
    Thread,
    add,
    f32,
    i32,
    integer,
    less,
    like,
    number_of,
    numbers_of,
    odd,
    own_block,
    pair,
    times,
    where,
    zeros,
)

HALF = BLOCK * BLOCK // 2  # a block of float16, in numbers of 32 bits
CORNER = 4 * 2 * HALF  # where L_20, L_21, L_30, L_31 lie, behind two blocks for each warp
WORKSPACE = CORNER + 4 * HALF  # numbers of 32 bits in shared memory
QUARTER = BLOCK // 2
APART = 12  # columns of a quarter in shared memory, so that threads that write at a time are in different banks
BEHIND = 80  # the lower quarter's inverse behind the upper one's, likewise


def unit_inverse(work_s, numbers_s, gram, rows, columns, others):
    """(I + tril(diag(rows) gram diag(columns), -1))⁻¹ [C, C] float32, with products of float16.

    Between two calls with the same memory, and after what is read of numbers_s, all threads must have met.

    Args:
        work_s: float32 [WORKSPACE] in shared memory.
        numbers_s: float32 [at least 1 + len(others), C] in shared memory; gets columns and others.
        gram: [C, C] float32.
        rows, columns, others: [C] float32 in ROWS layout.
    """
    if interpreting():
        for i, values in enumerate((columns, *others)):
            numbers_s.at[i][...] = values
        lower = jnp.tril(gram * rows[:, None] * columns[None], -1)
        eye = jnp.eye(CHUNK, dtype=F32)
        return lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True, unit_diagonal=True)
    result = plgpu.ShapeDtypeStruct(SQUARE, F32, layout=TILE)
    types = plgpu.RefType(), plgpu.RefType(), TILE, *(ROWS,) * (2 + len(others))
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(_unit_inverse)(
        work_s, numbers_s, gram, rows, columns, *others
    )


# ---- MLIR ----


def _unit_inverse(_, work_s, numbers_s, gram, rows, *vectors):
    thread, work, numbers = Thread(), At(work_s), At(numbers_s)
    warp, tile = thread.warp, list(gram.registers.flat)
    rows = [number_of(register) for register in rows.registers.flat]
    for i, vector in enumerate(vectors):
        for half, register in enumerate(vector.registers.flat):
            row = add(add(times(warp, BLOCK), thread.group), i * CHUNK + half * QUARTER)
            numbers.store(number_of(register), row)
    mgpu.utils.warpgroup_barrier()
    scaled = lambda block, first: _scaled(thread, numbers, rows, block, first)
    upper = less(warp, 2)
    _keep_corner(thread, work, upper, [scaled(tile[4 * i : 4 * i + 4], integer(BLOCK * i)) for i in range(2)])
    home = times(warp, 2 * HALF)
    before = arith.andi(add(warp, -1), integer(3))
    beside = scaled(where(upper, tile[:4], tile[8:12]), times(before, BLOCK))  # left of the own block of odd warps
    beside = [_transposed(quarter) for quarter in _halves(beside)]
    x = _small_inverse(thread, work, home, scaled(own_block(thread, tile), times(warp, BLOCK)))
    low = _halves(x)
    _write(thread, work, home, low)
    link = _halves(_product(low, beside))
    mgpu.utils.warpgroup_barrier()
    merged = _minus(_product(link, _right_operand(thread, work, times(before, 2 * HALF))))
    _write(thread, work, add(home, HALF), _halves(merged))
    mgpu.utils.warpgroup_barrier()
    nothing = [zeros()] * 4
    left, right = where(odd(warp), merged, x), where(odd(warp), x, nothing)
    out: Any = scf.IfOp(upper, [register.type for register in left * 4], has_else=True)
    with ir.InsertionPoint(out.then_block):
        scf.yield_([*left, *right, *nothing, *nothing])
    with ir.InsertionPoint(out.else_block):
        scf.yield_([*_corner(thread, work, left, right), *left, *right])
    _sync_warp()  # what is read of shared memory for what follows would else be read before, and take registers
    return like(gram, list(out.results))


def _scaled(thread, numbers, rows, block, first):
    """diag(rows) block diag(columns) of a block whose first column is `first`."""
    columns = [numbers.load(add(add(first, times(thread.pair, 2)), half * QUARTER), 2) for half in range(2)]
    out = []
    for i, register in enumerate(block):
        by = [arith.mulf(rows[i % 2], x) for x in numbers_of(columns[i // 2])]
        out.append(pair(*(arith.mulf(x, y) for x, y in zip(numbers_of(register), by, strict=True))))
    return out


def _keep_corner(thread, work, upper, blocks):
    """L_20, L_21, L_30, L_31 to shared memory, of their warps."""
    lower: Any = scf.IfOp(arith.xori(upper, mgpu.c(1, ir.IntegerType.get_signless(1))), has_else=False)
    with ir.InsertionPoint(lower.then_block):
        for column, block in enumerate(blocks):
            _write(thread, work, add(times(add(thread.warp, -2), 2 * HALF), CORNER + column * HALF), _halves(block))
        scf.yield_([])


def _corner(thread, work, left, right):
    """The blocks X_b0 and X_b1 of warp b = 2, 3, of its blocks X_b2 and X_b3."""
    left, right = _halves(left), _halves(right)
    operand = lambda place: _right_operand(thread, work, integer(place))
    link = lambda row, column: operand(CORNER + (2 * row + column) * HALF)
    links = [_halves(_product(right, link(1, i), _product(left, link(0, i)))) for i in range(2)]
    x_00, x_10, x_11 = (operand(place * HALF) for place in (0, 3, 2))
    first = _product(links[1], x_10, _product(links[0], x_00))
    return [*_minus(first), *_minus(_product(links[1], x_11))]


def _small_inverse(thread, work, home, block):
    """(I + tril(block, -1))⁻¹ of a block: its quarters on the diagonal by substitution, then what links them."""
    upper, lower = _substituted(thread, work, home, block[0], block[3])
    left, right, link = (_halves([x])[0] for x in (lower, upper, block[1]))
    link = _halves([_quarter_product(left, _transposed(link))])[0]
    (linked,) = _minus([_quarter_product(link, _transposed(right))])
    return [upper, linked, zeros(), lower]


def _substituted(thread, work, home, upper, lower):
    """(I + tril(x, -1))⁻¹ of two quarters: a thread has a column in registers, and all read those of x."""
    mine = add(home, add(times(thread.pair, 2 * APART), thread.group))
    for place, quarter in ((0, upper), (QUARTER * APART, lower)):
        for i, number in enumerate(numbers_of(quarter)):
            work.store(number, add(mine, place + i * APART))
    _sync_warp()
    column, half = arith.andi(thread.lane, integer(7)), arith.shrui(thread.lane, integer(4))
    which = arith.andi(arith.shrui(thread.lane, integer(3)), integer(1))
    source = add(home, times(which, QUARTER * APART))
    zero, one = mgpu.c(0.0, f32()), mgpu.c(1.0, f32())
    same = [arith.cmpi(arith.CmpIPredicate.eq, column, integer(i)) for i in range(QUARTER)]
    x: list[Any] = [arith.select(here, one, zero) for here in same]
    for j in range(QUARTER - 1):
        minus = arith.negf(x[j])
        for four in range((j + 1) // 4, QUARTER // 4):
            below = work.load(add(source, j * APART + 4 * four), 4)
            for i in range(max(j + 1, 4 * four), 4 * four + 4):
                x[i] = math.fma(llvm.extractelement(below, integer(i % 4)), minus, x[i])
    _sync_warp()
    mine = add(add(home, times(which, BEHIND)), add(times(half, QUARTER), column))
    for i in range(0, QUARTER, 2):  # each half of the warp every other row
        work.store(arith.select(odd(half), x[i + 1], x[i]), add(mine, i * QUARTER))
    _sync_warp()
    mine = add(home, add(times(thread.group, QUARTER), times(thread.pair, 2)))
    out = [work.load(add(mine, place), 2) for place in (0, BEHIND)]
    _sync_warp()
    return out


def _sync_warp():
    nvvm.bar_warp_sync(integer(-1))


def _halves(block):
    """Pairs of float32 as float16: registers of 32 bits."""
    half = ir.VectorType.get((2,), ir.F16Type.get())
    return [mgpu.utils.bitcast(arith.truncf(half, numbers), i32()) for numbers in block]


def _minus(block):
    return [arith.negf(numbers) for numbers in block]


def _write(thread, work, index, block):
    """A block of float16 to shared memory, where halves of rows 4 … 7 and 12 … 15 are exchanged: threads that read or
    write at a time are so in different banks."""
    swap = arith.andi(arith.shrui(thread.lane, integer(4)), integer(1))  # of row g
    mine = add(add(times(thread.group, 8), thread.pair), index)
    halves = [add(mine, times(x, 4)) for x in (swap, arith.xori(swap, integer(1)))]
    for register, (half, below) in zip(block, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        work.store(register, add(halves[half], below * HALF // 2))


def _right_operand(thread, work, index):
    """Of a block that `_write` wrote, the right operand of `mma.sync`."""
    row, half = arith.andi(thread.lane, integer(15)), arith.shrui(thread.lane, integer(4))
    swap = arith.andi(arith.shrui(thread.lane, integer(2)), integer(1))  # of that row
    mine = add(add(times(row, 8), times(arith.xori(half, swap), 4)), index)
    four: Any = llvm.inline_asm(
        ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>"),
        [llvm.ptrtoint(i32(), work.pointer(mine))],
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];",
        "=r,=r,=r,=r,r",
        has_side_effects=True,
    )
    return [llvm.extractvalue(i32(), four, [i]) for i in range(4)]


def _transposed(quarter: Any) -> Any:
    """An 8×8 matrix of 16-bit numbers that the threads of a warp hold two neighbours each of."""
    move = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    return llvm.inline_asm(i32(), [quarter], move, "=r,r", has_side_effects=True)


def _product(left, right, init=None):
    """init + left @ right of blocks: left as `_halves` gives it, right as `_right_operand`; four pairs of float32."""
    out = []
    for half in range(2):  # eight columns each
        zero = mgpu.c(0.0, f32())
        start = (
            [number for numbers in init[2 * half : 2 * half + 2] for number in numbers_of(numbers)] if init else None
        )
        four: Any = llvm.inline_asm(
            ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>"),
            [*left, *right[2 * half : 2 * half + 2], *(start or [zero] * 4)],
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        )
        numbers = [llvm.extractvalue(f32(), four, [i]) for i in range(4)]
        out += [pair(*numbers[:2]), pair(*numbers[2:])]
    return out


def _quarter_product(left, right):
    """left @ right of quarters of float16, right transposed: a pair of float32."""
    four: Any = llvm.inline_asm(
        ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>"),
        [left, right, mgpu.c(0.0, f32())],
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$4}, {$5}, {$6,$6,$6,$6};",
        "=f,=f,=f,=f,r,r,f",
    )
    return pair(*(llvm.extractvalue(f32(), four, [i]) for i in range(2)))
