"""A decoder-only language model whose blocks mix tokens by EFLA, DeltaNet, their gated forms, or softmax attention."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from efla_jax.choices import Dtype, check_choice, check_sizes
from efla_jax.layers import EFLA, AttentionConfig, MixerConfig, SoftmaxAttention, SwiGLU
from efla_jax.ops.sharding import constrain

# What a mixer's name sets in the config's MixerConfig. "gated" decays by a log-decay, "v4" by the gate of paper's v4.
_EFLA = dict(integrator="exact", normalize_keys=False)
_DELTANET = dict(integrator="euler", normalize_keys=True)
LINEAR_MIXERS: dict[str, dict[str, Any]] = {
    "efla": _EFLA | dict(decay="none"),
    "gated_efla": _EFLA | dict(decay="log"),
    "v4_efla": _EFLA | dict(decay="v4"),
    "deltanet": _DELTANET | dict(decay="none"),
    "gated_deltanet": _DELTANET | dict(decay="log"),
    "v4_deltanet": _DELTANET | dict(decay="v4"),
}
MIXERS = (*LINEAR_MIXERS, "softmax", "sliding_window")
Remat = Literal["none", "dots", "full"]


@dataclass(frozen=True)
class LanguageModelConfig:
    """`layers` blocks of width `features`, each a mixer and a SwiGLU of width `hidden`, over vocab_size tokens.

    mixers names the mixer of each block, from MIXERS; a shorter list is repeated, so that ("efla", "efla", "softmax")
    is a hybrid with every third block softmax. What is common to the linear ones stands in `mixer` (integrator,
    normalize_keys and decay come with the name), to the others in `attention`. context is how many tokens a softmax
    block can look back on, when decoding too. tied: the head is the embedding.
    dtype is that of activations and products; parameters are float32. The loss is not scaled for float16, whose range
    then loses small gradients. remat is what the backward pass computes again:
    nothing, all but products with weights ("dots"), or whole blocks ("full").
    """

    vocab_size: int = 257
    features: int = 128
    layers: int = 2
    hidden: int = 384
    mixers: tuple[str, ...] = ("efla",)
    mixer: MixerConfig = field(default_factory=lambda: MixerConfig(conv_width=4, activation=True))
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    context: int = 2048
    tied: bool = False
    dtype: Dtype = "float32"
    remat: Remat = "none"

    def __post_init__(self):
        if isinstance(self.mixers, str):
            raise ValueError(f"mixers is {self.mixers!r}; it must be a tuple of names, one for each block or fewer")
        object.__setattr__(self, "mixers", tuple(self.mixers))  # JSON has lists
        check_sizes(self, "vocab_size", "features", "layers", "hidden", "context")
        if not self.mixers or len(self.mixers) > self.layers:
            raise ValueError(f"mixers has {len(self.mixers)} names; it must have 1 to layers = {self.layers}")
        for name in self.mixers:
            check_choice("mixers", name, MIXERS)
            if name in LINEAR_MIXERS:
                linear_config(name, self.mixer)
        check_choice("dtype", self.dtype, get_args(Dtype))
        check_choice("remat", self.remat, get_args(Remat))

    @property
    def block_mixers(self) -> tuple[str, ...]:
        """The mixer of each block."""
        return tuple(self.mixers[number % len(self.mixers)] for number in range(self.layers))

    @property
    def key_heads(self) -> int:
        """What a tensor-parallel mesh axis must divide: key heads, of all mixers that occur."""
        mixer, attention = self.mixer, self.attention
        linear = mixer.key_heads or mixer.heads
        other = attention.key_value_heads or attention.heads
        return math.gcd(*{linear if name in LINEAR_MIXERS else other for name in self.mixers})

    @property
    def reach(self) -> int | None:
        """How many tokens a row may have in all, prompt and completion; None where there is no such limit."""
        return self.context if "softmax" in self.block_mixers else None


def linear_config(name: str, base: MixerConfig) -> MixerConfig:
    """The config of the linear mixer of this name."""
    return dataclasses.replace(base, **LINEAR_MIXERS[name])


class Block(nnx.Module):
    """x + mixer(norm x), then x + mlp(norm x)."""

    def __init__(self, config: LanguageModelConfig, kind: str, *, rngs: nnx.Rngs):
        options = dict(rngs=rngs, dtype=jnp.dtype(config.dtype))
        self.mixer_norm = nnx.RMSNorm(config.features, **options)
        if kind in LINEAR_MIXERS:
            self.mixer = EFLA(config.features, linear_config(kind, config.mixer), **options)
        else:
            reach = config.context if kind == "softmax" else min(config.attention.window, config.context)
            self.mixer = SoftmaxAttention(config.features, config.attention, reach, **options)
        self.mlp_norm = nnx.RMSNorm(config.features, **options)
        self.mlp = SwiGLU(config.features, config.hidden, **options)

    @property
    def has_gate(self) -> bool:
        return isinstance(self.mixer, EFLA)

    def __call__(self, x_BTE, *, cache=None, segment_ids=None, lengths=None, partition_spec=None):
        """-> (x, cache, strength of the mixer's gate float32 [B, T], NaN where it has none)."""
        options = dict(cache=cache, segment_ids=segment_ids, lengths=lengths, partition_spec=partition_spec)
        if isinstance(self.mixer, EFLA):
            mixed_BTE, cache, strength_BT = self.mixer.mix(self.mixer_norm(x_BTE), **options)
        else:
            mixed_BTE, cache = self.mixer(self.mixer_norm(x_BTE), **options)
            strength_BT = jnp.full(x_BTE.shape[:2], jnp.nan, jnp.float32)
        x_BTE = x_BTE + mixed_BTE
        return x_BTE + self.mlp(self.mlp_norm(x_BTE)), cache, strength_BT


@partial(jax.jit, static_argnums=(0, 1))
def _run_block(graph, partition_spec, params, x_BTE, cache, segment_ids, lengths):
    """A block from its static part and parameters. Jitted so that blocks which differ in their parameters alone are
    traced, differentiated and lowered once; the compiler inlines the calls."""
    options = dict(cache=cache, segment_ids=segment_ids, lengths=lengths, partition_spec=partition_spec)
    return nnx.merge(graph, params)(x_BTE, **options)


def _equal_blocks(config: LanguageModelConfig, kind: str, count: int, rngs: nnx.Rngs) -> Iterator[Block]:
    """So many blocks of one kind, drawn together: XLA needs seconds to compile the random numbers of a single one."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap
    def draw(rngs):
        return Block(config, kind, rngs=rngs)

    graph, params = nnx.split(draw(rngs))
    params = jax.lax.optimization_barrier(params)  # else XLA draws them anew for every block that is cut out
    part = lambda i: jax.tree.map(lambda x: x[i], params)
    return (nnx.merge(graph, part(i)) for i in range(count))


class LanguageModel(nnx.Module):
    """Token ids -> embedding -> blocks -> norm -> head.

    hidden, cache = model(tokens); logits = model.logits(hidden). A cache is a tuple with one entry a block, every leaf
    of which has the row as its first axis: rows are slots that can be read and written by index.
    """

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype, init = jnp.dtype(config.dtype), nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(config.vocab_size, config.features, embedding_init=init, dtype=dtype, rngs=rngs)
        kinds = config.block_mixers
        blocks = {kind: _equal_blocks(config, kind, kinds.count(kind), rngs) for kind in dict.fromkeys(kinds)}
        self.blocks = nnx.List(next(blocks[kind]) for kind in kinds)
        self.norm = nnx.RMSNorm(config.features, dtype=dtype, rngs=rngs)
        if not config.tied:
            self.head = nnx.Linear(
                config.features, config.vocab_size, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs
            )

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        cache: tuple | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
        partition_spec: PartitionSpec | None = None,
    ) -> tuple[Float[Array, "B T E"], tuple]:
        """Normed hidden states and the cache after the last token.

        cache: of an earlier call or `empty_cache`; the tokens go on from there. Without one, softmax blocks give none.
        lengths: [B] how many tokens of each row count, the first ones; 0 leaves a row's cache as it is.
        segment_ids: [B, T], documents packed into a row, as in `efla_attention`.
        partition_spec: how [B, T, H, D] lies on the mesh in context.
        """
        hidden_BTE, cache, _ = self.trace(
            tokens_BT, cache=cache, segment_ids=segment_ids, lengths=lengths, partition_spec=partition_spec
        )
        return hidden_BTE, cache

    def trace(self, tokens_BT, *, cache=None, segment_ids=None, lengths=None, partition_spec=None):
        """As `__call__`, and as a third result the gate strengths of the blocks, a tuple of float32 [B, T]."""
        x_BTE = self._embed(tokens_BT, partition_spec)
        new_cache, strengths = [], []
        for number, block in enumerate(self.blocks):
            held = None if cache is None else cache[number]
            graph, params = nnx.split(block)
            call = partial(_run_block, graph, partition_spec)
            x_BTE, held, strength_BT = self._remat(call)(params, x_BTE, held, segment_ids, lengths)
            new_cache.append(held)
            strengths.append(strength_BT)
        return self.norm(x_BTE), tuple(new_cache), tuple(strengths)

    def _embed(self, tokens_BT, partition_spec):
        table_VE = self.embed.embedding[...]
        if partition_spec is not None:  # what is gathered is the table, not the activations, which are split by rows
            table_VE = constrain(table_VE, partition_spec[2], None)
        x_BTE = jnp.take(table_VE, tokens_BT, axis=0).astype(self.config.dtype)
        return x_BTE if partition_spec is None else constrain(x_BTE, partition_spec[0], None, None)

    def _remat(self, call):
        if self.config.remat == "none":
            return call
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.config.remat == "dots" else None
        return jax.checkpoint(call, policy=policy)

    def head_kernel(self, partition_spec: PartitionSpec | None = None) -> Float[Array, "E vocab"]:
        """The head's weights in float32; with partition_spec split over the vocabulary alone, by the axes of heads."""
        kernel_EV = self.embed.embedding[...].T if self.config.tied else self.head.kernel[...]
        return kernel_EV if partition_spec is None else constrain(kernel_EV, None, partition_spec[2])

    def logits(self, hidden: Float[Array, "*n E"]) -> Float[Array, "*n vocab"]:
        """float32 logits of the next token."""
        dtype = hidden.dtype
        return jnp.matmul(hidden, self.head_kernel().astype(dtype), preferred_element_type=jnp.float32)

    def empty_cache(self, batch: int) -> tuple:
        """The cache before the first token of `batch` rows."""
        return tuple(block.mixer.empty_cache(batch) for block in self.blocks)
