"""The backward kernel: walks the chunks from the last to the first with the cotangents of the states in VMEM.

With the names of `forward.py`, Y = Tᵀ dU and Z = Y Uᵀ the inverse needs no derivative of its own:
    dU = Pᵀ dO + e∘(K dS')                    P = scale · tril(D ∘ Q Kᵀ)
    dV = w∘Y         dw = ⟨Y, V⟩              dc = -a∘⟨Y Sᵀ, K⟩ - Σ_j (M ∘ Z)_j
    dQ = dR Sᵀ + F K                          dR = scale · a∘dO,  F = scale · D ∘ tril(dO Uᵀ)
    dK = Fᵀ Q + (G + Gᵀ) K + (e∘U) dS'ᵀ - (c∘a)∘(Y Sᵀ)            G = -c∘D∘tril(Z, -1)
    dS = d dS' + Qᵀ dR - Kᵀ (c∘a∘Y)
U is computed again from the saved T and S.
"""

from functools import reduce
from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.config import Config, key_slice, like, value_slice
from pallas_kernels.tpu.cost import backward_cost
from pallas_kernels.tpu.forward import block_specs, update_of
from pallas_kernels.tpu.numbers import Numbers, read_numbers, scaled
from pallas_kernels.tpu.products import F32, Products, above, beside


def backward(config: Config, tokens, numbers, residuals, d_final) -> dict[str, jax.Array]:
    """Cotangents of query, key and value, of `numbers` (not of documents; of sums where there is decay) and of the
    initial state.

    Args:
        tokens: query, key, value and the cotangent of the output, as the forward kernel has them.
        residuals: states at chunk starts and inverses.
        d_final: [B, H, K, V] float32.
    """
    batch, groups, chunks, rows, size = numbers.shape
    query, key, value, d_output = tokens
    states, inverse = residuals
    inputs = dict(
        query=query, key=key, value=value, d_output=d_output, numbers=numbers, states=states, inverse=inverse,
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
        cost_estimate=backward_cost(
            config, batch * groups * chunks, [*inputs.values(), *shapes.values()], key.dtype == jnp.bfloat16
        ),
        name="efla_backward",
    )(*inputs.values())
    return dict(zip(shapes, out, strict=True))


class _Keys:
    """What the value heads of one key head share, and the sums of what they give back."""

    def __init__(self, config: Config, r, head: int):
        products, size = Products(config.pieces), config.chunk
        self.lanes = key_slice(config, head)
        self.query, self.key = r.query[:, self.lanes], r.key[:, self.lanes]
        self.query_pieces, self.key_pieces = products.split(self.query), products.split(self.key)
        self.transposed = products.split(jnp.concatenate([self.query.T, self.key.T], 1))  # K 2C
        scores = products.nn(self.key_pieces, self.transposed)
        self.scores_transposed, self.gram = scores[:, :size], scores[:, size:]
        self.gradients: list[tuple[jax.Array, jax.Array]] = []  # of query and key, by value head

    def write(self, r) -> None:
        for ref, parts in zip((r.d_query, r.d_key), zip(*self.gradients, strict=True), strict=True):
            ref[:, self.lanes] = reduce(jnp.add, parts).astype(ref.dtype)


