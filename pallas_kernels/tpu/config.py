"""What a kernel is compiled for, and how a call is cut into grid steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Config(NamedTuple):
    """Static choices of one kernel. A grid step takes `span` chunks of `key_heads` key heads and their value heads."""

    chunk: int
    span: int
    key_heads: int
    group: int  # value heads that share a key head
    key_dim: int
    value_dim: int
    scale: float
    pieces: int  # of a float32 operand
    tied: bool  # write is erase
    decay: bool
    documents: bool

    @property
    def heads(self) -> int:
        """Value heads of a step."""
        return self.key_heads * self.group

    @property
    def saved(self) -> jnp.dtype:
        """Type of what the forward kernel leaves for the backward one."""
        return jnp.dtype(jnp.bfloat16 if self.pieces == 1 else jnp.float32)

    @property
    def rows(self) -> dict[str, slice]:
        """Where the numbers of a token stand in `numbers` [rows, C]: a row for each value head."""
        names = ["erase"] + ["write"] * (not self.tied) + ["sums"] * self.decay
        found = {name: slice(i * self.heads, (i + 1) * self.heads) for i, name in enumerate(names)}
        if self.documents:
            found["document"] = slice(len(names) * self.heads, len(names) * self.heads + 1)
        return found

    @property
    def row_count(self) -> int:
        return max(rows.stop for rows in self.rows.values())


def key_slice(config: Config, head: int) -> slice:
    """Lanes of key head `head` of a step."""
    return slice(head * config.key_dim, (head + 1) * config.key_dim)


def value_slice(config: Config, head: int) -> slice:
    return slice(head * config.value_dim, (head + 1) * config.value_dim)


def like(shape: tuple[int, ...], dtype, x: jax.Array) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh axes that x varies over, in a caller's shard_map."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
