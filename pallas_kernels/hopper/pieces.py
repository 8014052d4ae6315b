"""Few heads and long rows: a row is cut into pieces that run side by side, exactly.

Over a piece the state goes through an affine map, S_end = M S_start + E. E is what the kernel leaves of a zero state,
M what it leaves of the identity with zero values; a scan over the pieces in float32 then gives every piece its first
state, and the cotangents of the last states likewise from the far end, with Mᵀ. That M does not expand (‖M‖ ≤ 1 for the
exact rule and any keys) makes the chain safe. It costs two more passes, so it pays from four pieces on.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import blocks
from pallas_kernels.hopper.mosaic import CHUNK, PROCESSORS

SHORTEST = 4  # chunks of a piece


def count(direction: str, heads: int, length: int, key_dim: int, value_dim: int) -> int:
    """Into how many pieces to cut rows of `length` tokens for B·H = heads: as measured, else by what fills the card.

    direction: "forward", or "both" where a backward pass follows.
    """
    measured = blocks.lookup(direction, key_dim, value_dim, heads, length).get("pieces")
    if measured is not None:
        return measured
    return fill(heads, length)


def fill(heads: int, length: int) -> int:
    """As many pieces as fill the card, where they pay."""
    pieces = 1
    while 2 * pieces * heads <= PROCESSORS and length >= 2 * pieces * SHORTEST * CHUNK:
        pieces *= 2
    return pieces if pieces >= 4 else 1


def fold(x, pieces):
    """[B, P·L, ...] -> [B·P, L, ...]."""
    return x.reshape(x.shape[0] * pieces, -1, *x.shape[2:])


def unfold(x, pieces):
    """[B·P, L, ...] -> [B, P·L, ...]."""
    return x.reshape(x.shape[0] // pieces, -1, *x.shape[2:])


def fold_heads(x, pieces):
    """[B, H, P·L, ...] -> [B·P, H, L, ...]."""
    x = x.reshape(*x.shape[:2], pieces, -1, *x.shape[3:])
    return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], *x.shape[3:])


def unfold_heads(x, pieces):
    """[B·P, H, L, ...] -> [B, H, P·L, ...]."""
    x = jnp.swapaxes(x.reshape(-1, pieces, *x.shape[1:]), 1, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def chain(first, maps, ends, pieces, *, backward=False):
    """First states of all pieces and the state behind the last one.

    Args:
        first: [B, H, V, K], Sᵀ before the first piece (backward: its cotangent behind the last one); None for zeros.
        maps: [B·P, H, K, K], Mᵀ of every piece. ends: [B·P, H, V, K], Eᵀ.

    Returns:
        starts [B·P, H, V, K], last [B, H, V, K]; backward: cotangents behind every piece, and before the first one.
    """
    by_piece = lambda x: jnp.moveaxis(x.reshape(-1, pieces, *x.shape[1:]), 1, 0)
    maps, ends = by_piece(maps), by_piece(ends)
    maps = jnp.swapaxes(maps, -1, -2) if backward else maps

    def step(state, piece):
        through, end = piece
        return jnp.matmul(state, through, precision=jax.lax.Precision.HIGHEST) + end, state

    state = jnp.zeros_like(ends[0]) if first is None else first
    last, starts = jax.lax.scan(step, state, (maps, ends), reverse=backward)
    return jnp.moveaxis(starts, 0, 1).reshape(-1, *starts.shape[2:]), last
