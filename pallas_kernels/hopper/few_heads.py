"""The forward pass of few heads in one kernel, with nothing kept: every warpgroup has one thing to do.

Each half of a head's columns has a block of threads. With the letters of `pallas_kernels.hopper.forward`:

- the state warpgroup, that of `pallas_kernels.hopper.scan`, does only what the next chunk waits for;
- the output warpgroup follows with O = Q S + P U, where P = tril(Q Kᵀ) never leaves its registers;
- two helpers make the inverse ahead of them, as in `forward`; the loader sends for what is read.

The two blocks of a head are a cluster. Each makes the inverse of every other chunk, and writes it to the shared memory
of both: four helpers work for a head, and none of an inverse is made twice. The interpreter knows no such writes;
there, each block makes all for itself.

With the states before them given, pieces of a row are walked side by side, by clusters of their own.
"""

from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.forward_helper import LOADER_REGISTERS, helper, loader
from pallas_kernels.hopper.inverse import fresh
from pallas_kernels.hopper.mosaic import (
    CHUNK,
    F32,
    PROCESSORS,
    SQUARE,
    Ring,
    check_registers,
    interpreting,
    launch,
    matmul,
    part_of,
    place,
    product,
    set_registers,
    smem,
    stage,
)
from pallas_kernels.hopper.scan_state import in_piece, piece_of, state_warpgroup
from pallas_kernels.hopper.unit_inverse import WORKSPACE

HELPERS = 2
# Of a thread. A launch gives five warpgroups 96 each.
REGISTERS = dict(loader=LOADER_REGISTERS, state=168, output=104, helper=88)


def serves(heads, value_dim, vectors, *, tied, save):
    """Whether a call is one for this kernel. heads: B·H. vectors: as `forward` takes them."""
    return value_dim == 128 and 2 * heads <= PROCESSORS and tied and not save and set(vectors) == {"gain"}


def forward(key, query, value, vectors, starts, *, scale, exact=False, share):
    """Output [B, T, H, V] and final [B, H, K, V] float32, for a call that `serves`.

    Args: as of `forward`, but for
        starts: [B, H, P, V, K] float32, the state before each piece, or None for zeros.
        share: chunks of a piece, of which the last may have fewer. Pieces are clusters of their own.
    """
    batch, length, key_heads, key_dim = key.shape
    heads, value_dim = value.shape[2:]
    dtype, chunks, shared = value.dtype, pl.cdiv(length, CHUNK), not interpreting()
    inputs = dict(query=query, key=key, value=value, gain=vectors["gain"])
    inputs |= dict(starts=starts) if starts is not None else {}
    outputs = dict(
        output=jax.ShapeDtypeStruct(value.shape, dtype),
        final=jax.ShapeDtypeStruct((batch, heads, key_dim, value_dim), F32),
    )
    streams = HELPERS * (1 + shared)  # that a head's chunks are dealt out to
    keys, queries, values = Ring.of("keys", 6, streams), Ring.of("queries", 2, streams), Ring.of("values", 2, streams)
    products = Ring.of("products", 3 if shared else 4, streams)
    states, updates = Ring.of("states", 1, 1), Ring.of("updates", 1, 1)
    own = dict(  # a place for each helper
        work_s=plgpu.SMEM((HELPERS, WORKSPACE), F32),
        keys_s=plgpu.SMEM((HELPERS, 4, CHUNK), F32),
        helper_stage=stage(jnp.float16, HELPERS),
    )
    absent = ("causal_s", "scores_s", "erase_s", "left_s", "right_s", "sums_r", "sums_c", "documents_r", "documents_c")
    scratch = dict.fromkeys(absent) | dict(
        k_s=smem((keys.slots, CHUNK, key_dim), dtype),
        q_s=smem((queries.slots, CHUNK, key_dim), dtype),
        v_s=smem((values.slots, 1, *SQUARE), dtype),
        solve_s=smem((products.slots, *SQUARE), dtype),
        states_s=smem((states.slots, 64, key_dim), dtype),
        updates_s=smem((updates.slots, *SQUARE), dtype),
        output_s=smem(SQUARE, dtype),
        numbers_r=plgpu.SMEM((CHUNK,), jnp.int32),  # 0 … 63, to be read by rows and by columns
        numbers_c=plgpu.SMEM((CHUNK,), jnp.int32),
        state_stage=stage(dtype, 1),
        output_stage=stage(dtype, 1),
        **keys.barriers(1, 2),
        **queries.barriers(1, 1),
        **values.barriers(1, 1),
        **products.barriers(1, 1, shared),
        **states.barriers(1, 1),
        **updates.barriers(1, 1),
    )
    config = SimpleNamespace(
        chunks=chunks, share=share, pieces=pl.cdiv(chunks, share), group=heads // key_heads, blocks=2, key_dim=key_dim,
        value_groups=2, writers=1, helpers=HELPERS, warpgroups=HELPERS + 3, streams=streams,
        helper_registers=REGISTERS["helper"], dtype=dtype, scale=scale, exact=exact, tied=True, folded=True, save=False,
        read=True, fed=True, shared=shared, given=starts is not None, decayed=False, summed=False, masked=False,
        mixing=False, skipping=False, ahead=False, halving=False, keys=keys, queries=queries, values=values,
        products=products, solves=products, states=states, updates=updates, own=tuple(own),
    )  # fmt: skip
    counts = dict(state=1, output=1, helper=HELPERS, loader=1)
    check_registers(*((count, REGISTERS[name]) for name, count in counts.items()))
    roles = (1, in_piece(loader)), (1, in_piece(_state)), (1, in_piece(_output)), (HELPERS, in_piece(helper))
    grid = batch, heads * config.pieces, 2
    return launch("efla_few_heads", config, inputs, outputs, scratch | own, grid, *roles, clustered=shared)


