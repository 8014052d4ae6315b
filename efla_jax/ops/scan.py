"""The reference: one token after the other, S_t = e^g (I - erase k kᵀ) S_{t-1} + write k vᵀ, o_t = scale · S_tᵀ q_t."""

import jax
import jax.numpy as jnp
import numpy as np

from efla_jax.ops.coefficients import accumulator_dtype
from efla_jax.ops.sharding import share_manual_axes


def segment_starts(segment_ids):
    """[B, T] ids -> [B, T] bool: True where a new document begins. Token 0 continues the initial state. NumPy's of
    NumPy's."""
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    pad = np.pad if isinstance(segment_ids, np.ndarray) else jnp.pad
    return pad(changed, ((0, 0), (1, 0)))[:, : segment_ids.shape[1]]  # of no token, none


def whole_inputs(query, key, value, erase, write, initial_state):
    """(write, initial_state) where None stands for erase and for zeros [B, H, K, V]."""
    if initial_state is None:
        shape = (value.shape[0], value.shape[2], key.shape[-1], value.shape[-1])
        dtype = accumulator_dtype(query, key, value)
        (initial_state,) = share_manual_axes(jnp.zeros(shape, dtype), value)[:1]
    return erase if write is None else write, initial_state


def delta_rule_step(state, query, key, value, erase, write, decay=None, start=None, *, scale, precision):
    """One token. state [B, Hk, R, K, V]; query, key [B, Hk, K]; value [B, Hk, R, V]; the others [B, Hk, R] or None.

    R value heads share one key head. start [B] clears the state before the token.
    """
    if start is not None:
        state = jnp.where(start[:, None, None, None, None], 0, state)
    if decay is not None:
        state = decay[..., None, None] * state
    recalled = jnp.einsum("bhk,bhrkv->bhrv", key, state, precision=precision)
    update = write[..., None] * value - erase[..., None] * recalled
    state = state + key[:, :, None, :, None] * update[:, :, :, None, :]
    return state, scale * jnp.einsum("bhk,bhrkv->bhrv", query, state, precision=precision)


def scan_delta_rule(
    query,
    key,
    value,
    erase,
    write,
    log_decay,
    initial_state,
    segment_ids,
    *,
    scale,
    chunk_size,
    precision,
):
    """Token loop by `jax.lax.scan`, differentiated by JAX; a scan has no chunks, so chunk_size is not looked at.

    query, key [B, T, Hk, K]; value [B, T, H, V]; erase, write, log_decay [B, T, H]; initial_state [B, H, K, V]
    -> output [B, T, H, V] in value's type, final state [B, H, K, V]. Everything is computed in float32 (float64).
    """
    del chunk_size
    write, initial_state = whole_inputs(query, key, value, erase, write, initial_state)
    dtype = accumulator_dtype(query, key, value, initial_state)
    precision = jax.lax.Precision.HIGHEST if precision is None else precision
    heads = (key.shape[2], value.shape[2] // key.shape[2])
    grouped = lambda x: x.astype(dtype).reshape(*x.shape[:2], *heads, *x.shape[3:])
    state = initial_state.astype(dtype).reshape(key.shape[0], *heads, *initial_state.shape[2:])
    tokens = dict(query=query.astype(dtype), key=key.astype(dtype), value=grouped(value))
    tokens |= dict(erase=grouped(erase), write=grouped(write))
    if log_decay is not None:
        tokens["decay"] = jnp.exp(grouped(log_decay))
    if segment_ids is not None:
        tokens["start"] = segment_starts(segment_ids)
    step = lambda state, token: delta_rule_step(state, **token, scale=scale, precision=precision)
    state, out = jax.lax.scan(step, state, {k: jnp.moveaxis(x, 1, 0) for k, x in tokens.items()})
    return jnp.moveaxis(out, 0, 1).reshape(value.shape).astype(value.dtype), state.reshape(initial_state.shape)


def single_step(
    query, key, value, erase, write, log_decay, initial_state, segment_ids, *, scale, chunk_size, precision
):
    """`scan_delta_rule` of one token after a given state, without the loop: T = 1, no segments."""
    del segment_ids, chunk_size
    dtype = accumulator_dtype(query, key, value)
    precision = jax.lax.Precision.HIGHEST if precision is None else precision
    batch, _, key_heads, _ = key.shape
    shared = value.shape[2] // key_heads
    grouped = lambda x: x.astype(dtype).reshape(batch, key_heads, shared, *x.shape[3:])
    state = initial_state.astype(dtype).reshape(batch, key_heads, shared, *initial_state.shape[2:])
    erase = grouped(erase)
    state, out = delta_rule_step(
        state, query[:, 0].astype(dtype), key[:, 0].astype(dtype), grouped(value), erase,
        erase if write is None else grouped(write), None if log_decay is None else jnp.exp(grouped(log_decay)),
        scale=scale, precision=precision,
    )  # fmt: skip
    return out.reshape(value.shape).astype(value.dtype), state.reshape(initial_state.shape)
