"""The compiled programs of a language model, few whatever the prompts: one for each batch size and length.

    logits_BV, cache = programs.forward(params, tokens_BL, lengths_B, cache)

goes on from a cache by lengths_B[b] tokens of each row b and gives the logits after the last of them. Prefill is this
with a long L, decoding with L = 1. `JittedPrograms` compiles them when they are first called; exported ones, see
`export.py`, have the same interface.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from efla_jax.models import LanguageModel, LanguageModelConfig, graph_of

Cache = Any  # a pytree every leaf of which has the row as first axis
Forward = Callable[[Any, jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]

BATCH_SIZES = (1, 2, 4, 8, 16)
LENGTHS = (1, 16, 64, 256, 1024)


class Programs(Protocol):
    """What decoding needs of a model. Shapes other than batch_sizes × lengths are not served."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        ...

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Ascending."""
        ...

    @property
    def lengths(self) -> tuple[int, ...]:
        """Ascending, the first is 1."""
        ...

    def empty_cache(self, batch: int) -> Cache:
        """The cache of `batch` rows before their first token; no two leaves share a buffer."""
        ...

    def forward(self, params: Any, tokens_BL: Any, lengths_B: Any, cache: Cache, /) -> tuple[jax.Array, Cache]:
        """(logits float32 [B, vocab] after each row's last token, the new cache); takes the cache's buffers.

        tokens_BL, lengths_B: int32. A row of length 0 keeps its cache, and its logits mean nothing.
        """
        ...


def make_forward(config: LanguageModelConfig) -> Forward:
    """`Programs.forward` as a function that can be jitted or exported."""
    graph = graph_of(config)

    def forward(params, tokens_BL, lengths_B, cache):
        model = nnx.merge(graph, params)
        hidden_BLE, cache = model(tokens_BL, cache=cache, lengths=lengths_B)
        last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
        hidden_BE = jnp.take_along_axis(hidden_BLE, last_B11, axis=1)[:, 0]
        return model.logits(hidden_BE), cache

    return forward


def cache_form(config: LanguageModelConfig, batch: int) -> Cache:
    """Shapes and dtypes of the cache of `batch` rows."""
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    return jax.eval_shape(partial(model.empty_cache, batch))


def zeros(form: Cache) -> Cache:
    """An empty cache of this form: all models begin from zeros."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), form)


class JittedPrograms:
    """`Programs` of a model, each compiled at its first call."""

    def __init__(
        self,
        config: LanguageModelConfig,
        batch_sizes: tuple[int, ...] = BATCH_SIZES,
        lengths: tuple[int, ...] = LENGTHS,
    ):
        self.vocab_size, self.batch_sizes, self.lengths = config.vocab_size, batch_sizes, lengths
        self._form = cache(partial(cache_form, config))  # half a second each
        self._forward = jax.jit(make_forward(config), donate_argnums=3)

    def empty_cache(self, batch: int) -> Cache:
        return zeros(self._form(batch))

    def forward(self, params: Any, tokens_BL: Any, lengths_B: Any, cache: Cache, /) -> tuple[jax.Array, Cache]:
        return self._forward(params, tokens_BL, lengths_B, cache)


@jax.jit
def read_slot(slots: Any, index: int | jax.Array) -> Any:
    """Row `index` of every leaf, as a tree of one row."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1), slots)


@partial(jax.jit, donate_argnums=0)
def write_slot(slots: Any, row: Any, index: int | jax.Array) -> Any:
    """slots, whose buffers are taken, with row `index` of every leaf replaced by a tree of one row."""
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, index, 0), slots, row)
