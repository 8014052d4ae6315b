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
    if config.documents:
        same = rows["document"] == rows["document"].T
        reach, below, reached = reach & same, below & same, reached & same
    left, right, total = _ends(config, rows)
    sums: list[tuple[jax.Array, jax.Array] | None] = [None] * heads
    if config.decay:
        row = lambda h: rows["sums"][h : h + 1, :]
        sums = [(column, row(h)) for h, column in enumerate(_columns(rows["sums"]))]
    erase = _columns(rows["erase"])
    write = erase if config.tied else _columns(rows["write"])
    return Numbers(erase, write, left, right, total, sums, reach, below, reached)


def _columns(rows_HC: jax.Array) -> list[jax.Array]:
    columns_CH = rows_HC.T
    return [columns_CH[:, h : h + 1] for h in range(rows_HC.shape[0])]


def _ends(config: Config, rows: dict[str, jax.Array]) -> tuple[list, list, list]:
    """left, right and total of `Numbers`."""
    heads, last = config.heads, config.chunk - 1
    if not config.decay and not config.documents:
        return [None] * heads, [None] * heads, [None] * heads
    if config.decay:
        sums_HC = rows["sums"]
        left_HC, right_HC = jnp.exp(sums_HC), jnp.exp(sums_HC[:, last:] - sums_HC)
    else:
        left_HC = right_HC = jnp.ones_like(rows["erase"])
    if config.documents:
        document_1C = rows["document"]
        left_HC = jnp.where(document_1C == 0, left_HC, 0.0)
        right_HC = jnp.where(document_1C == document_1C[:, last:], right_HC, 0.0)
    return _columns(left_HC), _columns(right_HC), [left_HC[h : h + 1, last:] for h in range(heads)]
