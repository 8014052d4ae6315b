"""The public calls: validation, coefficients, choice of implementation, sharding."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from efla_jax.choices import check_choice
from efla_jax.ops.coefficients import INTEGRATORS, Integrator, accumulator_dtype, erase_and_write
from efla_jax.ops.registry import STEPS, Call, choose
from efla_jax.ops.sharding import mesh_axes, per_shard, shards, share_manual_axes

ImplementationName = Literal["pallas_gpu", "triton", "pallas_tpu", "xla", "scan"]
Precision = jax.lax.Precision | str | None

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


def _check_float(name, x):
    if not hasattr(x, "dtype") or x.dtype not in _FLOATS:
        found = getattr(x, "dtype", type(x).__name__)
        raise ValueError(f"{name} is {found}; it must be an array of float32, bfloat16, float16 or float64")


def _check_shape(name, x, shape, letters):
    """shape has None where any size ≥ 1 will do."""
    fits = x.ndim == len(shape) and all(want is None or want == have for want, have in zip(shape, x.shape, strict=True))
    if not fits:
        want = ", ".join(
            letter if size is None else f"{letter}={size}" for letter, size in zip(letters, shape, strict=True)
        )
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [{want}]")


def _check_heads_and_features(key, value, axis):
    key_heads, heads = key.shape[axis], value.shape[axis]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"value has H={heads} heads; H must be a multiple of Hk={key_heads}, the heads of key")
    if key.shape[-1] < 1 or value.shape[-1] < 1:
        raise ValueError(f"key has K={key.shape[-1]}, value V={value.shape[-1]}; both must be at least 1")


def _check_sequence(query, key, value, per_token, log_decay, initial_state, segment_ids):
    """Raises ValueError on the first input that does not fit; per_token maps names to [B, T, H] arrays."""
    for name, x in dict(query=query, key=key, value=value, **per_token).items():
        _check_float(name, x)
    _check_shape("key", key, (None,) * 4, ("B", "T", "Hk", "K"))
    _check_shape("query", query, key.shape, ("B", "T", "Hk", "K"))
    batch, length = key.shape[:2]
    _check_shape("value", value, (batch, length, None, None), ("B", "T", "H", "V"))
    _check_heads_and_features(key, value, 2)
    heads = value.shape[2]
    if log_decay is not None:
        _check_float("log_decay", log_decay)
        per_token = per_token | {"log_decay": log_decay}
    for name, x in per_token.items():
        _check_shape(name, x, (batch, length, heads), ("B", "T", "H"))
    if initial_state is not None:
        _check_float("initial_state", initial_state)
        shape = (batch, heads, key.shape[-1], value.shape[-1])
        _check_shape("initial_state", initial_state, shape, ("B", "H", "K", "V"))
    if segment_ids is not None:
        if not hasattr(segment_ids, "dtype") or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(
                f"segment_ids is {getattr(segment_ids, 'dtype', type(segment_ids).__name__)}; it must be int32"
            )
        _check_shape("segment_ids", segment_ids, (batch, length), ("B", "T"))


def _check_options(scale, chunk_size, precision):
    if not isinstance(scale, int | float):
        raise ValueError(f"scale is {scale!r}; it must be a Python number (multiply query by a traced scale)")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"chunk_size is {chunk_size!r}; it must be a power of two or None")
    return None if precision is None else jax.lax.Precision(precision)


def delta_rule_attention(
    query: Float[Array, "B T Hk K"],
    key: Float[Array, "B T Hk K"],
    value: Float[Array, "B T H V"],
    erase: Float[Array, "B T H"],
    write: Float[Array, "B T H"],
    *,
    log_decay: Float[Array, "B T H"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    scale: float = 1.0,
    implementation: ImplementationName | Sequence[ImplementationName] | None = None,
    chunk_size: int | None = None,
    precision: Precision = None,
    partition_spec: PartitionSpec | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = e^g (I - erase k kᵀ) S_{t-1} + write k vᵀ, o_t = scale · S_tᵀ q_t: the delta rule with any coefficients.

    `efla_attention` without the ODE. The arguments that both have are described there.

    Args:
        erase: how strongly a step forgets along its key as given; a contraction if 0 ≤ erase·‖k‖² ≤ 2.
        write: how strongly it adds k vᵀ.

    Returns:
        (output, state): output in value's type, state after the last token in float32 (float64 for float64 inputs).
    """
    _check_sequence(query, key, value, dict(erase=erase, write=write), log_decay, initial_state, segment_ids)
    options = _Options(scale, implementation, chunk_size, precision, partition_spec)
    return _attend(query, key, value, lambda _: (erase, write), None, log_decay, initial_state, segment_ids, options)


