"""The EFLA mixer: projections, optional short convolution, the op, optional decay, output norm and gate."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from efla_jax.choices import check_choice, check_sizes
from efla_jax.layers.convolution import ShortConvolution
from efla_jax.ops.attention import ImplementationName, efla_attention, efla_step
from efla_jax.ops.coefficients import INTEGRATORS, Integrator, erase_and_write
from efla_jax.ops.registry import step_name

Beta = Literal["sigmoid", "softplus"]
Decay = Literal["none", "log", "v4"]
_NORM_EPSILON = 1e-6
_MOST_ON_UNIT_KEYS = dict(exact=1 - math.exp(-1), split=1 - math.exp(-1), euler=1.0, implicit=0.5)
_V4_DECAY_BIAS = 4.0  # α_g = σ(4): a new layer forgets 1.8 % a token


@dataclass(frozen=True)
class MixerConfig:
    """Options of one mixer. EFLA is integrator "exact" on raw keys; DeltaNet is "euler" with normalize_keys.

    heads value heads of value_dim; key_heads (0: as many) heads of key_dim, heads a multiple of it. beta is the
    function that makes the step size of its logit, whose bias starts at beta_bias (None: it has none).
    decay: "log" is log_decay = -exp(rate)·softplus(logit + bias), as in Gated DeltaNet (arXiv 2412.06464); "v4" is
    log_decay = -(1 - sigmoid(logit)), the gate of arXiv 2512.12602v4, which never forgets more than 1 - 1/e a token.
    initial_gate: the mean a = erase·‖k‖² that a new layer has on inputs of unit variance; it is brought about by the
    scale of raw keys, or by the bias of beta where keys are normalised. 0 leaves the layer as initialised.
    """

    heads: int = 4
    key_heads: int = 0
    key_dim: int = 64
    value_dim: int = 64
    integrator: Integrator = "exact"
    normalize_keys: bool = False
    normalize_queries: bool = False
    scale: float = 1.0  # of the output, before its norm
    beta: Beta = "sigmoid"
    beta_bias: float | None = -2.0
    initial_gate: float = 0.0
    decay: Decay = "none"
    conv_width: int = 0
    activation: bool = False  # SiLU on query, key and value
    output_norm: bool = True  # RMSNorm over each head's output
    output_gate: bool = False
    # Of the op, as `efla_attention` takes it; for single tokens its own step where it has one, see `step_name`.
    implementation: str | None = None

    def __post_init__(self):
        check_choice("integrator", self.integrator, INTEGRATORS)
        check_choice("beta", self.beta, get_args(Beta))
        check_choice("decay", self.decay, get_args(Decay))
        if self.implementation is not None:
            check_choice("implementation", self.implementation, get_args(ImplementationName))
        check_sizes(self, "heads", "key_dim", "value_dim")
        if self.conv_width < 0:
            raise ValueError(f"conv_width is {self.conv_width}; it must be 0 (none) or more")
        if self.key_heads < 0 or self.heads % (self.key_heads or self.heads):
            raise ValueError(f"key_heads is {self.key_heads}; it must be 0 or divide heads = {self.heads}")
        if not 0 <= self.initial_gate < 1:
            raise ValueError(f"initial_gate is {self.initial_gate}; it must be in [0, 1), 0 for none")
        self._check_initial_gate()

    def _check_initial_gate(self):
        if not self.initial_gate:
            return
        if self.normalize_keys and self.beta_bias is None:
            raise ValueError("initial_gate needs a bias of beta on normalised keys; beta_bias is None")
        if self.integrator in ("rk2", "rk4"):
            raise ValueError(
                f"initial_gate is {self.initial_gate}; the gate of {self.integrator} does not grow with ‖k‖"
            )
        if self.normalize_keys and self.beta == "sigmoid" and self.initial_gate >= _MOST_ON_UNIT_KEYS[self.integrator]:
            most = _MOST_ON_UNIT_KEYS[self.integrator]
            raise ValueError(f"initial_gate is {self.initial_gate}; unit keys with β < 1 stay below {most:.3f}")


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


def _strength(config: MixerConfig, key_BTHK: jax.Array, beta_BTH: jax.Array) -> jax.Array:
    """a = erase·λ [B, T, H]: the part of what the state holds along the key that a step replaces."""
    erase_BTH, _ = erase_and_write(key_BTHK, beta_BTH, None, config.integrator)
    lam = jnp.sum(jnp.square(key_BTHK.astype(erase_BTH.dtype)), -1)
    batch, length, heads = erase_BTH.shape
    key_heads = lam.shape[2]
    grouped = erase_BTH.reshape(batch, length, key_heads, heads // key_heads) * lam[..., None]
    return grouped.reshape(erase_BTH.shape)


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
        bias_init = nnx.initializers.constant(config.beta_bias or 0.0)
        use_bias = config.beta_bias is not None
        self.beta = nnx.Linear(features, config.heads, use_bias=use_bias, bias_init=bias_init, **options)
        self.out = nnx.Linear(config.heads * config.value_dim, features, **linear)
        if config.conv_width:
            convolution = dict(param_dtype=param_dtype, rngs=rngs)
            self.convolutions = nnx.List(ShortConvolution(n, config.conv_width, **convolution) for n in sizes)
        if config.output_norm:
            self.norm = nnx.RMSNorm(config.value_dim, **options)
        if config.output_gate:
            self.gate = nnx.Linear(features, config.heads * config.value_dim, **linear)
        if config.decay == "v4":
            bias_init = nnx.initializers.constant(_V4_DECAY_BIAS)
            self.decay = nnx.Linear(features, config.heads, bias_init=bias_init, **options)
        if config.decay == "log":
            self.decay = nnx.Linear(features, config.heads, use_bias=False, **options)
            rate, bias = _initial_decay(rngs.params(), config.heads)
            self.decay_rate = nnx.Param(rate.astype(param_dtype))
            self.decay_bias = nnx.Param(bias.astype(param_dtype))
        if config.initial_gate:
            self._set_gate(features, rngs.params())

    def _set_gate(self, features: int, rng: jax.Array) -> None:
        """Solves for the scale of the keys, or the bias of beta, by bisection on 256 tokens of unit variance."""
        config = self.config
        x_BTE = jax.random.normal(rng, (1, 256, features), jnp.float32)
        key_BTD, logits_BTH = self.key(x_BTE), self.beta(x_BTE)
        if config.conv_width:
            key_BTD, _ = self.convolutions[1](key_BTD)

        def weak(knob):
            key = key_BTD if config.normalize_keys else key_BTD * jnp.exp(knob)  # projection and convolution are linear
            key = jax.nn.silu(key) if config.activation else key
            key_BTHK = key.reshape(*key.shape[:2], -1, config.key_dim)
            if config.normalize_keys:
                key_BTHK = unit_keys(key_BTHK)
            beta_BTH = step_size(logits_BTH + (knob if config.normalize_keys else 0), config.beta)
            return jnp.mean(_strength(config, key_BTHK, beta_BTH)) < config.initial_gate

        def halve(_, interval):
            low, high = interval
            middle = (low + high) / 2
            return jnp.where(weak(middle), middle, low), jnp.where(weak(middle), high, middle)

        knob, _ = jax.lax.fori_loop(0, 30, halve, (jnp.float32(-20), jnp.float32(20)))
        if config.normalize_keys:
            assert self.beta.bias is not None  # the config was checked
            self.beta.bias[...] += knob
        else:
            self.key.kernel[...] *= jnp.exp(knob)

    def project(self, x_BTE, history=(), segment_ids=None, lengths=None):
        """-> query, key, value [B, T, heads, D], beta [B, T, H] in float32, and the convolutions' new history."""
        config = self.config
        projected = [self.query(x_BTE), self.key(x_BTE), self.value(x_BTE)]
        new_history = ()
        if config.conv_width:
            histories = history or (None,) * 3
            pairs = [
                convolution(x, history=past, segment_ids=segment_ids, lengths=lengths)
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
        if config.normalize_queries:
            query = unit_keys(query)
        return query, key, value, step_size(self.beta(x_BTE), config.beta), new_history

    def log_decay(self, x_BTE: Float[Array, "B T E"]) -> Float[Array, "B T H"] | None:
        """log_decay ≤ 0 of each token and head in float32, or None without decay."""
        if self.config.decay == "none":
            return None
        logits_BTH = self.decay(x_BTE).astype(jnp.float32)
        if self.config.decay == "v4":
            return -jax.nn.sigmoid(-logits_BTH)  # -(1 - α_g)
        rate_H, bias_H = (x[...].astype(jnp.float32)[None, None] for x in (self.decay_rate, self.decay_bias))
        return -jnp.exp(rate_H) * jax.nn.softplus(logits_BTH + bias_H)

    def __call__(
        self,
        x_BTE: Float[Array, "B T E"],
        *,
        cache: Cache | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
        partition_spec: PartitionSpec | None = None,
    ) -> tuple[Float[Array, "B T E"], Cache]:
        """Returns (y, cache after the last token); segment_ids and partition_spec as in `efla_attention`.

        lengths [B] is for rows that are padded behind: the cache is that after this many tokens of each row, and the
        outputs behind them mean nothing.
        """
        y_BTE, cache, _ = self.mix(
            x_BTE, cache=cache, segment_ids=segment_ids, lengths=lengths, partition_spec=partition_spec
        )
        return y_BTE, cache

    def mix(self, x_BTE, *, cache=None, segment_ids=None, lengths=None, partition_spec=None):
        """As `__call__`, and as a third result the strength a of each token's gate, the heads' mean, float32 [B, T]."""
        config = self.config
        history = cache.history if cache else ()
        query, key, value, beta, history = self.project(x_BTE, history, segment_ids, lengths)
        log_decay = self.log_decay(x_BTE)
        strength_BT = jnp.mean(_strength(config, key, beta), axis=-1)
        if lengths is not None:  # a step of size 0 leaves the state as it is
            valid_BT1 = (jnp.arange(x_BTE.shape[1])[None] < lengths[:, None])[..., None]
            beta = jnp.where(valid_BT1, beta, 0)
            log_decay = None if log_decay is None else jnp.where(valid_BT1, log_decay, 0)
        options = dict(scale=config.scale, integrator=config.integrator)
        if x_BTE.shape[1] == 1 and cache is not None and segment_ids is None:  # decoding
            decay_BH = None if log_decay is None else log_decay[:, 0]
            types = (query.dtype, key.dtype, value.dtype)
            step = step_name(config.implementation, types, config.key_dim, config.value_dim)
            mixed_BHV, state = efla_step(
                query[:, 0], key[:, 0], value[:, 0], beta[:, 0], cache.state, log_decay=decay_BH,
                implementation=cast(ImplementationName | None, step), partition_spec=partition_spec, **options,
            )  # fmt: skip
            mixed_BTHV = mixed_BHV[:, None]
        else:
            initial_state = cache.state if cache else None
            mixed_BTHV, state = efla_attention(
                query, key, value, beta, log_decay=log_decay, initial_state=initial_state, segment_ids=segment_ids,
                implementation=cast(ImplementationName | None, config.implementation), partition_spec=partition_spec,
                **options,
            )  # fmt: skip
        if config.output_norm:
            mixed_BTHV = self.norm(mixed_BTHV)
        y_BTD = mixed_BTHV.reshape(*x_BTE.shape[:2], config.heads * config.value_dim)
        if config.output_gate:
            y_BTD = y_BTD * jax.nn.silu(self.gate(x_BTE))
        return self.out(y_BTD), Cache(state, history), strength_BT

    def empty_cache(self, batch: int) -> Cache:
        """The cache before the first token, in the types that a call returns."""
        config, key_heads = self.config, self.config.key_heads or self.config.heads
        dtype = self.query.dtype
        history = ()
        if config.conv_width:
            sizes = (key_heads * config.key_dim, key_heads * config.key_dim, config.heads * config.value_dim)
            history = tuple(jnp.zeros((batch, config.conv_width - 1, size), dtype) for size in sizes)
        return Cache(jnp.zeros((batch, config.heads, config.key_dim, config.value_dim), jnp.float32), history)


def _initial_decay(key: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """(rate, bias) [H] of Gated DeltaNet: exp(rate) in (0, 16), softplus(bias) log-uniform in [0.001, 0.1]."""
    rate_key, step_key = jax.random.split(key)
    rate = jnp.log(jax.random.uniform(rate_key, (heads,), minval=1e-3, maxval=16.0))
    step = jnp.exp(jax.random.uniform(step_key, (heads,), minval=jnp.log(1e-3), maxval=jnp.log(0.1)))
    return rate, step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus
