"""The numbers of a chunk's tokens, as rows to scale columns by and as columns to scale rows by, and its masks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.config import Config


class Numbers(NamedTuple):
    """Of one chunk. Columns are [C, 1] per value head, None where they are 1 throughout."""

    erase: list[jax.Array]
    write: list[jax.Array]  # erase where they are tied
    left: list[jax.Array | None]  # decay from the chunk's start to the token, 0 behind a document border
    right: list[jax.Array | None]  # decay from the token to the chunk's end, 0 before a border
    total: list[jax.Array | None]  # [1, 1] decay over the chunk
    sums: list[tuple[jax.Array, jax.Array] | None]  # of log-decay, as column and as row [1, C]
    reach: jax.Array  # [C, C] bool: j ≤ i in one document
    below: jax.Array  # [C, C] bool: j < i in one document
    reached: jax.Array  # [C, C] bool: reach transposed

    def pairs(self, head: int, mask: jax.Array, scores_CC: jax.Array) -> jax.Array:
        """scores times the decay between tokens, where mask (reach or below) holds, else 0."""
        sums = self.sums[head]
        if sums is None:
            return jnp.where(mask, scores_CC, 0.0)
        column, row = sums
        # masked before the exponential, which may overflow above the diagonal
        return scores_CC * jnp.exp(jnp.where(mask, column - row, -jnp.inf))

    def pairs_transposed(self, head: int, scores_CC: jax.Array) -> jax.Array:
        """The same within reach for scores whose rows are the earlier tokens."""
        sums = self.sums[head]
        if sums is None:
            return jnp.where(self.reached, scores_CC, 0.0)
        column, row = sums
        return scores_CC * jnp.exp(jnp.where(self.reached, row - column, -jnp.inf))


def scaled(x: jax.Array, *columns: jax.Array | None) -> jax.Array:
    """x times the columns that are there."""
    for column in columns:
        if column is not None:
            x = x * column
    return x


def read_numbers(config: Config, numbers_ref) -> Numbers:
    """From `numbers` [rows, C] in VMEM; what a decay is made of is computed for all heads at once."""
    heads, size = config.heads, config.chunk
    rows = {name: numbers_ref[where, :] for name, where in config.rows.items()}
    i, j = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    reach, below, reached = i >= j, i > j, i <= j
    columns = lambda x: [x.T[:, h : h + 1] for h in range(heads)]
    nothing = [None] * heads
    first = last = None
    if config.documents:
        document_1C = rows["document"]
        document_C1 = document_1C.T
        same = document_C1 == document_1C
        reach, below, reached = reach & same, below & same, reached & same
        first, last = document_1C == 0, document_1C == document_1C[:, size - 1 :]
    left_HC = right_HC = None
    if config.decay:
        sums_HC = rows["sums"]
        left_HC, right_HC = jnp.exp(sums_HC), jnp.exp(sums_HC[:, size - 1 :] - sums_HC)
    elif config.documents:
        left_HC = right_HC = jnp.ones((heads, size), jnp.float32)
    if first is not None:
        left_HC, right_HC = jnp.where(first, left_HC, 0.0), jnp.where(last, right_HC, 0.0)
    erase = columns(rows["erase"])
    sums = nothing
    if config.decay:
        sums = [(column, rows["sums"][h : h + 1, :]) for h, column in enumerate(columns(rows["sums"]))]
    return Numbers(
        erase=erase,
        write=erase if config.tied else columns(rows["write"]),
        left=nothing if left_HC is None else columns(left_HC),
        right=nothing if right_HC is None else columns(right_HC),
        total=nothing if left_HC is None else [left_HC[h : h + 1, size - 1 :] for h in range(heads)],
        sums=sums,
        reach=reach,
        below=below,
        reached=reached,
    )
