"""Chunkwise WY form of the delta rule in plain JAX, with a hand-written backward.

One chunk holds C tokens and starts in state S. With cumulative decays a_i (chunk start → i, 0 behind a document
border), D_ij (j → i), e_j (j → chunk end), d (whole chunk), all of them 1 without decay and borders:

    M = tril(D ∘ K Kᵀ, -1)          T = (I + diag(c) M)⁻¹        c = erase, w = write
    U = T (w∘V - c∘a∘K S)           O = scale · (a∘Q S + tril(D ∘ Q Kᵀ) U)        S' = d S + Kᵀ (e∘U)

Only the state at each chunk's start is kept for the backward pass; everything inside a chunk is computed again.
Chunks are taken in blocks of n. Inside a block, what depends on no state is computed for all its chunks at once, so
that the loop over chunks holds two products; only one block's intermediates exist at a time.

Arrays of a block are [n, batch, key heads, C, features]. Value heads that share a key head are an outer vmap over
the value side, so what belongs to keys alone, K Kᵀ and Q Kᵀ, exists once and no key is repeated.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from efla_jax.ops.blocks import cut
from efla_jax.ops.coefficients import accumulator_dtype
from efla_jax.ops.scan import segment_starts, whole_inputs
from efla_jax.ops.triangular import unit_lower_inverse


class Options(NamedTuple):
    """Static choices: products are taken in `operand`, sums in `acc`."""

    scale: float
    chunk_size: int
    operand: jnp.dtype
    acc: jnp.dtype
    precision: jax.lax.Precision | None

    def dot(self, x, y, contract=(-1, -2)):
        """Batched product over all leading axes; contract names the summed axis of x and of y."""
        batch = tuple(range(x.ndim - 2))
        axes = ((x.ndim + contract[0],), (y.ndim + contract[1],))
        product = partial(
            jax.lax.dot_general,
            dimension_numbers=(axes, (batch, batch)),
            precision=self.precision,
            preferred_element_type=self.acc,
        )
        x, y = x.astype(self.operand), y.astype(self.operand)
        if self.operand != jnp.bfloat16:
            return product(x, y)
        # XLA lacks some bfloat16 products on CPU and fails at run time; those of float32 have the same result.
        widened = lambda x, y: product(x.astype(self.acc), y.astype(self.acc))
        return jax.lax.platform_dependent(x, y, cpu=widened, default=product)

    def dot_nt(self, x, y):
        """x yᵀ."""
        return self.dot(x, y, (-1, -1))

    def dot_tn(self, x, y):
        """xᵀ y."""
        return self.dot(x, y, (-2, -2))


def product_types(query, key, value, precision):
    """(operand, precision) of the products: the inputs' own unless the caller names a precision.

    float16 is multiplied in float32, whose range raw keys need; at default precision a GPU then uses TF32, which
    has float16's mantissa.
    """
    widest = jnp.result_type(query, key, value)
    operand = jnp.dtype(jnp.float32 if widest == jnp.float16 else widest)
    if precision is None and widest in (jnp.float32, jnp.float64):
        precision = jax.lax.Precision.HIGHEST
    return operand, precision


class Decay(NamedTuple):
    """Decay between places of a chunk; a field is None where it is 1 throughout."""

    pairs: jax.Array  # [..., C, C]  D_ij, 0 above the diagonal and across document borders
    left: jax.Array | None  # [..., C]  a_i
    right: jax.Array | None  # [..., C]  e_j
    total: jax.Array | None  # [...]  d
    reach: jax.Array  # [..., C, C] bool  j ≤ i in one document: sums of log-decay run along its rows


def _decay(log_decay, starts, size, acc):
    """log_decay [n b h C] or None, starts [n b C] bool or None -> Decay.

    Sums of log-decay restart at document borders, masked by exact zeros: nothing of one document, not even its
    rounding, enters another.
    """
    reach = jnp.tril(jnp.ones((1, 1, 1, size, size), bool))
    if log_decay is None and starts is None:
        return Decay(reach.astype(acc), None, None, None, reach)
    first = jnp.ones((), bool)
    if starts is not None:
        document = jnp.cumsum(starts, axis=-1)[:, :, None]
        reach = reach & (document[..., :, None] == document[..., None, :])
        first = document == 0
    if log_decay is None:
        pairs, left = reach.astype(acc), first.astype(acc)
    else:
        sums = jnp.sum(jnp.where(reach, log_decay[..., None, :], 0), axis=-1)
        pairs = jnp.exp(jnp.where(reach, sums[..., :, None] - sums[..., None, :], -jnp.inf))
        left = jnp.where(first, jnp.exp(sums), 0)
    return Decay(pairs, left, pairs[..., -1, :], left[..., -1], reach)


def _scaled(x, weight, axes=1):
    """x times a weight that lacks x's last axes; None is 1."""
    return x if weight is None else x * weight[(..., *[None] * axes)]