def _state(config, r, w):
    set_registers(REGISTERS["state"], config.warpgroups)
    state_warpgroup(config, r, w)


def _output(config, r, w):
    """The output warpgroup: what the tokens of a chunk read of the state before it and of the chunk's own updates."""
    set_registers(REGISTERS["output"], config.warpgroups)
    _, first, count = piece_of(config, r)
    columns = pl.ds(r.rank * 64, 64)
    keys, queries, updates = config.keys, config.queries, config.updates

    def step(n, carry):
        plgpu.barrier_wait(keys.full(r, n))
        plgpu.barrier_wait(queries.full(r, n))
        scores, out = _read(config, r, n)
        if config.scale != 1:
            out = out * config.scale
        plgpu.barrier_wait(updates.full(r, n))
        updates_s = r.updates_s.at[fresh(r) + updates.place(n)]
        out = matmul(scores, updates_s, SQUARE, init=out, staged=part_of(r.output_stage, 0))
        plgpu.barrier_arrive(updates.free(r, n))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        r.output_s[...] = out.astype(config.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(r.output_s, r.output.at[r.b, pl.ds((first + n) * CHUNK, CHUNK), r.h, columns])
        return carry

    lax.fori_loop(0, count, step, None)
    plgpu.wait_smem_to_gmem(0)


def _read(config, r, n):
    """P, rounded, and what the queries read of the state before the chunk; the latter runs while P is masked."""
    keys, queries, states = config.keys, config.queries, config.states
    q_s, k_s = r.q_s.at[queries.place(n)], r.k_s.at[keys.place(n)]
    zero = fresh(r)

    def multiply(scores, out):
        product(scores, q_s, k_s.T)
        plgpu.barrier_wait(states.full(r, n))
        product(out, q_s, r.states_s.at[zero + states.place(n)].T)
        made = lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores, wait_n=1))
        plgpu.barrier_arrive(keys.free(r, n))
        if config.scale != 1:
            made = made * config.scale
        row, column = place(r)
        made = lax.optimization_barrier(jnp.where(row >= column, made, 0.0)).astype(config.dtype)
        return made, plgpu.wgmma_accumulator_load(out, wait_n=0)

    made, out = lax.optimization_barrier(pl.run_scoped(multiply, plgpu.ACC(SQUARE, F32), plgpu.ACC(SQUARE, F32)))
    plgpu.barrier_arrive(states.free(r, n))
    plgpu.barrier_arrive(queries.free(r, n))
    return made, out
