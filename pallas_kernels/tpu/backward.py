"""The backward kernel: walks the chunks from the last to the first with the cotangents of the states in VMEM.

With the names of `forward.py`, Y = Tᵀ dU and Z = Y Uᵀ the inverse needs no derivative of its own:
    dU = Pᵀ dO + e∘(K dS')                    P = scale · tril(D ∘ Q Kᵀ)
    dV = w∘Y         dw = ⟨Y, V⟩              dc = -a∘⟨Y Sᵀ, K⟩ - Σ_j (M ∘ Z)_j
    dQ = dR Sᵀ + F K                          dR = scale · a∘dO,  F = scale · D ∘ tril(dO Uᵀ)
    dK = Fᵀ Q + (G + Gᵀ) K + (e∘U) dS'ᵀ - (c∘a)∘(Y Sᵀ)            G = -c∘D∘tril(Z, -1)
    dS = d dS' + Qᵀ dR - Kᵀ (c∘a∘Y)
U is computed again from the saved T and S.
"""

from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.config import Config, key_slice, like, value_slice
from pallas_kernels.tpu.forward import block_specs, update_of
from pallas_kernels.tpu.numbers import Numbers, read_numbers, scaled
from pallas_kernels.tpu.products import F32, Products


def backward(config: Config, query, key, value, numbers, states, inverse, d_output, d_final) -> dict[str, jax.Array]:
    """Cotangents of query, key and value, of `numbers` (not of documents; of sums where there is decay) and of the
    initial state."""
    batch, groups, chunks, rows, size = numbers.shape
    inputs = dict(
        query=query, key=key, value=value, numbers=numbers, states=states, inverse=inverse, d_output=d_output,
        d_final=d_final,
    )  # fmt: skip
    shapes = dict(
        d_query=like(query.shape, query.dtype, value),
        d_key=like(key.shape, key.dtype, value),
        d_value=like(value.shape, value.dtype, value),
        d_numbers=like((batch, groups, chunks, rows, size), F32, value),
        d_initial=like(d_final.shape, F32, value),
    )
    specs = block_specs(config, lambda n: chunks - 1 - n)
    specs |= dict(
        d_output=specs["output"], d_final=specs["final"], d_query=specs["query"], d_key=specs["key"],
        d_value=specs["value"], d_numbers=specs["numbers"], d_initial=specs["initial"],
    )  # fmt: skip
    names = (*inputs, *shapes, "d_state")
    out = pl.pallas_call(
        lambda *refs: _step(config, SimpleNamespace(**dict(zip(names, refs, strict=True)))),
        grid=(batch, groups, chunks),
        in_specs=[specs[name] for name in inputs],
        out_specs=[specs[name] for name in shapes],
        out_shape=list(shapes.values()),
        scratch_shapes=[pltpu.VMEM((config.heads, config.key_dim, config.value_dim), F32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="efla_backward",
    )(*inputs.values())
    return dict(zip(shapes, out, strict=True))


class _Keys:
    """What the value heads of one key head share, and the sums of what they give back."""

    def __init__(self, config: Config, r, head: int):
        products = Products(config.pieces)
        self.lanes = key_slice(config, head)
        self.query, self.key = r.query[:, self.lanes], r.key[:, self.lanes]
        self.query_pieces, self.key_pieces = products.split(self.query), products.split(self.key)
        self.gram = products.nt(self.key_pieces, self.key_pieces)
        self.scores = products.nt(self.query_pieces, self.key_pieces)
        self.d_query = self.d_key = None

    def add(self, d_query, d_key):
        self.d_query = d_query if self.d_query is None else self.d_query + d_query
        self.d_key = d_key if self.d_key is None else self.d_key + d_key


def _step(config: Config, r) -> None:
    """One chunk of a group of heads."""
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        r.d_state[...] = r.d_final[...]

    numbers = read_numbers(config, r.numbers)
    rows = _Rows(config)
    for shared in range(config.key_heads):
        keys = _Keys(config, r, shared)
        for head in range(shared * config.group, (shared + 1) * config.group):
            _head(config, r, numbers, head, keys, rows)
        r.d_query[:, keys.lanes] = keys.d_query.astype(r.d_query.dtype)
        r.d_key[:, keys.lanes] = keys.d_key.astype(r.d_key.dtype)
    rows.store(r.d_numbers)

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        r.d_initial[...] = r.d_state[...]


class _Rows:
    """Collects numbers of tokens, columns of sums over lanes, and stores them as rows.

    A column per lane of one array, which is transposed once.
    """

    def __init__(self, config: Config):
        self.config = config
        lanes = -(-config.row_count // 128) * 128
        self.lane = lax.broadcasted_iota(jnp.int32, (config.chunk, lanes), 1)
        self.columns = jnp.zeros((config.chunk, lanes), F32)
        self.rows = []

    def put(self, name: str, head: int, column_C1, row_1C=None):
        place = self.config.rows[name].start + head
        self.columns = jnp.where(self.lane == place, column_C1, self.columns)
        if row_1C is not None:
            self.rows.append((place, row_1C))

    def store(self, ref):
        ref[...] = self.columns.T[: self.config.row_count]
        for place, row_1C in self.rows:
            ref[place : place + 1, :] += row_1C


def _row_sum(x):
    return jnp.sum(x, axis=1, keepdims=True)


def _head(config: Config, r, numbers: Numbers, head: int, keys: _Keys, rows: _Rows) -> None:
    """Gradients of one value head in one chunk."""
    products = Products(config.pieces)
    lanes = value_slice(config, head)
    erase, write, left, right = (x[head] for x in (numbers.erase, numbers.write, numbers.left, numbers.right))
    erased = scaled(erase, left)
    value_CV, state_KV, d_state_KV = r.value[:, lanes].astype(F32), r.states[head], r.d_state[head]
    d_output_CV = r.d_output[:, lanes]
    state, d_state = products.split(state_KV), products.split(d_state_KV)
    inverse, d_output = products.split(r.inverse[head]), products.split(d_output_CV)

    recalled_CV = products.nn(keys.key_pieces, state)
    update_CV = update_of(products, numbers, head, inverse, value_CV, recalled_CV)
    update = products.split(update_CV)
    weights_CC = config.scale * numbers.pairs(head, numbers.reach, keys.scores)
    d_end_CV = products.nn(keys.key_pieces, d_state)
    d_update_CV = products.tn(weights_CC, d_output) + scaled(d_end_CV, right)
    y_CV = products.tn(inverse, d_update_CV)
    y, d_read = products.split(y_CV), products.split(scaled(config.scale * d_output_CV.astype(F32), left))

    y_state_CK, read_state_CK = products.nt(y, state), products.nt(d_read, state)
    d_weights_CC, z_CC = products.nt(d_output, update), products.nt(y, update)
    d_scores = products.split(config.scale * numbers.pairs(head, numbers.reach, d_weights_CC))
    d_gram_CC = -erase * numbers.pairs(head, numbers.below, z_CC)
    coupled_CC = numbers.pairs(head, numbers.below, keys.gram * z_CC)
    keys.add(
        read_state_CK + products.nn(d_scores, keys.key_pieces),
        products.tn(d_scores, keys.query_pieces)
        + products.nn(d_gram_CC + d_gram_CC.T, keys.key_pieces)
        + products.nt(scaled(update_CV, right), d_state)
        - erased * y_state_CK,
    )
    r.d_value[:, lanes] = (write * y_CV).astype(r.d_value.dtype)
    before_KV = products.tn(keys.query_pieces, d_read) - products.tn(keys.key_pieces, erased * y_CV)
    r.d_state[head] = scaled(d_state_KV, numbers.total[head]) + before_KV

    recalled_C1 = _row_sum(y_state_CK * keys.key.astype(F32))
    d_erase_C1, d_write_C1 = -scaled(recalled_C1, left) - _row_sum(coupled_CC), _row_sum(y_CV * value_CV)
    if config.tied:
        rows.put("erase", head, d_erase_C1 + d_write_C1)
    else:
        rows.put("erase", head, d_erase_C1)
        rows.put("write", head, d_write_C1)
    if config.decay:
        left_C1 = _row_sum(read_state_CK * keys.query.astype(F32)) - erased * recalled_C1
        end_C1 = right * _row_sum(update_CV * d_end_CV)
        pairs_CC = d_weights_CC * weights_CC - erase * coupled_CC
        whole = numbers.total[head] * jnp.sum(_row_sum(state_KV.astype(F32) * d_state_KV), 0, keepdims=True)
        whole = whole + jnp.sum(end_C1, 0, keepdims=True)
        lane = lax.broadcasted_iota(jnp.int32, (1, config.chunk), 1)
        row_1C = jnp.where(lane == config.chunk - 1, whole, 0.0) - jnp.sum(pairs_CC, 0, keepdims=True)
        rows.put("sums", head, _row_sum(pairs_CC) + left_C1 - end_C1, row_1C)
