"""The compiled programs of a language model, few whatever the prompts: one for each batch size and length.

    logits_BV, cache = programs.forward(params, tokens_BL, lengths_B, cache)

goes on from a cache by lengths_B[b] tokens of each row b and gives the logits after the last of them. Prefill is this
with a long L, decoding with L = 1; `decode` is many such steps, each with a token drawn, in one call of the device.
`JittedPrograms` compiles them when they are first called; exported ones, see `export.py`, have the same interface.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from efla_jax.inference.sampling import Rows, sample
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

    def prepare(self, params: Any, /) -> Any:
        """The parameters as the other calls take them fastest, for those who make many of them."""
        ...

    def forward(self, params: Any, tokens_BL: Any, lengths_B: Any, cache: Cache, /) -> tuple[jax.Array, Cache]:
        """(logits float32 [B, vocab] after each row's last token, the new cache); takes the cache's buffers.

        tokens_BL, lengths_B: int32. A row of length 0 keeps its cache, and its logits mean nothing.
        """
        ...

    def decode(
        self, params: Any, rows: Rows, left_B: Any, cache: Cache, /, *, count: int, vocabulary: int, drawing: bool
    ) -> tuple[jax.Array, Rows, Cache]:
        """`count` times `forward` of the rows' last tokens and `sample`, without the host: (tokens int32 [count, B],
        rows, cache), as so many single calls give them; takes the cache's buffers.

        left_B: int32, how many tokens each row wants; after them it keeps its cache and its tokens mean nothing.
        drawing: whether some row has a temperature above 0.
        """
        ...


def decode_batch(programs: Programs, slots: int) -> int:
    """The batch size that decodes so many requests: the least that holds them, else the largest.

    On a GPU a single one gets a second, idle row beside it: XLA there turns products of one row into sums, and writes
    the scaled weights to memory first, three times the traffic of a product of two rows.
    """
    least = 2 if slots == 1 and jax.default_backend() == "gpu" and 2 in programs.batch_sizes else slots
    return next((size for size in programs.batch_sizes if size >= least), programs.batch_sizes[-1])


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


def make_decode(forward: Forward) -> Callable[..., tuple[jax.Array, Rows, Cache]]:
    """`Programs.decode` of a `Programs.forward`, to be jitted with count, vocabulary and drawing static."""

    def decode(params, rows, left_B, cache, *, count, vocabulary, drawing):
        def step(carry, number):
            rows, cache = carry
            logits_BV, cache = forward(params, rows.token, (number < left_B).astype(jnp.int32), cache)
            rows = sample(logits_BV, rows, vocabulary, drawing)
            return (rows, cache), rows.token[:, 0]

        # of a fixed number of steps: a GPU then starts them one after the other without asking the host
        (rows, cache), tokens_NB = jax.lax.scan(step, (Rows(*map(jnp.asarray, rows)), cache), jnp.arange(count))
        return tokens_NB, rows, cache

    return decode


jit_decode = partial(jax.jit, static_argnames=("count", "vocabulary", "drawing"), donate_argnums=3)


@partial(jax.jit, static_argnums=0)
def _matrices_as(dtype: str, params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)


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
        forward = make_forward(config)
        self._dtype = config.dtype
        self._forward = jax.jit(forward, donate_argnums=3)
        self._decode = jit_decode(make_decode(forward))

    def empty_cache(self, batch: int) -> Cache:
        return zeros(self._form(batch))

    def forward(self, params: Any, tokens_BL: Any, lengths_B: Any, cache: Cache, /) -> tuple[jax.Array, Cache]:
        return self._forward(params, tokens_BL, lengths_B, cache)

    def prepare(self, params: Any, /) -> Any:
        """Matrices in the type that products are computed in, to which every call would cast them again."""
        return _matrices_as(self._dtype, params)

    def decode(
        self, params: Any, rows: Rows, left_B: Any, cache: Cache, /, *, count: int, vocabulary: int, drawing: bool
    ) -> tuple[jax.Array, Rows, Cache]:
        return self._decode(params, rows, left_B, cache, count=count, vocabulary=vocabulary, drawing=drawing)


@jax.jit
def read_slot(slots: Any, index: int | jax.Array) -> Any:
    """Row `index` of every leaf, as a tree of one row."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1), slots)


@partial(jax.jit, donate_argnums=0)
def write_slot(slots: Any, row: Any, index: int | jax.Array) -> Any:
    """slots, whose buffers are taken, with row `index` of every leaf replaced by a tree of one row."""
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, index, 0), slots, row)
