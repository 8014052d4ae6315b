"""The triangular inverse of the forward kernel, made by its helper warpgroup.

The inverse is taken on unit keys, where it is D_n-similar to (I + M̂ diag(cλ))⁻¹ with |M̂_ij| ≤ 1: float16 then has range
to spare and eight times bfloat16's precision. X ← X - mask_b(X L) X merges inverses of b×b diagonal blocks, b = 1 … 32;
the mask makes each step a merge of two blocks rather than a power of L.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.masks import weighed
from pallas_kernels.hopper.mosaic import CHUNK, COLS, ROWS, SQUARE, TILE, matmul, matmuls, per_column, per_row, place
from pallas_kernels.hopper.warps import BLOCK, block_products, joined

STRONG = 1 / 32  # of cλ, see write_inverse
NEAR = 1 / 8  # of βλ, see _integrated


def fresh(r):
    """A zero that the compiler cannot know. Masks and addresses made from it live only where they are used; else they
    would be made once, before the loop, and take the tiles' registers."""
    return r.numbers_r[0]


def write_inverse(config, r, slot, put, midway):
    """Writes what the state warpgroups solve with, and (saved, tied) the inverse of I + diag(c) M.

    put(name, value) writes what they read: "solve_s", which is c∘W if folded, and else "erase_s", c.

    With W = (I + M diag(c))⁻¹ the latter is both c W c⁻¹ and I - c W M. The first keeps every entry's precision (keys
    that repeat make small ones), but W, in float16, says little of columns of small cλ; there the second is taken.
    Values per column are read from shared memory where they are used: kept, they would take the tiles' registers.
    midway() is called before anything is written that the state warpgroups read, when few registers are in use.
    """
    if config.save:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the chunk before left here has been copied
    k_s = r.k_s.at[slot]
    gram = matmul(k_s, k_s.T, SQUARE)
    row, column = place(r, BLOCK)
    square = jnp.sum(jnp.where((row & 15) == column, _diagonal(gram, row), 0.0), axis=1)
    # Two instructions, where a quotient is ten. Without the barriers the compiler keeps what they are made of.
    norm = lax.optimization_barrier(jnp.where(square > 0, jnp.sqrt(square), 1.0))
    inverse_norm = lax.optimization_barrier(jnp.where(square > 0, lax.rsqrt(square), 1.0))
    gain = plgpu.load(r.gain_s.at[slot], layout=ROWS)
    erase = _integrated(gain, square, inverse_norm) if config.exact else gain
    strength = erase * square
    columns = {1: inverse_norm, 2: inverse_norm * strength if config.tied else inverse_norm}
    if config.save or not config.tied:
        columns[0] = norm
    if config.save and config.tied:
        columns[3] = jnp.where(strength > STRONG, 1 / jnp.where(strength > STRONG, strength, 1.0), 0.0)
    for i, values in columns.items():
        r.keys_s.at[fresh(r) + i][...] = values
    if config.save and config.exact:
        r.square_s[...] = square
    plgpu.commit_smem()
    numbers = lambda i: plgpu.load(r.keys_s.at[fresh(r) + i], layout=COLS)
    gram = weighed(config, r, slot, gram)
    if config.tied and config.save:
        row, column = place(r)
        strict = jnp.where(row > column, gram * (per_row(inverse_norm, SQUARE) * per_column(numbers(1), SQUARE)), 0.0)
        r.cosines_s[...] = _half(strict)
    rows = inverse_norm if config.tied else inverse_norm * strength
    lower = gram * (per_row(rows, SQUARE) * per_column(numbers(2), SQUARE))
    x = joined(_ladder(r, lower, midway))
    if not config.folded:
        put("erase_s", erase)
    over = lambda which: per_column(numbers(which), SQUARE)
    before, after = (norm, 1) if config.tied else (inverse_norm, 0)
    before = before * erase if config.folded else before
    put("solve_s", (x * (per_row(before, SQUARE) * over(after))).astype(config.dtype))
    if not (config.tied and config.save):
        return
    linked = matmul(_half(x), r.cosines_s, SQUARE, staged=r.helper_stage) * -1.0
    ratio = over(3)
    inverse = jnp.where(ratio > 0, x * ratio, linked) * (per_row(strength * inverse_norm, SQUARE) * over(0))
    row, column = place(r)
    r.inverse_s[...] = lax.optimization_barrier(jnp.where(row == column, 1.0, inverse)).astype(config.dtype)


