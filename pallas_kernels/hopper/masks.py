"""Pairs of a chunk's tokens: causal, within documents, times what has decayed between them."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.mosaic import COLS, ROWS, SQUARE, matmul, per_column, per_row, place


def decay_mask(config, r, slot):
    """D_ij on and below the diagonal, 0 across documents; None where it is 1 throughout."""
    if not config.decayed:
        return None
    row, column = place(r)
    keep = row >= column
    if config.masked:
        documents = (plgpu.load(r.documents_r.at[slot], layout=ROWS), plgpu.load(r.documents_c.at[slot], layout=COLS))
        keep = keep & (per_row(documents[0], SQUARE) == per_column(documents[1], SQUARE))
    if not config.summed:
        return jnp.where(keep, 1.0, 0.0)
    sums = (plgpu.load(r.sums_r.at[slot], layout=ROWS), plgpu.load(r.sums_c.at[slot], layout=COLS))
    return jnp.exp2(jnp.where(keep, per_row(sums[0], SQUARE) - per_column(sums[1], SQUARE), -jnp.inf))


def masked_scores(config, r, slot, k_s):
    """P = scale tril(D∘Q Kᵀ) of the queries in place `slot`, rounded; the queries and the keys have been read."""
    scores = matmul(r.q_s.at[slot], k_s.T, SQUARE)
    if config.scale != 1:
        scores = scores * config.scale
    decay = decay_mask(config, r, slot)
    if decay is None:
        row, column = place(r)
        scores = jnp.where(row >= column, scores, 0.0)
    else:
        scores = scores * decay
    return lax.optimization_barrier(scores).astype(config.dtype)