def _step(config: Config, r) -> None:
    """One chunk of a group of heads."""
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        r.d_state[...] = r.d_final[...]

    numbers = read_numbers(config, r.numbers.at[0])
    keys = [_Keys(config, r, head) for head in range(config.key_heads)]
    heads = [_Head(config, r, numbers, head, keys[head // config.group]) for head in range(config.heads)]
    # every step for all heads before the next one, as in the forward kernel
    for step in (_Head.read_states, _Head.solve, _Head.through_state, _Head.to_keys):
        for head in heads:
            step(head)
    for x in keys:
        x.write(r)
    rows = _Rows(config)
    for head in heads:
        head.numbers_of(rows)
    rows.store(r.d_numbers.at[0])

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


class _Head:
    """Gradients of one value head in one chunk, in steps."""

    def __init__(self, config: Config, r, numbers: Numbers, head: int, keys: _Keys):
        self.config, self.r, self.head, self.keys, self.numbers = config, r, head, keys, numbers
        self.products = Products(config.pieces)
        self.lanes = value_slice(config, head)
        self.erase, self.write = numbers.erase[head], numbers.write[head]
        self.left, self.right = numbers.left[head], numbers.right[head]
        self.erased = scaled(self.erase, self.left)

    def read_states(self) -> None:
        """K S and K dS' in one product; P transposed."""
        r, width = self.r, self.config.value_dim
        self.states = [self.products.split(x) for x in (r.states[0, self.head], r.d_state[self.head])]
        read = self.products.nn(self.keys.key_pieces, beside(*self.states))
        self.recalled_CV, self.d_end_CV = read[:, :width], read[:, width:]
        self.d_output_CV = r.d_output[:, self.lanes]
        self.weights_transposed = self.config.scale * self.numbers.pairs_transposed(
            self.head, self.keys.scores_transposed
        )

    def solve(self) -> None:
        """U and Y."""
        products, inverse_CC = self.products, self.r.inverse[0, self.head]
        self.value_CV = self.r.value[:, self.lanes].astype(F32)
        self.update_CV = update_of(products, self.numbers, self.head, inverse_CC, self.value_CV, self.recalled_CV)
        d_update_CV = products.nn(self.weights_transposed, self.d_output_CV) + scaled(self.d_end_CV, self.right)
        self.y_CV = products.nn(inverse_CC.T, d_update_CV)

    def through_state(self) -> None:
        """Products with S and U, and the next cotangent of the state."""
        products, r, size = self.products, self.r, self.config.chunk
        d_read_CV = scaled(self.config.scale * self.d_output_CV.astype(F32), self.left)
        y, update = products.split(self.y_CV), products.split(self.update_CV)
        through_state = products.nt(above(y, products.split(d_read_CV)), self.states[0])
        self.y_state_CK, self.read_state_CK = through_state[:size], through_state[size:]
        through_update = products.nt(above(y, products.split(self.d_output_CV)), update)
        self.z_CC, self.d_weights_CC = through_update[:size], through_update[size:]
        before = products.split(jnp.concatenate([d_read_CV, -self.erased * self.y_CV], 0))
        d_state_KV = r.d_state[self.head]
        if self.config.decay:
            self.whole = jnp.sum(_row_sum(r.states[0, self.head].astype(F32) * d_state_KV), 0, keepdims=True)
        r.d_state[self.head] = scaled(d_state_KV, self.numbers.total[self.head]) + products.nn(
            self.keys.transposed, before
        )
        r.d_value[:, self.lanes] = (self.write * self.y_CV).astype(r.d_value.dtype)

    def to_keys(self) -> None:
        """Gradients of query and key."""
        products, numbers, keys, size = self.products, self.numbers, self.keys, self.config.chunk
        d_scores_CC = self.config.scale * numbers.pairs(self.head, numbers.reach, self.d_weights_CC)
        self.z_below_CC = numbers.pairs(self.head, numbers.below, self.z_CC)
        d_gram_CC = -self.erase * self.z_below_CC
        both = products.split(jnp.concatenate([d_scores_CC, d_gram_CC + d_gram_CC.T], 0))
        to_key = products.nn(both, keys.key_pieces)
        d_key_CK = products.nn(d_scores_CC.T, keys.query_pieces)
        d_key_CK = d_key_CK + products.nt(scaled(self.update_CV, self.right), self.states[1])
        d_key_CK = to_key[size:] + d_key_CK - self.erased * self.y_state_CK
        keys.gradients.append((self.read_state_CK + to_key[:size], d_key_CK))

    def numbers_of(self, rows: _Rows) -> None:
        """Gradients of erase, write and sums of log-decay."""
        numbers, keys, head = self.numbers, self.keys, self.head
        coupled_CC = keys.gram * self.z_below_CC
        recalled_C1 = _row_sum(self.y_state_CK * keys.key.astype(F32))
        d_erase_C1 = -scaled(recalled_C1, self.left) - _row_sum(coupled_CC)
        d_write_C1 = _row_sum(self.y_CV * self.value_CV)
        if self.config.tied:
            rows.put("erase", head, d_erase_C1 + d_write_C1)
        else:
            rows.put("erase", head, d_erase_C1)
            rows.put("write", head, d_write_C1)
        if self.config.decay:
            left_C1 = _row_sum(self.read_state_CK * keys.query.astype(F32)) - self.erased * recalled_C1
            end_C1 = scaled(_row_sum(self.update_CV * self.d_end_CV), self.right)
            pairs_CC = self.d_weights_CC * self.weights_transposed.T - self.erase * coupled_CC
            whole = scaled(self.whole, numbers.total[head]) + jnp.sum(end_C1, 0, keepdims=True)
            lane = lax.broadcasted_iota(jnp.int32, (1, self.config.chunk), 1)
            row_1C = jnp.where(lane == self.config.chunk - 1, whole, 0.0) - jnp.sum(pairs_CC, 0, keepdims=True)
            rows.put("sums", head, _row_sum(pairs_CC) + left_C1 - end_C1, row_1C)