def _integrated(beta, square, inverse_norm):
    """(1 - e^{-βλ})/λ for λ = square: β times a series where the difference would cancel; it is exact to 4e-8 there,
    and the approximate exponential beyond makes 1.5e-6 at most."""
    x = beta * square
    near = jnp.where(x < NEAR, x, 0.0)
    series = jnp.ones_like(x)
    for n in range(5, 1, -1):
        series = 1.0 - near * (1.0 / n) * series
    return jnp.where(x < NEAR, beta * series, (1.0 - jnp.exp(x * -1.0)) * (inverse_norm * inverse_norm))


def _diagonal(tile, row):
    """The four diagonal blocks of a [C, C] tile, one below the other: [C, 16]."""
    block = row >> 4
    upper = jnp.where(block == 0, tile[:, :16], tile[:, 16:32])
    return jnp.where(block < 2, upper, jnp.where(block == 2, tile[:, 32:48], tile[:, 48:]))


def _ladder(r, lower, midway):
    """The inverse of I + tril(lower, -1) [C, C], float16 products: four column blocks [C, 16] float32.

    Up to merges of 16×16 blocks they lie one below the other in one [C, 16] tile, each in a warp of its own.
    """
    shape = (CHUNK, BLOCK)
    row, column = place(r, BLOCK)
    own = jnp.where((row & 15) > column, _diagonal(lower, row), 0.0)
    beside = jnp.where((row & 16) == 16, jnp.where(row < 32, lower[:, :16], lower[:, 32:48]), 0.0)  # left of odd blocks
    x = jnp.where((row & 15) == column, 1.0, jnp.where(((row & 15) ^ column) == 1, own * -1.0, 0.0))
    own, beside = _half(own), _half(beside)
    for level in (1, 2, 3):
        low = _half(x)
        merged = block_products(_half(block_products(low, own)), low)
        row, column = place(r, BLOCK)
        x = jnp.where((((row & 15) ^ column) >> level) == 1, merged * -1.0, x)
    midway()
    low = _half(x)
    # In the place of the ladder, which each warp then writes where it has read. What it finds above the first block it
    # makes no use of.
    r.ladder_s.at[pl.ds(fresh(r) * CHUNK + BLOCK, CHUNK)][...] = low
    plgpu.commit_smem()
    above = plgpu.load(r.ladder_s.at[pl.ds(fresh(r) * CHUNK, CHUNK)], layout=TILE)  # the block before
    merged = block_products(_half(block_products(low, beside)), above)
    row, _ = place(r, BLOCK)
    odd = (row & 16) == 16
    left, right = jnp.where(odd, merged * -1.0, x), jnp.where(odd, x, 0.0)
    below = row >= 32
    # above the inverse of the first half, below the corner of L that links it with the second
    ladder = [r.ladder_s.at[pl.ds((fresh(r) + i) * CHUNK, CHUNK)] for i in range(2)]
    for ref, tile, corner in zip(ladder, (left, right), (lower[:, :16], lower[:, 16:32]), strict=True):
        ref[...] = _half(jnp.where(below, corner, tile))
    plgpu.commit_smem()
    left_below, right_below = jnp.where(below, left, 0.0), jnp.where(below, right, 0.0)
    terms = [_half(left_below), _half(right_below)]
    rows = lambda ref, *blocks: [ref.at[pl.ds(i * BLOCK, BLOCK)] for i in blocks]
    links = matmuls([(terms, rows(ref, 2, 3)) for ref in ladder], shape, staged=r.helper_stage)
    links = [_half(link) for link in links]
    first, second = matmuls(
        [(links, rows(ladder[0], 0, 1)), (links[1:], rows(ladder[1], 1))], shape, staged=r.helper_stage
    )
    return [
        jnp.where(below, first * -1.0, left),
        jnp.where(below, second * -1.0, right),
        left_below,
        right_below,
    ]


def _half(x):
    """float16; the barrier keeps the compiler from selecting among halves of registers instead of whole ones."""
    return lax.optimization_barrier(x).astype(jnp.float16)
