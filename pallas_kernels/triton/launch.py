"""Which kernels run, on what grids, with what tiles: one description for every way to run them.

`forward` and `backward` are handed `call`, which launches one kernel: jax-triton's on a GPU (host.py), the interpreter
or the compiler alone where kernels are checked without one. Arrays need a shape and a dtype.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.triton.gradients import gradients, reverse_scan
from pallas_kernels.triton.prepare import prepare
from pallas_kernels.triton.scan import scan
from pallas_kernels.triton.tiling import MAX_CHUNK, Tile, tiles


@dataclass(frozen=True)
class Launch:
    """One kernel on a grid of one axis: arguments are the inputs, then sizes, then outputs, then constants by name."""

    kernel: Any
    inputs: tuple[Any, ...]
    sizes: tuple[int, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    programs: int
    constants: dict[str, Any]
    tile: Tile


class Call(Protocol):
    def __call__(self, launch: Launch, /) -> tuple[Any, ...]: ...


class Inputs(NamedTuple):
    """The arrays of a call: query, key [B, T, Hk, K]; value [B, T, H, V]; erase, write, log_decay [B, T, H] float32;
    initial_state [B, H, K, V] float32; documents [B, T] int32. May be None: write, where it is erase, initial_state,
    where it is zeros, log_decay and documents."""

    query: Any
    key: Any
    value: Any
    erase: Any
    write: Any
    log_decay: Any
    initial_state: Any
    documents: Any


def numbered(begins):
    """[B, T] int32, how many documents began in the row up to the token; None of None."""
    return None if begins is None else jnp.cumsum(begins, axis=1, dtype=jnp.int32)


class Problem(NamedTuple):
    """Sizes and options of one call, read off its arrays."""

    batch: int
    length: int
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    chunk: int
    chunks: int
    operand: jnp.dtype  # what products take; sums are float32
    options: dict[str, Any]  # compile-time, of every kernel

    @property
    def sizes(self):
        return self.length, self.heads, self.key_heads

    @property
    def grouped(self):
        """Whether several value heads share a key head."""
        return self.heads > self.key_heads

    def tiles(self, capability):
        return tiles(capability, self.operand.itemsize, self.key_dim, self.value_dim, self.grouped)

    def tokens(self, *features, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((self.batch, self.length, self.heads, *features), dtype)

    def per_chunk(self, *features):
        return jax.ShapeDtypeStruct((self.batch, self.chunks, self.heads, *features), self.operand)

    @property
    def state(self):
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.key_dim, self.value_dim), jnp.float32)


def product_types(dtype):
    """(operand, precision of float32 products) for inputs of one type. bfloat16 is multiplied as it is; what is float32
    by nature, the inverse, in TF32, which has more mantissa. float16 is multiplied in TF32 throughout, which has its
    mantissa and float32's range: states and updates of raw keys leave float16's. float32 is multiplied in full; no
    GPU's tensor cores do that, it is there to check the algebra with."""
    if dtype == jnp.bfloat16:
        return jnp.dtype(jnp.bfloat16), "tf32"
    return jnp.dtype(jnp.float32), "ieee" if dtype == jnp.float32 else "tf32"


