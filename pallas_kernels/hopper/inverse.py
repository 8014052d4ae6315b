"""The triangular inverse of the forward kernel, made by its helper warpgroup.

The inverse is taken on unit keys, where it is D_n-similar to (I + M̂ diag(cλ))⁻¹ with |M̂_ij| ≤ 1: float16 then has range
to spare and eight times bfloat16's precision. How it is taken: `pallas_kernels.hopper.unit_inverse`.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.masks import weighed
from pallas_kernels.hopper.mosaic import CHUNK, COLS, ROWS, SQUARE, matmul, per_column, per_row, place
from pallas_kernels.hopper.unit_inverse import unit_inverse
from pallas_kernels.hopper.warps import diagonal

STRONG = 1 / 32  # of cλ, see write_inverse
NEAR = 1 / 8  # of βλ, see _integrated


def fresh(r):
    """A zero that the compiler cannot know. Masks and addresses made from it live only where they are used; else they
    would be made once, before the loop, and take the tiles' registers."""
    return r.numbers_r[0]


def gain_of(r, n):
    """Of the tokens of chunk n, from device memory: a copy to shared memory would be one more to send for. To be called
    long before it is used."""
    return plgpu.load(r.gain.at[r.b, pl.ds(n * CHUNK, CHUNK), r.h], layout=ROWS, optimized=False)


def write_inverse(config, r, slot, gain, put, midway):
    """Writes what the state warpgroups solve with, and (saved, tied) the inverse of I + diag(c) M.

    put(name, value) writes what they read: "solve_s", which is c∘W if folded, and else "erase_s", c.

    With W = (I + M diag(c))⁻¹ the latter is both c W c⁻¹ and I - c W M. The first keeps every entry's precision (keys
    that repeat make small ones), but W, in float16, says little of columns of small cλ; there the second is taken.
    Values per column are read from shared memory where they are used: kept, they would take the tiles' registers.
    gain: as `gain_of` gives it. midway() is called before anything is written that the state warpgroups read.
    """
    if config.save:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the chunk before left here has been copied
    k_s = r.k_s.at[slot]
    gram = matmul(k_s, k_s.T, SQUARE)
    square = diagonal(gram)
    # Two instructions, where a quotient is ten. Without the barriers the compiler keeps what they are made of.
    norm = lax.optimization_barrier(jnp.where(square > 0, jnp.sqrt(square), 1.0))
    inverse_norm = lax.optimization_barrier(jnp.where(square > 0, lax.rsqrt(square), 1.0))
    erase = _integrated(gain, square, inverse_norm) if config.exact else gain
    strength = erase * square
    if config.tied:
        rows, columns, others = inverse_norm, inverse_norm * strength, [inverse_norm]
    else:
        rows, columns, others = inverse_norm * strength, inverse_norm, [norm]
    if config.tied and config.save:
        ratio = jnp.where(strength > STRONG, 1 / jnp.where(strength > STRONG, strength, 1.0), 0.0)
        others += [norm, ratio]
    before = norm if config.tied else inverse_norm
    before = lax.optimization_barrier(before * erase) if config.folded else before  # one number kept, not two
    if config.save and config.exact:
        r.square_s[...] = square
    gram = weighed(config, r, slot, gram)
    x = unit_inverse(r.work_s, r.keys_s, gram, rows, columns, others)
    midway()
    over = lambda i: per_column(plgpu.load(r.keys_s.at[fresh(r) + i], layout=COLS), SQUARE)
    if not config.folded:
        put("erase_s", erase)
    put("solve_s", (x * (per_row(before, SQUARE) * over(1))).astype(config.dtype))
    if not (config.tied and config.save):
        return
    row, column = place(r)
    strict = jnp.where(row > column, gram * (per_row(inverse_norm, SQUARE) * over(1)), 0.0)
    r.cosines_s[...] = _half(strict)
    plgpu.commit_smem()
    linked = matmul(_half(x), r.cosines_s, SQUARE, staged=r.helper_stage) * -1.0
    ratio = over(3)
    inverse = jnp.where(ratio > 0, x * ratio, linked) * (per_row(strength * inverse_norm, SQUARE) * over(2))
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


def _half(x):
    """float16; the barrier keeps the compiler from selecting among halves of registers instead of whole ones."""
    return lax.optimization_barrier(x).astype(jnp.float16)
