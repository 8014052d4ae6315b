"""The forward kernel: walks the chunks of a few heads with their states in VMEM.

Per value head, with c = erase, w = write, decays a, e, d as in `numbers.py` and M = tril(D ∘ K Kᵀ, -1):
    T = (I + diag(c) M)⁻¹    U = T (w∘V - c∘a∘K S)    O = scale · (a∘Q S + tril(D ∘ Q Kᵀ) U)    S' = d S + Kᵀ (e∘U)
"""

from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.tpu.config import Config, key_slice, like, value_slice
from pallas_kernels.tpu.inverse import unit_lower_inverses
from pallas_kernels.tpu.numbers import Numbers, read_numbers, scaled
from pallas_kernels.tpu.products import F32, Products


def forward(config: Config, query, key, value, numbers, initial, *, save: bool) -> dict[str, jax.Array]:
    """Output, final state and, with save, the states at chunk starts and the inverses.

    Args:
        query, key: [B, T, Hk·K], T a multiple of the chunk; value: [B, T, H·V].
        numbers: [B, G, N, rows, C], G groups of heads.
        initial: [B, H, K, V] float32 or None for zeros.
    """
    batch, groups, chunks = numbers.shape[:3]
    heads = groups * config.heads
    state = (config.key_dim, config.value_dim)
    inputs = dict(query=query, key=key, value=value, numbers=numbers)
    if initial is not None:
        inputs["initial"] = initial
    shapes = dict(
        output=like(value.shape, value.dtype, value),
        final=like((batch, heads, *state), F32, value),
    )
    if save:
        shapes["states"] = like((batch, chunks, heads, *state), config.saved, value)
        shapes["inverse"] = like((batch, chunks, heads, config.chunk, config.chunk), config.saved, value)
    specs = block_specs(config, lambda n: n)
    names = (*inputs, *shapes, "state")
    out = pl.pallas_call(
        lambda *refs: _step(config, SimpleNamespace(**dict(zip(names, refs, strict=True)))),
        grid=(batch, groups, chunks),
        in_specs=[specs[name] for name in inputs],
        out_specs=[specs[name] for name in shapes],
        out_shape=list(shapes.values()),
        scratch_shapes=[pltpu.VMEM((config.heads, *state), F32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="efla_forward",
    )(*inputs.values())
    return dict(zip(shapes, out, strict=True))


def block_specs(config: Config, place) -> dict[str, pl.BlockSpec]:
    """How a grid step (b, g, n) sees the arrays; place(n) is its chunk."""
    size, heads = config.chunk, config.heads
    state = (config.key_dim, config.value_dim)
    tokens = lambda width: pl.BlockSpec((None, size, width), lambda b, g, n: (b, place(n), g))
    whole = pl.BlockSpec((None, heads, *state), lambda b, g, n: (b, g, 0, 0))
    per_chunk = lambda *shape: pl.BlockSpec((None, None, heads, *shape), lambda b, g, n: (b, place(n), g, 0, 0))
    rows = lambda count: pl.BlockSpec((None, None, None, count, size), lambda b, g, n: (b, g, place(n), 0, 0))
    keys, values = tokens(config.key_heads * config.key_dim), tokens(heads * config.value_dim)
    return dict(
        query=keys, key=keys, value=values, output=values, numbers=rows(config.row_count), initial=whole, final=whole,
        states=per_chunk(*state), inverse=per_chunk(size, size),
    )  # fmt: skip


def _step(config: Config, r) -> None:
    """One chunk of a group of heads; r holds the refs, None where a kernel has none."""
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        r.state[...] = r.initial[...] if hasattr(r, "initial") else jnp.zeros_like(r.state)

    products = Products(config.pieces)
    numbers = read_numbers(config, r.numbers)
    keys = [products.split(r.key[:, key_slice(config, head)]) for head in range(config.key_heads)]
    queries = [products.split(r.query[:, key_slice(config, head)]) for head in range(config.key_heads)]
    grams = [products.nt(key, key) for key in keys]
    scores = [products.nt(query, key) for query, key in zip(queries, keys, strict=True)]
    lowers = [
        numbers.pairs(head, numbers.below, grams[head // config.group]) * numbers.erase[head]
        for head in range(config.heads)
    ]
    inverses = unit_lower_inverses(products, lowers)
    for head in range(config.heads):
        shared = head // config.group
        _head(config, r, numbers, head, queries[shared], keys[shared], scores[shared], inverses[head])

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        r.final[...] = r.state[...]


def update_of(products, numbers: Numbers, head, inverse, value_CV, recalled_CV):
    """U [C, V] from the inverse, the values and K S."""
    write = scaled(value_CV.astype(F32), numbers.write[head])
    return products.nn(inverse, write - scaled(recalled_CV, numbers.erase[head], numbers.left[head]))


def _head(config: Config, r, numbers: Numbers, head: int, query, key, scores_CC, inverse_CC) -> None:
    """Output and next state of one value head."""
    products = Products(config.pieces)
    columns = value_slice(config, head)
    state_KV = r.state[head]
    if hasattr(r, "states"):
        r.states[head] = state_KV.astype(r.states.dtype)
        r.inverse[head] = inverse_CC.astype(r.inverse.dtype)
    state = products.split(state_KV)
    update_CV = update_of(products, numbers, head, inverse_CC, r.value[:, columns], products.nn(key, state))
    weights_CC = numbers.pairs(head, numbers.reach, scores_CC)
    output_CV = scaled(products.nn(query, state), numbers.left[head]) + products.nn(weights_CC, update_CV)
    r.output[:, columns] = (config.scale * output_CV).astype(r.output.dtype)
    carried_KV = scaled(state_KV, numbers.total[head])
    r.state[head] = carried_KV + products.tn(key, scaled(update_CV, numbers.right[head]))