def describe(x: Inputs):
    """The `Problem` of a call. Chunks are shorter where all tokens fit into one."""
    batch, length, key_heads, key_dim = x.key.shape
    heads, value_dim = x.value.shape[2:]
    chunk = min(MAX_CHUNK, max(16, 1 << (length - 1).bit_length()))
    operand, precision = product_types(x.value.dtype)
    options = dict(C=chunk, DECAY=x.log_decay is not None, DOCUMENTS=x.documents is not None, PRECISION=precision)
    chunks = -(-length // chunk)
    return Problem(batch, length, key_heads, heads, key_dim, value_dim, chunk, chunks, operand, options)


def _filled(x: Inputs, p: Problem) -> Inputs:
    """x with arrays for write and initial_state: kernels always take both."""
    initial_state = jnp.zeros(p.state.shape, p.state.dtype) if x.initial_state is None else x.initial_state
    return x._replace(write=x.erase if x.write is None else x.write, initial_state=initial_state)


# An output that compile-time options leave out: kernels have one signature.
_UNUSED = jax.ShapeDtypeStruct((1,), jnp.float32)


def _given(x, stand_in):
    """x, or where it is None any array: the kernel compiled for this call does not read it."""
    return stand_in if x is None else x


def _prepare(p: Problem, tile: Tile, x: Inputs, scale):
    square = p.per_chunk(p.chunk, p.chunk)
    return Launch(
        prepare,
        (x.query, x.key, x.erase, _given(x.log_decay, x.erase), _given(x.documents, x.erase)),
        p.sizes,
        (square, square, _UNUSED if x.log_decay is None else p.tokens()),
        p.batch * p.chunks * p.heads,
        dict(SCALE=scale, K=p.key_dim, **p.options),
        tile,
    )


def _scan(p: Problem, tile: Tile, x: Inputs, inverse, weights, sums, scale, save):
    saved = (p.per_chunk(p.key_dim, p.value_dim), p.tokens(p.value_dim, dtype=p.operand))
    return Launch(
        scan,
        (
            *(x.query, x.key, x.value, x.erase, x.write, inverse, weights, sums),
            *(_given(x.documents, x.erase), x.initial_state),
        ),
        p.sizes,
        (p.tokens(p.value_dim, dtype=x.value.dtype), p.state, *(saved if save else (_UNUSED, _UNUSED))),
        p.batch * p.heads * (p.value_dim // tile.columns),
        dict(SCALE=scale, K=p.key_dim, V=p.value_dim, BV=tile.columns, SAVE=save, **p.options),
        tile,
    )


def _reverse_scan(p: Problem, tile: Tile, x: Inputs, inverse, weights, sums, cotangents, scale):
    return Launch(
        reverse_scan,
        (x.query, x.key, x.erase, inverse, weights, sums, _given(x.documents, x.erase), *cotangents),
        p.sizes,
        (p.state, p.per_chunk(p.key_dim, p.value_dim), p.tokens(p.value_dim, dtype=p.operand)),
        p.batch * p.heads * (p.value_dim // tile.columns),
        dict(SCALE=scale, K=p.key_dim, V=p.value_dim, BV=tile.columns, **p.options),
        tile,
    )


def _gradients(p: Problem, tile: Tile, x: Inputs, sums, states, updates, d_output, d_states, solved, scale):
    parts = p.key_dim // tile.key_columns
    part = jax.ShapeDtypeStruct((parts, *p.tokens().shape), jnp.float32)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return Launch(
        gradients,
        (
            *(x.query, x.key, x.value, x.erase, x.write, sums, _given(x.documents, x.erase)),
            *(states, updates, d_output, d_states, solved),
        ),
        p.sizes,
        (like(x.query), like(x.key), like(x.value), part, part, _UNUSED if x.log_decay is None else part),
        p.batch * p.chunks * p.key_heads * parts,
        dict(
            SCALE=scale, K=p.key_dim, V=p.value_dim, BK=tile.key_columns, BV=tile.columns,
            GROUPED=p.grouped, **p.options,
        ),
        tile,
    )  # fmt: skip


def forward(call: Call, capability: int, x: Inputs, *, scale: float, save: bool):
    """-> (output, final_state, residuals); capability is 80 for sm_80 and so on.

    Residuals: T and P [B, chunks, H, C, C], states at chunk starts [B, chunks, H, K, V] and U [B, T, H, V], as products
    take them, and with log_decay its sums [B, T, H]. Without save there are none, and no states are written.
    """
    p = describe(x)
    x = _filled(x, p)
    tile = p.tiles(capability)
    inverse, weights, sums = call(_prepare(p, tile.prepare, x, scale))
    output, final_state, *saved = call(_scan(p, tile.scan, x, inverse, weights, sums, scale, save))
    residuals = (inverse, weights, *saved, *(() if x.log_decay is None else (sums,)))
    return output, final_state, residuals if save else ()


def backward(call: Call, capability: int, x: Inputs, residuals, cotangents, *, scale: float):
    """-> gradients in the order of `Inputs` but for documents, None where the input is None; cotangents are those of
    output and final state."""
    p = describe(x)
    given, x = x, _filled(x, p)
    tile = p.tiles(capability)
    inverse, weights, states, updates, *sums = residuals
    (sums,) = sums or (x.erase,)
    d_initial_state, d_states, solved = call(_reverse_scan(p, tile.scan, x, inverse, weights, sums, cotangents, scale))
    *d_features, d_erase, d_write, d_log_decay = call(
        _gradients(p, tile.gradients, x, sums, states, updates, cotangents[0], d_states, solved, scale)
    )
    whole = lambda parts: parts[0] if len(parts) == 1 else parts.sum(0)
    d_erase, d_write = whole(d_erase), whole(d_write)
    if given.write is None:
        d_erase, d_write = d_erase + d_write, None
    d_log_decay = None if x.log_decay is None else whole(d_log_decay)
    return *d_features, d_erase, d_write, d_log_decay, None if given.initial_state is None else d_initial_state
