"""Causal softmax attention with rotary positions, over the whole context or a sliding window."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from efla_jax.choices import check_sizes
from efla_jax.ops.scan import segment_starts


@dataclass(frozen=True)
class AttentionConfig:
    """heads query heads of head_dim, which share key_value_heads (0: as many). window counts the token itself."""

    heads: int = 4
    key_value_heads: int = 0
    head_dim: int = 64
    window: int = 512  # of sliding_window; softmax reaches over the whole context
    rope_base: float = 10_000.0

    def __post_init__(self):
        check_sizes(self, "heads", "head_dim", "window")
        if self.key_value_heads < 0 or self.heads % (self.key_value_heads or self.heads):
            raise ValueError(f"key_value_heads is {self.key_value_heads}; it must be 0 or divide heads = {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; it must be even, rotary positions turn pairs")


class KeyValueCache(NamedTuple):
    """The last S keys and values, that of position p in slot p mod S; position is how many tokens came before."""

    key: Float[Array, "B S Hk D"]
    value: Float[Array, "B S Hk D"]
    position: Int[Array, "B"]


def rotate(x_BTHD: jax.Array, position_BT: jax.Array, base: float) -> jax.Array:
    """Rotary positions (Su et al., arXiv 2104.09864): pairs (i, i + D/2) turned by position · base^(-2i/D)."""
    half = x_BTHD.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1F = position_BT[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle_BT1F), jnp.sin(angle_BT1F)
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BTHD.dtype)


class SoftmaxAttention(nnx.Module):
    """Causal softmax attention of the last `reach` tokens, the token itself counted. Called as `EFLA` is."""

    def __init__(
        self,
        features: int,
        config: AttentionConfig,
        reach: int,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.config, self.reach = config, reach
        init = nnx.initializers.xavier_uniform()
        options = dict(use_bias=False, kernel_init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.key_heads = config.key_value_heads or config.heads
        self.query = nnx.Linear(features, config.heads * config.head_dim, **options)
        self.key, self.value = (nnx.Linear(features, self.key_heads * config.head_dim, **options) for _ in range(2))
        self.out = nnx.Linear(config.heads * config.head_dim, features, **options)

    def __call__(
        self,
        x_BTE: Float[Array, "B T E"],
        *,
        cache: KeyValueCache | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
        partition_spec: PartitionSpec | None = None,
    ) -> tuple[Float[Array, "B T E"], KeyValueCache | None]:
        """Returns (y, cache after the last token), no cache if none was given; arguments as in `EFLA.__call__`."""
        del partition_spec  # plain XLA: the compiler shards it
        dim = self.config.head_dim
        split = lambda x: x.reshape(*x.shape[:2], x.shape[2] // dim, dim)
        query, key, value = split(self.query(x_BTE)), split(self.key(x_BTE)), split(self.value(x_BTE))
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids is given together with a cache; a cache continues one document a row")
        start_B = jnp.zeros(x_BTE.shape[:1], jnp.int32) if cache is None else cache.position
        position_BT = start_B[:, None] + jnp.arange(x_BTE.shape[1])[None]
        query = rotate(query, position_BT, self.config.rope_base)
        key = rotate(key, position_BT, self.config.rope_base)
        if cache is None:
            same = None
            if segment_ids is not None:  # a change of id starts a document, though the id was seen before
                document_BT = jnp.cumsum(segment_starts(segment_ids), axis=1)
                same = document_BT[:, None, :, None] == document_BT[:, None, None, :]
            window = (self.reach - 1, 0) if self.reach < x_BTE.shape[1] else None
            y = jax.nn.dot_product_attention(query, key, value, mask=same, is_causal=True, local_window_size=window)
        else:
            y, cache = self._attend(query, key, value, position_BT, cache, lengths)
        return self.out(y.reshape(*x_BTE.shape[:2], self.config.heads * dim)), cache

    def _attend(self, query, key, value, position_BT, cache, lengths):
        """Attention to the cache and to the new tokens; the cache with the new tokens in it."""
        slots, new = cache.key.shape[1], key.shape[1]
        last_B1 = cache.position[:, None] - 1
        held_BS = last_B1 - (last_B1 - jnp.arange(slots)[None]) % slots  # the newest position in each slot; < 0: none
        source = jnp.concatenate([held_BS, position_BT], axis=1)[:, None, None, :]
        distance = position_BT[:, None, :, None] - source
        mask = (source >= 0) & (distance >= 0) & (distance < self.reach)
        keys, values = (jnp.concatenate(pair, axis=1) for pair in ((cache.key, key), (cache.value, value)))
        y = jax.nn.dot_product_attention(query, keys, values, mask=mask)
        count_B = jnp.full_like(cache.position, new) if lengths is None else lengths
        token = jnp.arange(new)[None]
        kept = (token < count_B[:, None]) & (token >= count_B[:, None] - slots)
        slot_BT = jnp.where(kept, position_BT % slots, slots)  # one past the end: dropped
        write = jax.vmap(lambda held, slot, fresh: held.at[slot].set(fresh, mode="drop"))
        held = KeyValueCache(
            write(cache.key, slot_BT, key), write(cache.value, slot_BT, value), cache.position + count_B
        )
        return y, held

    def empty_cache(self, batch: int) -> KeyValueCache:
        """The cache before the first token."""
        empty = jnp.zeros((batch, self.reach, self.key_heads, self.config.head_dim), self.query.dtype)
        return KeyValueCache(empty, empty, jnp.zeros(batch, jnp.int32))
