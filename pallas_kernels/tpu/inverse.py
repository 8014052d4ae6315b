"""Inverses of unit lower triangular matrices: forward substitution in blocks of 8, then block doubling on the MXU.

Never powers of the strictly triangular matrix, which overflow where the inverse does not.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.products import F32, Products

BLOCK = 8  # sublanes of a register: a block row of one matrix fills one
LANES = 128


def _same_block(rows: int, columns: int) -> jax.Array:
    row, column = (lax.broadcasted_iota(jnp.int32, (rows, columns), axis) for axis in (0, 1))
    return lax.div(row, BLOCK) == lax.div(column, BLOCK)  # `//` rounds, for which lowering asks what TPU this is


def _solve_blocks(packed_nBL: jax.Array) -> jax.Array:
    """Inverses of the blocks of 8, side by side in lanes, of n matrices: [n, 8, L] -> [n, 8, L].

    Forward substitution by columns: once row j is solved, L_:j times it goes off the rows below.
    """
    count, _, lanes = packed_nBL.shape
    flat = packed_nBL.reshape(count * BLOCK, lanes)
    lane = lax.broadcasted_iota(jnp.int32, flat.shape, 1)
    row, column = (lax.broadcasted_iota(jnp.int32, packed_nBL.shape, axis) for axis in (1, 2))
    solved_nBL = (row == (column & (BLOCK - 1))).astype(F32)
    for j in range(BLOCK - 1):
        column_j = jnp.take_along_axis(flat, (lane & -BLOCK) + j, axis=1).reshape(packed_nBL.shape)
        solved_nBL = solved_nBL - column_j * solved_nBL[:, j : j + 1]
    return solved_nBL


def _solve_diagonals(lowers: list[jax.Array]) -> list[jax.Array]:
    """The block diagonal matrices of the inverses of the blocks of 8."""
    size = lowers[0].shape[0]
    lanes = min(size, LANES)
    same = _same_block(lanes, lanes)
    slabs = range(0, size, lanes)
    packed = []
    for lower in lowers:
        for start in slabs:
            square = lower[start : start + lanes, start : start + lanes]
            packed.append(jnp.sum(jnp.where(same, square, 0.0).reshape(lanes // BLOCK, BLOCK, lanes), 0))
    solved_nBL = _solve_blocks(jnp.stack(packed))
    result = []
    for i in range(len(lowers)):
        bands = []
        for place, start in enumerate(slabs):
            one_BL = solved_nBL[i * len(slabs) + place]
            repeated = jnp.broadcast_to(one_BL[None], (lanes // BLOCK, BLOCK, lanes)).reshape(lanes, lanes)
            square = jnp.where(same, repeated, 0.0)
            zeros = lambda width: [jnp.zeros((lanes, width), F32)] if width else []
            bands.append(jnp.concatenate([*zeros(start), square, *zeros(size - lanes - start)], 1))
        result.append(jnp.concatenate(bands, 0))
    return result


def _doubled(products: Products, lower_CC: jax.Array, inverse_CC: jax.Array, block: int) -> jax.Array:
    """Inverses of diagonal blocks twice as large: [[A, 0], [L, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ L A⁻¹, D⁻¹]].

    Only the lower half of every new block changes, so only those rows are multiplied.
    """
    size = lower_CC.shape[0]
    blocks = size // (2 * block)
    halves = lambda x: x.reshape(blocks, 2 * block, size)
    lower_half = lambda x: halves(x)[:, block:].reshape(size // 2, size)
    row, column = (lax.broadcasted_iota(jnp.int32, (size // 2, size), axis) for axis in (0, 1))
    corner = lax.div(column, block) == 2 * lax.div(row, block)
    product = products.nn(jnp.where(corner, lower_half(lower_CC), 0.0), inverse_CC)
    zeros = jnp.zeros((blocks, block, size), F32)
    product_CC = jnp.concatenate([zeros, product.reshape(blocks, block, size)], 1).reshape(size, size)
    change = products.nn(lower_half(inverse_CC), product_CC).reshape(blocks, block, size)
    kept, changed = halves(inverse_CC)[:, :block], halves(inverse_CC)[:, block:] - change
    return jnp.concatenate([kept, changed], 1).reshape(size, size)


def unit_lower_inverses(products: Products, lowers: list[jax.Array]) -> list[jax.Array]:
    """(I + L)⁻¹ for each strictly lower triangular L [C, C] float32; C a power of two, at least 8.

    Of all matrices at once: none of them has work enough to fill the units between two steps that depend on each other.
    """
    inverses = _solve_diagonals(lowers)
    block = BLOCK
    while block < lowers[0].shape[0]:
        inverses = [_doubled(products, *pair, block) for pair in zip(lowers, inverses, strict=True)]
        block *= 2
    return inverses