class Chunks(NamedTuple):
    """What the chunks are made of before any state is known."""

    query: jax.Array  # [n b h C K]
    key: jax.Array  # [n b h C K]
    value: jax.Array  # [n b h C V]
    erase: jax.Array  # [n b h C]
    write: jax.Array  # [n b h C]
    decay: Decay
    weights: jax.Array  # [n b h C C]  P = scale · tril(D ∘ Q Kᵀ)
    coupling: jax.Array  # [n b h C C]  M
    inverse: jax.Array  # [n b h C C]  T
    erased_key: jax.Array  # [n b h C K]  T (c∘a∘K), so that U = base_update - erased_key S
    base_update: jax.Array  # [n b h C V]  T (w∘V)


def _prepare(opt, query, key, value, erase, write, log_decay, starts):
    """The part of every chunk that needs no state."""
    decay = _decay(log_decay, starts, opt.chunk_size, opt.acc)
    weights = opt.scale * decay.pairs * opt.dot_nt(query, key)
    coupling = jnp.tril(decay.pairs, -1) * opt.dot_nt(key, key)
    inverse = unit_lower_inverse(erase[..., None] * coupling, opt.dot)
    erased_key = opt.dot(inverse * _scaled(erase, decay.left, 0)[..., None, :], key)
    base_update = opt.dot(inverse * write[..., None, :], value)
    return Chunks(query, key, value, erase, write, decay, weights, coupling, inverse, erased_key, base_update)


def _forward(opt, query, key, value, erase, write, log_decay, starts, state):
    """Chunked inputs -> output [n b h C V], final state [b h K V], states at chunk starts [n b h K V]."""
    x = _prepare(opt, query, key, value, erase, write, log_decay, starts)

    def step(state, chunk):
        key, erased_key, base_update, right, total = chunk
        update = base_update - opt.dot(erased_key, state)
        new = _scaled(state, total, 2) + opt.dot_tn(key, _scaled(update, right))
        return new, (state, update)

    xs = (x.key, x.erased_key, x.base_update, x.decay.right, x.decay.total)
    final, (states, updates) = jax.lax.scan(step, state, xs)
    out = _scaled(opt.scale * opt.dot(x.query, states), x.decay.left) + opt.dot(x.weights, updates)
    return out, final, states


def _reverse_scan(opt, x, d_out, d_read, d_final):
    """The serial part of the backward: cotangents of the initial state, of the states at chunk ends and of U."""
    local = opt.dot_tn(x.weights, d_out)
    read = opt.dot_tn(x.query, d_read)

    def step(d_state, chunk):
        key, erased_key, local, read, right, total = chunk
        d_update = local + _scaled(opt.dot(key, d_state), right)
        before = _scaled(d_state, total, 2) + read - opt.dot_tn(erased_key, d_update)
        return before, (d_state, d_update)

    xs = (x.key, x.erased_key, local, read, x.decay.right, x.decay.total)
    d_initial, (d_states, d_updates) = jax.lax.scan(step, d_final, xs, reverse=True)
    return d_initial, d_states, d_updates


def _backward(opt, query, key, value, erase, write, log_decay, starts, states, d_out, d_final):
    """-> cotangents of query, key, value, erase, write, log_decay (or None) and the initial state.

    With Y = Tᵀ dU and Z = Y Uᵀ the inverse needs no derivative of its own: dM = -c∘tril(Z, -1),
    dc_i = -⟨Y_i, a_i S k_i + (M U)_i⟩ = -⟨Y_i, a_i S k_i⟩ - Σ_j M_ij Z_ij, dw_i = ⟨Y_i, v_i⟩, dV = w∘Y.
    """
    x = _prepare(opt, query, key, value, erase, write, log_decay, starts)
    d_read = _scaled(opt.scale * d_out.astype(opt.acc), x.decay.left)
    d_initial, d_states, d_updates = _reverse_scan(opt, x, d_out, d_read, d_final)

    update = x.base_update - opt.dot(x.erased_key, states)
    y = opt.dot_tn(x.inverse, d_updates)
    y_state = opt.dot_nt(y, states)
    read_state = opt.dot_nt(d_read, states)
    d_weights = opt.dot_nt(d_out, update)
    d_coupling = opt.dot_nt(y, update)  # Z; -c∘Z is dM
    recalled = _scaled(jnp.sum(y_state * key, -1), x.decay.left, 0)
    pairs_below = jnp.tril(x.decay.pairs, -1)
    d_scores = opt.scale * x.decay.pairs * d_weights
    d_gram = -erase[..., None] * pairs_below * d_coupling

    d_erase = -recalled - jnp.sum(x.coupling * d_coupling, -1)
    d_write = jnp.sum(y * value, -1)
    d_query = read_state + opt.dot(d_scores, key)
    d_key = opt.dot_tn(d_scores, query) + opt.dot(d_gram + jnp.swapaxes(d_gram, -1, -2), key)
    d_key = d_key + opt.dot_nt(_scaled(update, x.decay.right), d_states)
    d_key = d_key - _scaled(erase, x.decay.left, 0)[..., None] * y_state
    d_log_decay = None
    if log_decay is not None:
        assert x.decay.right is not None
        assert x.decay.total is not None
        pair_terms = d_weights * x.weights - erase[..., None] * x.coupling * d_coupling
        left_terms = jnp.sum(read_state * query, -1) - erase * recalled
        end_terms = x.decay.right * jnp.sum(update * opt.dot(key, d_states), -1)
        whole = x.decay.total * jnp.sum(states * d_states, (-2, -1))
        d_log_decay = _log_decay_gradient(x.decay.reach, pair_terms, left_terms, end_terms, whole)
    return d_query, d_key, write[..., None] * y, d_erase, d_write, d_log_decay, d_initial


