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
from pallas_kernels.tpu.cost import forward_cost
from pallas_kernels.tpu.inverse import unit_lower_inverses
from pallas_kernels.tpu.numbers import Numbers, read_numbers, scaled
from pallas_kernels.tpu.products import F32, Products, above


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
        grid=(batch, groups, chunks // config.span),
        in_specs=[specs[name] for name in inputs],
        out_specs=[specs[name] for name in shapes],
        out_shape=list(shapes.values()),
        scratch_shapes=[pltpu.VMEM((config.heads, *state), F32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=forward_cost(
            config, batch * groups * chunks, [*inputs.values(), *shapes.values()], key.dtype == jnp.bfloat16
        ),
        name="efla_forward",
    )(*inputs.values())
    return dict(zip(shapes, out, strict=True))


def block_specs(config: Config, place) -> dict[str, pl.BlockSpec]:
    """How a grid step (b, g, n) sees the arrays; place(n) is its chunk."""
    size, heads, span = config.chunk, config.heads, config.span
    state = (config.key_dim, config.value_dim)
    tokens = lambda width: pl.BlockSpec((None, span * size, width), lambda b, g, n: (b, place(n), g))
    whole = pl.BlockSpec((None, heads, *state), lambda b, g, n: (b, g, 0, 0))
    per_chunk = lambda *shape: pl.BlockSpec((None, span, heads, *shape), lambda b, g, n: (b, place(n), g, 0, 0))
    rows = lambda count: pl.BlockSpec((None, None, span, count, size), lambda b, g, n: (b, g, place(n), 0, 0))
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

    parts = [_Part(config, r, part) for part in range(config.span)]
    parts[0].read_states()
    # The inverses of all parts at once, and every step for all heads before the next one: the compiler fills the time
    # that one product takes with what stands beside it in the program.
    inverses = unit_lower_inverses(Products(config.pieces), [lower for part in parts for lower in part.lowers])
    for part in parts:
        if part is not parts[0]:
            part.read_states()
        part.update(inverses[: config.heads])
        inverses = inverses[config.heads :]
        part.write()

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        r.final[...] = r.state[...]


def update_of(products, numbers: Numbers, head, inverse, value_CV, recalled_CV):
    """U [C, V] from the inverse, the values and K S."""
    write = scaled(value_CV.astype(F32), numbers.write[head])
    return products.nn(inverse, write - scaled(recalled_CV, numbers.erase[head], numbers.left[head]))


class _Keys:
    """What the value heads of one key head share."""

    def __init__(self, config: Config, key, query):
        products = Products(config.pieces)
        size = config.chunk
        self.transposed = products.split(key.T)
        self.both = products.split(jnp.concatenate([key, query], 0))  # one product for both: its weights load once
        scores = products.nn(self.both, self.transposed)
        self.gram, self.scores = scores[:size], scores[size:]


class _Part:
    """One chunk of the `span` chunks of a grid step: outputs and next states of its value heads, in steps."""

    def __init__(self, config: Config, r, part: int):
        self.config, self.r, self.part = config, r, part
        self.rows = slice(part * config.chunk, (part + 1) * config.chunk)
        self.products = Products(config.pieces)
        self.numbers = numbers = read_numbers(config, r.numbers.at[part])
        lanes = [key_slice(config, head) for head in range(config.key_heads)]
        self.keys = [_Keys(config, r.key[self.rows, lane], r.query[self.rows, lane]) for lane in lanes]
        self.lowers = [
            numbers.pairs(head, numbers.below, self._keys(head).gram) * numbers.erase[head]
            for head in range(config.heads)
        ]

    def _keys(self, head: int) -> _Keys:
        return self.keys[head // self.config.group]

    def read_states(self) -> None:
        r, size = self.r, self.config.chunk
        self.recalled, self.read = [], []
        for head in range(self.config.heads):
            state_KV = r.state[head]
            if hasattr(r, "states"):
                r.states[self.part, head] = state_KV.astype(r.states.dtype)
            read = self.products.nn(self._keys(head).both, state_KV)
            self.recalled.append(read[:size])
            self.read.append(read[size:])

    def update(self, inverses) -> None:
        self.updates = []
        for head, inverse_CC in enumerate(inverses):
            if hasattr(self.r, "inverse"):
                self.r.inverse[self.part, head] = inverse_CC.astype(self.r.inverse.dtype)
            value_CV = self.r.value[self.rows, value_slice(self.config, head)]
            self.updates.append(update_of(self.products, self.numbers, head, inverse_CC, value_CV, self.recalled[head]))

    def write(self) -> None:
        r, numbers = self.r, self.numbers
        for head, update_CV in enumerate(self.updates):
            within_CV, added_KV = self._applied(head, update_CV)
            output_CV = scaled(self.read[head], numbers.left[head]) + within_CV
            columns = value_slice(self.config, head)
            r.output[self.rows, columns] = (self.config.scale * output_CV).astype(r.output.dtype)
            r.state[head] = scaled(r.state[head], numbers.total[head]) + added_KV

    def _applied(self, head: int, update_CV):
        """tril(D ∘ Q Kᵀ) U and Kᵀ (e∘U); where e is 1, in one product, whose weights load once."""
        products, numbers, size = self.products, self.numbers, self.config.chunk
        keys = self._keys(head)
        weights = products.split(numbers.pairs(head, numbers.reach, keys.scores))
        if numbers.right[head] is None:
            applied = products.nn(above(weights, keys.transposed), update_CV)
            return applied[:size], applied[size:]
        added_KV = products.nn(keys.transposed, scaled(update_CV, numbers.right[head]))
        return products.nn(weights, update_CV), added_KV