class _Options(NamedTuple):
    """The options that both calls on sequences have."""

    scale: float
    implementation: ImplementationName | Sequence[ImplementationName] | None
    chunk_size: int | None
    precision: Precision
    partition_spec: PartitionSpec | None


def _attend(query, key, value, coefficients, beta, log_decay, initial_state, segment_ids, options):
    """Chooses an implementation and runs it on every device's share, of inputs that were checked.

    coefficients(key) gives erase and write. beta is not None where they are the exact rule's: an implementation that
    takes it makes them itself.
    """
    precision = _check_options(options.scale, options.chunk_size, options.precision)
    query, key, value = (jnp.asarray(x) for x in (query, key, value))  # of NumPy's float64, float32 unless x64 is on
    batch, length, key_heads, key_dim = key.shape
    heads, value_dim = value.shape[2:]
    axes = mesh_axes(options.partition_spec, key, value)
    parts = shards(axes)
    call = Call(
        batch=batch // parts[0], length=length, key_heads=key_heads // parts[1], heads=heads // parts[1],
        key_dim=key_dim, value_dim=value_dim, dtypes=(query.dtype, key.dtype, value.dtype),
        log_decay=log_decay is not None, segments=segment_ids is not None, chunk_size=options.chunk_size,
        precision=precision, backend=jax.default_backend(),
    )  # fmt: skip
    chosen = choose(options.implementation, call)
    run = partial(chosen.run, scale=float(options.scale), chunk_size=options.chunk_size, precision=precision)
    dtype = accumulator_dtype(query, key, value)
    if initial_state is not None:
        initial_state = initial_state.astype(dtype)
    if length == 0 or batch == 0:
        state = jnp.zeros((batch, heads, key_dim, value_dim), dtype) if initial_state is None else initial_state
        return jnp.zeros_like(value), state
    if beta is not None and chosen.takes_beta(call):
        run, erase, write = partial(run, exact=True), beta, None
    else:
        erase, write = coefficients(key)
        if write is erase:  # kernels then read one number a token, and solve for the prediction error
            write = None
    inputs = share_manual_axes(query, key, value, erase, write, log_decay, initial_state, segment_ids)
    return per_shard(run, axes, *inputs)


