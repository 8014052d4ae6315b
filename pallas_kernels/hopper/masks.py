"""The mask of a chunk's pairs of tokens: causal, within documents, times what has decayed between them."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.hopper.mosaic import COLS, ROWS, SQUARE, per_column, per_row, place


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
