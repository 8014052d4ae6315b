"""How a call is cut: tokens of a chunk, heads and chunks of a grid step.

The more heads a step has, the more there is to do while a product is on its way; what they need must fit into VMEM.
"""

from itertools import product
from typing import NamedTuple

CHUNKS = (64, 128, 256)
LANES = 128
MOST_HEADS = 8  # value heads of a step: with more, nothing is gained
VMEM = 15 << 20  # bytes that a step may need by `vmem`; TPU v4 has 16 MiB


class Step(NamedTuple):
    """A grid step: key heads with all their value heads, and chunks one after the other."""

    key_heads: int
    span: int


class Sizes(NamedTuple):
    """What a step is planned for; K and V padded."""

    key_heads: int
    group: int
    key_dim: int
    value_dim: int
    wide: bool  # float32 inputs or several pieces
    chunk: int = 0


def padded(dim: int, multiple: int) -> int:
    return -(-dim // multiple) * multiple


def vmem(direction: str, sizes: Sizes, heads: int, span: int) -> int:
    """Bytes of VMEM of a step of so many value heads, fitted to what the compiler reports for v4.

    Per head: states in float32 and, for each chunk, one that is saved, twice; so many numbers of matrices [C, C] and
    [C, D], of so many bytes on the average.
    """
    squares, rows, states, narrow = (8, 20, 20, 3.2) if direction == "backward" else (9, 10, 26, 2.2)
    each, saved = (4.0, 8) if sizes.wide else (narrow, 4)
    c, k = sizes.chunk, sizes.key_dim
    lanes_c, lanes_k, lanes_v = (padded(dim, LANES) for dim in (c, k, sizes.value_dim))
    in_chunk = each * c * (squares * lanes_c + rows * (lanes_k + lanes_v) // 2)
    return int(heads * (k * lanes_v * (states + span * saved) + span * in_chunk))


def step_of(direction: str, sizes: Sizes, chunks: int) -> Step | None:
    """The step with the most heads, then the most chunks, that fits; None where none does.

    The lanes of a block are a multiple of 128 or all there are. Two chunks are for the forward kernel only, whose
    inverses do not wait for each other.
    """
    whole = lambda count, heads, dim: count * dim % LANES == 0 or count == heads
    counts = [
        count
        for count in range(1, sizes.key_heads + 1)
        if sizes.key_heads % count == 0
        and whole(count, sizes.key_heads, sizes.key_dim)
        and whole(count * sizes.group, sizes.key_heads * sizes.group, sizes.value_dim)
    ]
    counts = [count for count in counts if count * sizes.group <= MOST_HEADS or count == min(counts)]
    spans = (2, 1) if direction == "forward" and chunks % 2 == 0 else (1,)
    for count in sorted(counts, reverse=True):
        for span in spans:
            if vmem(direction, sizes, count * sizes.group, span) <= VMEM:
                return Step(count, span)
    return None


def fitted(sizes: Sizes, length: int, chunk_size: int | None) -> Sizes | None:
    """The chunk, and K and V padded to multiples of 64, or of 128 where heads cannot be put together otherwise.

    Tokens of a chunk are what was asked for, else 128, or 64 where a row is no longer or no step of 128 fits. None
    where neither kernel's smallest step fits.
    """
    chunks = (chunk_size,) if chunk_size else (64,) if length <= 64 else (128, 64)
    for chunk, multiple in product(chunks, (64, LANES)):
        dims = dict(key_dim=padded(sizes.key_dim, multiple), value_dim=padded(sizes.value_dim, multiple))
        found = sizes._replace(chunk=chunk, **dims)
        if step_of("forward", found, 1) and step_of("backward", found, 1):
            return found
    return None
