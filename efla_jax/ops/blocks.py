"""How tokens [B, T, heads, ...] are cut into chunks, and chunks into blocks that are worked on together."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Tokens per chunk, and token-heads (B·H·T) per block, by default backend. A CPU wants a block's arrays to stay in its
# caches, an accelerator wants all its cores busy. The CPU's were measured by experiments/op_speed.
_CPU_CHUNK, _CPU_BLOCK = 32, 4096
_ACCELERATOR_CHUNK, _ACCELERATOR_BLOCK = 64, 1 << 19


class Blocks(NamedTuple):
    """`count` blocks of `chunks` chunks of `size` tokens. R value heads share each of Hk key heads.

    In a block, x [B, T, H, ...] is [chunks, B, Hk, size, ...]; where R > 1, value-side arrays have R in front.
    """

    count: int
    chunks: int
    size: int
    key_heads: int
    shared: int

    @property
    def padded_length(self):
        return self.count * self.chunks * self.size

    def take(self, x, index):
        """Block `index` of x [B, T, H, ...] or None."""
        if x is None:
            return None
        length = self.chunks * self.size
        x = jax.lax.dynamic_slice_in_dim(x, index * length, length, 1)
        heads = (self.key_heads, x.shape[2] // self.key_heads)
        x = x.reshape(x.shape[0], self.chunks, self.size, *heads, *x.shape[3:])
        x = x.transpose(4, 1, 0, 3, 2, *range(5, x.ndim))
        return x if x.shape[0] > 1 else x[0]

    def take_row(self, x, index):
        """Block `index` of x [B, T] or None, as [chunks, B, size]."""
        if x is None:
            return None
        length = self.chunks * self.size
        x = jax.lax.dynamic_slice_in_dim(x, index * length, length, 1)
        return jnp.swapaxes(x.reshape(x.shape[0], self.chunks, self.size), 0, 1)

    def put(self, whole, x, index):
        """whole [B, T, H, ...] with its block `index` replaced by x, which lies as `take` gives it."""
        if whole is None:
            return None
        x = x if x.ndim == whole.ndim + 2 else x[None]
        x = x.transpose(2, 1, 4, 3, 0, *range(5, x.ndim))
        x = x.reshape(x.shape[0], -1, *whole.shape[2:]).astype(whole.dtype)
        return jax.lax.dynamic_update_slice_in_dim(whole, x, index * self.chunks * self.size, 1)

    def split_heads(self, state):
        """[B, H, K, V] -> [B, Hk, K, V], or [R, B, Hk, K, V] for R > 1."""
        if self.shared == 1:
            return state
        state = state.reshape(state.shape[0], self.key_heads, self.shared, *state.shape[2:])
        return jnp.moveaxis(state, 2, 0)

    def join_heads(self, state):
        """Inverse of `split_heads`."""
        if self.shared == 1:
            return state
        state = jnp.moveaxis(state, 0, 2)
        return state.reshape(state.shape[0], self.key_heads * self.shared, *state.shape[3:])

    def per_value_head(self, fn, in_axes):
        """fn over the R value heads of each key head; in_axes is None where they share the argument."""
        return jax.vmap(fn, in_axes) if self.shared > 1 else fn


def cut(batch, length, heads, key_heads, chunk_size):
    """Blocks for [B, T, H, ...] tokens; chunk_size None is the default. Padding needed is the caller's."""
    on_cpu = jax.default_backend() == "cpu"
    default = _CPU_CHUNK if on_cpu else _ACCELERATOR_CHUNK
    size = chunk_size or min(default, 1 << max(length - 1, 0).bit_length())
    most = max(1, (_CPU_BLOCK if on_cpu else _ACCELERATOR_BLOCK) // max(1, batch * heads * size))
    chunks = math.ceil(length / size)
    count = max(1, math.ceil(chunks / most))
    return Blocks(count, math.ceil(chunks / count), size, key_heads, heads // key_heads)
