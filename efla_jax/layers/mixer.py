"""The EFLA mixer: projections, optional short convolution, the op, optional output norm and gate."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from efla_jax.choices import check_choice, check_sizes
from efla_jax.layers.convolution import ShortConvolution
from efla_jax.ops.attention import efla_attention
from efla_jax.ops.coefficients import INTEGRATORS, Integrator

Beta = Literal["sigmoid", "softplus"]
_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class MixerConfig:
    """Options of one mixer. EFLA is integrator "exact" on raw keys; DeltaNet is "euler" with normalize_keys.

    heads value heads of value_dim; key_heads (0: as many) heads of key_dim, heads a multiple of it. beta is the
    function that makes the step size of its logit, whose bias starts at beta_bias. conv_width 0 is no convolution.
    """

    heads: int = 4
    key_heads: int = 0
    key_dim: int = 64
    value_dim: int = 64
    integrator: Integrator = "exact"
    normalize_keys: bool = False
    beta: Beta = "sigmoid"
    beta_bias: float = -2.0
    conv_width: int = 0
    activation: bool = False  # SiLU on query, key and value
    output_norm: bool = True  # RMSNorm over each head's output
    output_gate: bool = False

    def __post_init__(self):
        check_choice("integrator", self.integrator, INTEGRATORS)
        check_choice("beta", self.beta, get_args(Beta))
        check_sizes(self, "heads", "key_dim", "value_dim")
        if self.conv_width < 0:
            raise ValueError(f"conv_width is {self.conv_width}; it must be 0 (none) or more")
        if self.key_heads < 0 or self.heads % (self.key_heads or self.heads):
            raise ValueError(f"key_heads is {self.key_heads}; it must be 0 or divide heads = {self.heads}")


class Cache(NamedTuple):
    """What a mixer carries from one call to the next. history is (query, key, value) of the convolutions."""

    state: Float[Array, "B H K V"]
    history: tuple[jax.Array, ...] = ()


def step_size(logits_BTH: jax.Array, beta: Beta) -> jax.Array:
    """β ≥ 0 of its logits, in float32."""
    logits = logits_BTH.astype(jnp.float32)
    return jax.nn.sigmoid(logits) if beta == "sigmoid" else jax.nn.softplus(logits)


def unit_keys(key_BTHK: jax.Array) -> jax.Array:
    """k / ‖k‖, finite and differentiable at k = 0."""
    key = key_BTHK.astype(jnp.float32)
    norm = jax.lax.rsqrt(jnp.sum(key * key, -1, keepdims=True) + _NORM_EPSILON)
    return (key * norm).astype(key_BTHK.dtype)


class EFLA(nnx.Module):
    """Linear attention by the exactly integrated delta rule (arXiv 2512.12602) in place of softmax attention.

    y, cache = EFLA(features, MixerConfig(...), rngs=nnx.Rngs(0))(x) for x [B, T, features]. Pass the cache on to go
    on from where the last call stopped, by any number of tokens.
    """

    def __init__(
        self,
        features: int,
        config: MixerConfig | None = None,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.config = config = config or MixerConfig()
        key_heads = config.key_heads or config.heads
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        linear = dict(use_bias=False, kernel_init=nnx.initializers.xavier_uniform(), **options)
        sizes = (key_heads * config.key_dim, key_heads * config.key_dim, config.heads * config.value_dim)
        self.query, self.key, self.value = (nnx.Linear(features, size, **linear) for size in sizes)
        self.beta = nnx.Linear(features, config.heads, bias_init=nnx.initializers.constant(config.beta_bias), **options)
        self.out = nnx.Linear(config.heads * config.value_dim, features, **linear)
        if config.conv_width:
            convolution = dict(param_dtype=param_dtype, rngs=rngs)
            self.convolutions = nnx.List(ShortConvolution(n, config.conv_width, **convolution) for n in sizes)
        if config.output_norm:
            self.norm = nnx.RMSNorm(config.value_dim, **options)
        if config.output_gate:
            self.gate = nnx.Linear(features, config.heads * config.value_dim, **linear)

    def project(self, x_BTE, history=(), segment_ids=None):
        """-> query, key, value [B, T, heads, D], beta [B, T, H] in float32, and the convolutions' new history."""
        config = self.config
        projected = [self.query(x_BTE), self.key(x_BTE), self.value(x_BTE)]
        new_history = ()
        if config.conv_width:
            histories = history or (None,) * 3
            pairs = [
                convolution(x, history=past, segment_ids=segment_ids)
                for convolution, x, past in zip(self.convolutions, projected, histories, strict=True)
            ]
            projected, new_history = [pair[0] for pair in pairs], tuple(pair[1] for pair in pairs)
        if config.activation:
            projected = [jax.nn.silu(x) for x in projected]
        dims = (config.key_dim, config.key_dim, config.value_dim)
        query, key, value = (
            x.reshape(*x.shape[:2], x.shape[2] // dim, dim) for x, dim in zip(projected, dims, strict=True)
        )
        if config.normalize_keys:
            key = unit_keys(key)
        return query, key, value, step_size(self.beta(x_BTE), config.beta), new_history

    def __call__(
        self,
        x_BTE: Float[Array, "B T E"],
        *,
        cache: Cache | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        partition_spec: PartitionSpec | None = None,
    ) -> tuple[Float[Array, "B T E"], Cache]:
        """Returns (y, cache after the last token); segment_ids and partition_spec as in `efla_attention`."""
        query, key, value, beta, history = self.project(x_BTE, cache.history if cache else (), segment_ids)
        mixed_BTHV, state = efla_attention(
            query,
            key,
            value,
            beta,
            initial_state=cache.state if cache else None,
            segment_ids=segment_ids,
            integrator=self.config.integrator,
            partition_spec=partition_spec,
        )
        if self.config.output_norm:
            mixed_BTHV = self.norm(mixed_BTHV)
        y = mixed_BTHV.reshape(*x_BTE.shape[:2], self.config.heads * self.config.value_dim)
        if self.config.output_gate:
            y = y * jax.nn.silu(self.gate(x_BTE))
        return self.out(y), Cache(state, history)
