"""How a call is cut: tokens of a chunk, heads of a grid step."""

from pallas_kernels.tpu.config import Config

CHUNKS = (64, 128, 256)
LANES = 128
MOST_HEADS = 8  # value heads of a step: enough to fill the units while one head waits for its own results


def chunk_of(length: int, chunk_size: int | None) -> int:
    """Tokens of a chunk: as asked for, else 128, or 64 where a row is no longer."""
    return chunk_size or (64 if length <= 64 else 128)


def padded_dim(dim: int) -> int:
    return -(-dim // 64) * 64


def key_heads_of(key_heads: int, group: int, key_dim: int, value_dim: int) -> int | None:
    """Key heads of a step, or None where no number of them fits.

    Lanes of a block are a multiple of 128 or all there are. As many as MOST_HEADS allows, else as few as fit.
    """
    fits = lambda count, heads, dim: count * dim % LANES == 0 or count == heads
    counts = [
        count
        for count in range(1, key_heads + 1)
        if key_heads % count == 0
        and fits(count, key_heads, key_dim)
        and fits(count * group, key_heads * group, value_dim)
    ]
    few = [count for count in counts if count * group <= MOST_HEADS]
    return max(few) if few else min(counts) if counts and min(counts) * group <= 4 * MOST_HEADS else None
