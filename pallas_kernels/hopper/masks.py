"""Pairs of a chunk's tokens: causal, within documents, times what has decayed between them."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.mosaic import CHUNK, COLS, ROWS, SQUARE, matmul, per_column, per_row, place


def weighed(config, r, slot, tile):
    """D∘tile on and below the diagonal, float32. What is above it is 0 with decay, and else for the caller to mask."""
    if config.decayed:
        return tile * _decay_mask(config, r, slot)
    if config.masked:
        within = lambda tile: jnp.where(_one_document(r, slot), tile, 0.0)
        return only_if(mixed(r, slot), within, tile)
    return tile


def only_if(flag, change, value):
    """change(value) if flag, a traced bool that all threads agree on, else value."""
    return lax.cond(flag, change, lambda value: value, value)


def mixed(r, slot):
    """Whether a document begins in the chunk behind its first token."""
    return r.documents_c[slot, 0] != r.documents_c[slot, CHUNK - 1]


def crossed(r, slot):
    """Whether a document begins in the chunk, of documents that are counted from what the chunk before ended with."""
    return r.documents_c[slot, CHUNK - 1] != 0


def document_rows(r, slot):
    """Documents of the chunk in place `slot`, in ROWS layout; where there is no copy to be read so, from `r`."""
    return r.document_rows() if r.documents_r is None else plgpu.load(r.documents_r.at[slot], layout=ROWS)


def _one_document(r, slot):
    documents = (document_rows(r, slot), plgpu.load(r.documents_c.at[slot], layout=COLS))
    return per_row(documents[0], SQUARE) == per_column(documents[1], SQUARE)


def _decay_mask(config, r, slot):
    """D_ij on and below the diagonal, 0 above it and across documents."""
    row, column = place(r)
    keep = row >= column
    if config.masked:
        keep = keep & _one_document(r, slot)
    if not config.summed:
        return jnp.where(keep, 1.0, 0.0)
    sums = (plgpu.load(r.sums_r.at[slot], layout=ROWS), plgpu.load(r.sums_c.at[slot], layout=COLS))
    return jnp.exp2(jnp.where(keep, per_row(sums[0], SQUARE) - per_column(sums[1], SQUARE), -jnp.inf))


def masked_scores(config, r, slot, k_s):
    """P = scale tril(D∘Q Kᵀ) of the queries in place `slot`, rounded; the queries and the keys have been read."""
    scores = matmul(r.q_s.at[slot], k_s.T, SQUARE)
    if config.scale != 1:
        scores = scores * config.scale
    scores = weighed(config, r, slot, scores)
    if not config.decayed:
        row, column = place(r)
        scores = jnp.where(row >= column, scores, 0.0)
    return lax.optimization_barrier(scores).astype(config.dtype)