def _log_decay_gradient(reach, pair_terms, left_terms, end_terms, whole):
    """Every decay is exp of a sum of log-decays: its cotangent times itself counts for the later end of the sum
    and, negated, for the earlier one; a log-decay then collects what lies behind it in its document."""
    d_sums = jnp.sum(pair_terms, -1) - jnp.sum(pair_terms, -2) + left_terms - end_terms
    d_sums = d_sums.at[..., -1].add(whole + jnp.sum(end_terms, -1))
    return jnp.sum(jnp.where(reach, d_sums[..., :, None], 0), -2)


def _block(opt, blocks, tokens, starts, index):
    """The arrays of one block, as `_forward` and `_backward` take them."""
    query, key, value, *coefficients = (blocks.take(x, index) for x in tokens)
    return query, key, value, *coefficients, blocks.take_row(starts, index)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunkwise(opt, blocks, tokens, initial_state, starts):
    return _chunkwise_fwd(opt, blocks, tokens, initial_state, starts)[0]


def _chunkwise_fwd(opt, blocks, tokens, initial_state, starts):
    run = blocks.per_value_head(partial(_forward, opt), (None, None, 0, 0, 0, 0, None, 0))

    def body(carry, index):
        state, out = carry
        x, state, states = run(*_block(opt, blocks, tokens, starts, index), state)
        return (state, blocks.put(out, x, index)), states

    carry = (blocks.split_heads(initial_state), jnp.zeros_like(tokens[2]))
    (final, out), states = jax.lax.scan(body, carry, jnp.arange(blocks.count))
    return (out, blocks.join_heads(final)), (tokens, starts, states)


def _chunkwise_bwd(opt, blocks, residuals, cotangents):
    tokens, starts, states = residuals
    d_out, d_final = cotangents
    run = blocks.per_value_head(partial(_backward, opt), (None, None, 0, 0, 0, 0, None, 0, 0, 0))

    def body(carry, x):
        d_state, gradients = carry
        index, states = x
        block = _block(opt, blocks, tokens, starts, index)
        *new, d_state = run(*block, states, blocks.take(d_out, index), d_state)
        if blocks.shared > 1:  # every value head of a group reads the same query and key
            new[:2] = (jnp.sum(d, 0) for d in new[:2])
        gradients = [blocks.put(whole, d, index) for whole, d in zip(gradients, new, strict=True)]
        return (d_state, gradients), None

    carry = (
        blocks.split_heads(d_final),
        [None if x is None else jnp.zeros_like(x) for x in tokens],
    )
    (d_initial, gradients), _ = jax.lax.scan(body, carry, (jnp.arange(blocks.count), states), reverse=True)
    return tuple(gradients), blocks.join_heads(d_initial), None


_chunkwise.defvjp(_chunkwise_fwd, _chunkwise_bwd)


def chunkwise_delta_rule(
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
    """Chunkwise form, any T: the same contract as `scan_delta_rule`; chunk_size is a power of two or None."""
    write, initial_state = whole_inputs(query, key, value, erase, write, initial_state)
    batch, length, heads = value.shape[:3]
    blocks = cut(batch, length, heads, key.shape[2], chunk_size)
    acc = accumulator_dtype(query, key, value, initial_state)
    operand, precision = product_types(query, key, value, precision)
    opt = Options(float(scale), blocks.size, operand, acc, precision)
    accumulated = lambda x: None if x is None else x.astype(acc)
    tokens = (query, key, value, *map(accumulated, (erase, write, log_decay)))
    starts = None if segment_ids is None else segment_starts(segment_ids)
    missing = blocks.padded_length - length
    if missing:  # padded tokens neither erase, write, decay nor begin a document: the state stays
        pad = lambda x: None if x is None else jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
        *tokens, starts = (pad(x) for x in (*tokens, starts))
    out, state = _chunkwise(opt, blocks, tuple(tokens), initial_state.astype(acc), starts)
    return out[:, :length], state