def efla_attention(
    query: Float[Array, "B T Hk K"],
    key: Float[Array, "B T Hk K"],
    value: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    *,
    log_decay: Float[Array, "B T H"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    scale: float = 1.0,
    integrator: Integrator = "exact",
    implementation: ImplementationName | Sequence[ImplementationName] | None = None,
    chunk_size: int | None = None,
    precision: Precision = None,
    partition_spec: PartitionSpec | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Exact-flow linear attention (EFLA, arXiv 2512.12602): dS/dt = -(γI + β k kᵀ) S + β k vᵀ, one unit per token.

    S_t = e^g (I - α k kᵀ) S_{t-1} + w k vᵀ with λ = ‖k‖², α = (1 - e^{-βλ})/λ, γ = -g, w = β(1 - e^{-(γ+βλ)})/(γ+βλ)
    and o_t = scale · S_tᵀ q_t. Stable for any key; do not normalise keys, their norm is what sets the step.
    Differentiable in every floating input; works under jit, grad, vmap, remat, shard_map and on sharded arrays.

    Args:
        query, key: [B, T, Hk, K] float32, bfloat16, float16 or float64. Any T ≥ 0, K, V ≥ 1.
        value: [B, T, H, V], H a multiple of Hk: value head h reads key head h // (H/Hk).
        beta: [B, T, H] ≥ 0, the step size. 0 leaves the state as it is (padding).
        log_decay: [B, T, H] ≤ 0 and finite, g above, or None for no decay.
        initial_state: [B, H, K, V], the state before token 0, or None for zeros.
        segment_ids: [B, T] integers. A change of id resets the state exactly; the initial state belongs to the
            document of token 0. Those of a NumPy array are known when tracing: kernels need not find out.
        scale: factor on the output.
        integrator: how the ODE is stepped, see `efla_jax.ops.coefficients.erase_and_write`.
        implementation: None for the first that serves the call, a name that serves it or raises, or names to try.
        chunk_size: tokens per chunk, a power of two; None by table. `scan` has no chunks.
        precision: of the products; None multiplies in the inputs' own type and sums in float32.
        partition_spec: how [B, T, H, D] lies on the mesh of `jax.set_mesh`, T and D unsplit. None reads it from
            value's type on Explicit axes and else leaves sharding to the compiler.

    Returns:
        (output, state): [B, T, H, V] in value's type; [B, H, K, V] after the last token, float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: a shape, dtype or option that does not fit, named.
        NotImplementedError: the named implementation cannot serve the call, with the reason.
    """
    _check_sequence(query, key, value, dict(beta=beta), log_decay, initial_state, segment_ids)
    check_choice("integrator", integrator, INTEGRATORS)
    coefficients = lambda key: erase_and_write(key, beta, log_decay, integrator)
    exact = beta if integrator in ("exact", "split") and log_decay is None else None
    options = _Options(scale, implementation, chunk_size, precision, partition_spec)
    return _attend(query, key, value, coefficients, exact, log_decay, initial_state, segment_ids, options)


def efla_step(
    query: Float[Array, "B Hk K"],
    key: Float[Array, "B Hk K"],
    value: Float[Array, "B H V"],
    beta: Float[Array, "B H"],
    state: Float[Array, "B H K V"],
    *,
    log_decay: Float[Array, "B H"] | None = None,
    scale: float = 1.0,
    integrator: Integrator = "exact",
    implementation: ImplementationName | Sequence[ImplementationName] | None = None,
    precision: Precision = None,
    partition_spec: PartitionSpec | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `efla_attention`, for decoding: the same equation, without the time axis.

    Arguments and errors are those of `efla_attention`, partition_spec included: it is that of [B, T, H, D]. `xla` and
    `scan` both name the plain form. The kernels behind `pallas_gpu` and `pallas_tpu` take K and V that are multiples of
    64 up to 256, multiply float32 numbers, whatever the precision, overwrite a state that is donated, and leave
    derivatives to the plain form.

    Returns:
        (output, state): output [B, H, V] in value's type, the new state in float32 (float64 for float64 inputs).
    """
    arrays = dict(query=query, key=key, value=value, beta=beta, state=state)
    if log_decay is not None:
        arrays["log_decay"] = log_decay
    for name, x in arrays.items():
        _check_float(name, x)
    _check_shape("key", key, (None,) * 3, ("B", "Hk", "K"))
    _check_shape("query", query, key.shape, ("B", "Hk", "K"))
    batch, key_heads, key_dim = key.shape
    _check_shape("value", value, (batch, None, None), ("B", "H", "V"))
    _check_heads_and_features(key, value, 1)
    heads, value_dim = value.shape[1:]
    for name in ("beta", "log_decay"):
        if name in arrays:
            _check_shape(name, arrays[name], (batch, heads), ("B", "H"))
    _check_shape("state", state, (batch, heads, key_dim, value_dim), ("B", "H", "K", "V"))
    precision = _check_options(scale, None, precision)
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    erase, write = erase_and_write(key, beta, log_decay, integrator)
    token = lambda x: None if x is None else x[:, None]
    tokens = [token(x) for x in (query, key, value, erase, None if write is erase else write, log_decay)]
    axes = mesh_axes(partition_spec, tokens[1], tokens[2])
    parts = shards(axes)
    call = Call(
        batch=batch // parts[0], length=1, key_heads=key_heads // parts[1], heads=heads // parts[1],
        key_dim=key_dim, value_dim=value_dim, dtypes=(query.dtype, key.dtype, value.dtype),
        log_decay=log_decay is not None, segments=False, chunk_size=None, precision=precision,
        backend=jax.default_backend(),
    )  # fmt: skip
    run = partial(choose(implementation, call, STEPS).run, scale=float(scale), chunk_size=None, precision=precision)
    state = jnp.asarray(state, accumulator_dtype(query, key, value))
    out, state = per_shard(run, axes, *share_manual_axes(*tokens, state, None))
    return out[:, 0], state
