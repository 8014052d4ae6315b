"""A few tokens one after the other with the state in registers: read once, written once, in place.

What a token costs is its state: 64 KiB each way at K = V = 128 against 1 KiB of q, k, v and o, and three multiply-adds
per element against the 8 bytes it moves, so the memory bounds it and the tensor cores have nothing to do. One
warpgroup owns `columns` columns of one head's state, all K rows of them, which never meet the other columns:

    S ← eᵍ S        u = w v - c Sᵀk        S ← S + k uᵀ        o = scale · Sᵀ q

A thread holds four neighbouring columns (16 bytes) of K·columns/512 rows and asks for all of them before it uses the
first; a warp reads whole rows, so every sector is used. Both sums run over the rows: within a thread, across the lanes
that share its columns, and across the four warps through shared memory. At 64 columns of 128 rows an SM holds four
blocks of 32 KiB, three times the 40 KiB in flight that 3 TB/s take.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper import blocks
from pallas_kernels.hopper.mosaic import F32, store

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
LARGEST = 256  # of K and V
# Up to so many tokens this costs less than a chunk of 64 (see `decode`).
SHORT = 16
COLUMNS = (128, 64, 32, 16)
ELEMENTS = 128 * 64  # of the state in a block: 64 registers a thread
ENOUGH_BLOCKS = 4 * 132  # that every SM has the loads of four blocks in flight


def unsupported(dtypes, key_dim, value_dim):
    """Why `decode` cannot serve query, key and value of these types and sizes, or None."""
    for name, dtype in zip(("query", "key", "value"), dtypes, strict=True):
        if dtype not in DTYPES:
            return f"{name} is {jnp.dtype(dtype).name}; the decode kernel takes bfloat16, float16 and float32"
    if any(size % 64 or size > LARGEST for size in (key_dim, value_dim)):
        return f"K={key_dim} and V={value_dim}; the decode kernel takes multiples of 64 up to {LARGEST}"
    return None


def default_columns(key_dim, value_dim, heads):
    """Columns of the state per block, for B·H heads: as many as registers allow, fewer where SMs would be idle."""
    fit = [c for c in COLUMNS if value_dim % c == 0 and key_dim * c <= ELEMENTS]
    return next((c for c in fit if heads * value_dim // c >= ENOUGH_BLOCKS), fit[-1])


def decode(query, key, value, erase, write, log_decay, state, *, scale, columns=None):
    """T tokens after `state`, which is overwritten if it is donated. Forward only.

    Meant for T ≤ SHORT. The chunked kernel also moves the state once each way, and twice more in being transposed; its
    products are of 64 tokens however few there are. Here each token waits for the one before, about a microsecond,
    hidden by the other blocks of an SM, and its 3·K·V multiply-adds take as long as the state's transfer at T ≈ 25.

    Args:
        query, key: [B, T, Hk, K] bfloat16, float16 or float32; K and V multiples of 64 up to 256.
        value: [B, T, H, V]; value head h reads key head h // (H/Hk).
        erase: [B, T, H] float32. write: likewise, or None where it is erase. log_decay: likewise, or None.
        state: [B, H, K, V] float32.
        scale: factor on the output.
        columns: of the state per block, one of COLUMNS; None by `blocks.json`, else by `default_columns`.

    Returns:
        output [B, T, H, V] in value's type, state [B, H, K, V] float32.
    """
    batch, length, key_heads, key_dim = key.shape
    heads, value_dim = value.shape[2:]
    if columns is None:
        tuned = blocks.lookup("decode", key_dim, value_dim, batch * heads, length)
        columns = tuned.get("columns") or default_columns(key_dim, value_dim, batch * heads)
    inputs = dict(query=query, key=key, value=value, erase=erase, write=write, log_decay=log_decay)
    inputs = {name: x for name, x in inputs.items() if x is not None}
    config = SimpleNamespace(
        length=length, heads=heads, group=heads // key_heads, key_dim=key_dim, columns=columns, scale=scale,
        tile=_layout(columns),
    )  # fmt: skip

    def decode_kernel(*refs):
        r = SimpleNamespace(write=None, log_decay=None)
        r.__dict__.update(zip((*inputs, "state", "output", "new_state"), refs, strict=False))
        r.__dict__.setdefault("new_state", r.state)  # the same array
        _block(config, r)

    def run(out_type, *arrays):
        # `plgpu.kernel` without its scratch and its rule for vmap, which take no mutable arrays
        mesh = plgpu.Mesh(
            grid=(batch * heads * value_dim // columns,), grid_names=("block",), kernel_name="efla_decode"
        )
        kernel = pl.kernel(decode_kernel, out_type, mesh=mesh, compiler_params=plgpu.CompilerParams())
        return cast(Callable[..., tuple[jax.Array, ...]], kernel)(*inputs.values(), *arrays)

    def update(mutable):
        state_ref, output_ref = mutable
        (output_ref[...],) = run((like(value),), state_ref)

    axes = jax.typeof(value).manual_axis_type  # of a caller's shard_map
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=axes)
    with jax.enable_x64(False):  # indices are 32 bits wide, also where a program has enabled x64
        if axes.varying:  # there, JAX has no mutable arrays for kernels
            output, state = run((like(value), like(state)), state)
        else:
            # As a mutable array the state is the kernel's input and output in one, which XLA copies only if it is
            # still needed. The output's first value is not: XLA drops it.
            state, output = pl.run_state(update)((state, jnp.zeros_like(value)))
    return output, state


def _layout(columns):
    """[K, columns] over a warpgroup: four columns a lane, whole rows a warp, row after row over warps."""
    rows = 512 // columns
    if rows == 4:  # a row for each warp
        return plgpu.Layout.TILED(plgpu.Tiling(((4, columns), (4,))), (-3,), (-2,), -1)
    return plgpu.Layout.TILED(plgpu.Tiling(((rows, columns), (rows // 4, columns), (4,))), (-5,), (-3, -2), -1)


def _block(config, r):
    """One block: `columns` columns of one head's state."""
    shape = (config.key_dim, config.columns)
    over_rows, over_columns = config.tile.reduce(1), config.tile.reduce(0)
    block = lax.axis_index("block")
    parts = r.value.shape[-1] // config.columns
    head = lax.div(block, parts)
    b, h = lax.div(head, config.heads), lax.rem(head, config.heads)
    columns = pl.ds(lax.rem(block, parts) * config.columns, config.columns)
    state_KV = plgpu.load(r.state.at[b, h, :, columns], layout=config.tile, optimized=False)

    def token(t, state_KV):
        def vector(ref, index, layout, dim):
            x = plgpu.load(ref.at[index], layout=layout, optimized=False).astype(F32)
            return lax.broadcast_in_dim(x, shape, [dim]) if dim == 0 else x

        key_head = lax.div(h, config.group)
        key_KV = vector(r.key, (b, t, key_head), over_rows, 0)
        value_V = vector(r.value, (b, t, h, columns), over_columns, 1)
        erase = r.erase[b, t, h]
        write = erase if r.write is None else r.write[b, t, h]
        if r.log_decay is not None:
            state_KV = state_KV * jnp.exp(r.log_decay[b, t, h])
        query_KV = vector(r.query, (b, t, key_head), over_rows, 0)
        recalled_V = jnp.sum(state_KV * key_KV, axis=0)
        update_V = write * value_V - erase * recalled_V
        state_KV = state_KV + key_KV * lax.broadcast_in_dim(update_V, shape, [1])
        output_V = jnp.sum(state_KV * query_KV, axis=0) * config.scale
        store(r.output.at[b, t, h, columns], output_V.astype(r.output.dtype))
        return state_KV

    state_KV = token(0, state_KV) if config.length == 1 else lax.fori_loop(0, config.length, token, state_KV)
    store(r.new_state.at[b, h, :, columns], state_KV)
