"""The scan over chunks where heads are few, with decay: then time is what one chunk takes to follow the other.

The inverse of every chunk is there (`pallas_kernels.hopper.prepare`). A block of threads walks the chunks of one piece
of a sequence, for one value head and 64 columns of its state, with three warpgroups:

- the state warpgroup does only what the next chunk waits for: Rᵀ from Sᵀ Kᵀ, Uᵀ, Sᵀ ← d Sᵀ + (e∘U)ᵀ K, in registers;
- the output warpgroup follows with Oᵀ = a∘Sᵀ Qᵀ + Uᵀ Pᵀ, from what the first leaves in shared memory;
- the helper sends for what is read, and makes P = tril(D∘Q Kᵀ) ahead of both.

The letters are those of `pallas_kernels.hopper.forward`.
"""

from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.masks import masked_scores
from pallas_kernels.hopper.mosaic import (
    CHUNK,
    COLS,
    F32,
    SQUARE,
    Ring,
    launch,
    matmul,
    per_column,
    recycle,
    smem,
    stage,
    write_numbers,
)
from pallas_kernels.hopper.scan_state import columns_of, piece_of, state_warpgroup


def scan(key, query, value, solve, vectors, documents, starts, *, scale, tied, save, share):
    """Output, final state and what the backward pass needs, as `forward` gives them.

    Args:
        key, query, value, documents: as `forward` takes them.
        solve: [B, H, N, C, C], of `prepare`.
        vectors: with decay left, right and sums, as `forward` takes them; erase [B, H, N·64] float32, unless folded.
        starts: [B, H, P, V, K] float32, the state before each piece, or None for zeros.
        share: chunks of a piece, of which the last may have fewer.

    Returns:
        output [B, T, H, V], final [B, H, K, V] float32; with save also states [B, H, N, V, K] and solved [B, T, H, V].
    """
    batch, length, heads, value_dim = value.shape
    key_dim, dtype = key.shape[-1], value.dtype
    chunks = pl.cdiv(length, CHUNK)
    outputs = dict(
        output=jax.ShapeDtypeStruct(value.shape, dtype),
        final=jax.ShapeDtypeStruct((batch, heads, key_dim, value_dim), F32),
    )
    if save:
        outputs |= dict(
            states=jax.ShapeDtypeStruct((batch, heads, chunks, value_dim, key_dim), dtype),
            solved=jax.ShapeDtypeStruct(value.shape, dtype),
        )
    decayed, summed, masked = "left" in vectors, "sums" in vectors, documents is not None
    inputs = dict(key=key, value=value, solve=solve, query=query)
    inputs |= {f"{name}_v": x for name, x in vectors.items()}
    inputs |= {name: x for name, x in dict(documents=documents, starts=starts).items() if x is not None}
    keys, values, queries = Ring.of("keys", 4, 1), Ring.of("values", 4, 1), Ring.of("queries", 2, 1)
    scores, states, updates = Ring.of("scores", 2, 1), Ring.of("states", 1, 1), Ring.of("updates", 1, 1)
    vector = lambda ring: plgpu.SMEM((ring.slots, CHUNK), F32)
    numbers = plgpu.SMEM((CHUNK,), jnp.int32)
    scratch = dict(
        k_s=smem((keys.slots, CHUNK, key_dim), dtype),
        v_s=smem((values.slots, 1, *SQUARE), dtype),
        solve_s=smem((values.slots, *SQUARE), dtype),
        erase_s=vector(values) if "erase" in vectors else None,
        left_s=vector(values) if decayed else None,
        right_s=vector(values) if decayed else None,
        state_stage=stage(dtype, 1),
        q_s=smem((queries.slots, CHUNK, key_dim), dtype),
        states_s=smem((states.slots, 64, key_dim), dtype),
        updates_s=smem((updates.slots, *SQUARE), dtype),
        solved_s=smem(SQUARE, dtype) if save and tied else None,
        scores_s=smem((scores.slots, *SQUARE), dtype),
        output_s=smem(SQUARE, dtype),
        read_s=vector(queries) if decayed else None,  # left, for the output warpgroup
        sums_r=vector(queries) if summed else None,
        sums_c=vector(queries) if summed else None,
        documents_r=plgpu.SMEM((queries.slots, CHUNK), jnp.int32) if masked else None,
        documents_c=plgpu.SMEM((queries.slots, CHUNK), jnp.int32) if masked else None,
        numbers_r=numbers,  # 0 … 63, to be read by rows and by columns
        numbers_c=numbers,
        **keys.barriers(1, 2),
        **values.barriers(2 + len({"erase", "left", "right"} & set(vectors)), 1),
        **queries.barriers(1 + decayed + 2 * summed + 2 * masked, 1),
        **scores.barriers(1, 1),
        **states.barriers(1, 1),
        **updates.barriers(1, 1),
    )
    pieces, blocks = pl.cdiv(chunks, share), value_dim // 64
    config = SimpleNamespace(
        chunks=chunks, share=share, pieces=pieces, group=heads // key.shape[2], blocks=blocks, key_dim=key_dim,
        read=True, dtype=dtype, scale=scale, tied=tied, folded="erase" not in vectors, save=save, decayed=decayed,
        summed=summed, masked=masked, given=starts is not None, keys=keys, values=values, queries=queries,
        scores=scores, states=states, updates=updates, solves=values, fed=False, shared=False,
    )  # fmt: skip
    roles = (1, state_warpgroup), (1, _output), (1, _helper)
    return launch("efla_scan", config, inputs, outputs, scratch, (batch, heads, pieces * blocks), *roles)


def _output(config, r, _):
    """The output warpgroup: what the tokens of a chunk read of the state before it and of the chunk's own updates."""
    _, first, count = piece_of(config, r)
    columns = pl.ds(columns_of(config, r) * 64, 64)
    queries, scores, states, updates = config.queries, config.scores, config.states, config.updates

    def step(i, carry):
        plgpu.barrier_wait(queries.full(r, i))
        plgpu.barrier_wait(states.full(r, i))
        out = matmul(r.states_s.at[states.place(i)], r.q_s.at[queries.place(i)].T, SQUARE)
        plgpu.barrier_arrive(states.free(r, i))
        if config.scale != 1:
            out = out * config.scale
        if config.decayed:
            out = out * per_column(plgpu.load(r.read_s.at[queries.place(i)], layout=COLS), SQUARE)
        plgpu.barrier_arrive(queries.free(r, i))
        plgpu.barrier_wait(scores.full(r, i))
        plgpu.barrier_wait(updates.full(r, i))
        inner = r.updates_s.at[updates.place(i)].T, r.scores_s.at[scores.place(i)].T
        out = matmul(*inner, SQUARE, init=out, staged=r.state_stage)
        plgpu.barrier_arrive(updates.free(r, i))
        plgpu.barrier_arrive(scores.free(r, i))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        r.output_s.T[...] = out.astype(config.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(r.output_s, r.output.at[r.b, pl.ds((first + i) * CHUNK, CHUNK), r.h, columns])
        return carry

    lax.fori_loop(0, count, step, None)
    plgpu.wait_smem_to_gmem(0)


def _helper(config, r, _):
    """Sends for what is read, in the order in which places get free, and makes the scores ahead of what uses them."""
    _, first, count = piece_of(config, r)
    loads = _loads(config, r, first)

    for i in range(min(config.keys.slots, config.share)):
        for ring, load in loads:
            if i < ring.slots:
                pl.when(count > i)(lambda i=i, load=load: load(0 * count + i))
    write_numbers(r)
    plgpu.commit_smem()

    def step(i, carry):
        _write_scores(config, r, i)
        pl.when(i > 0)(lambda: recycle(r, loads, i - 1, count))
        return carry

    lax.fori_loop(0, count, step, None)
    recycle(r, loads, count - 1, count)
    config.scores.wait_last(r, count)


def _loads(config, r, first):
    """(ring, function of i that sends for what of chunk first + i goes through it), the first to get free first."""
    head = lax.div(r.h, config.group)
    rows = lambda i: pl.ds((first + i) * CHUNK, CHUNK)

    def load(ring, i, *pairs):
        for source, target in pairs:
            plgpu.copy_gmem_to_smem(source, target.at[ring.place(i)], ring.full(r, i))

    def load_keys(i):
        load(config.keys, i, (r.key.at[r.b, rows(i), head], r.k_s))

    def load_values(i):
        ring, tokens = config.values, (r.b, r.h, rows(i))
        load(ring, i, (r.solve.at[r.b, r.h, first + i], r.solve_s))
        if not config.folded:
            load(ring, i, (r.erase_v.at[tokens], r.erase_s))
        if config.decayed:
            load(ring, i, (r.left_v.at[tokens], r.left_s), (r.right_v.at[tokens], r.right_s))
        columns = pl.ds(columns_of(config, r) * 64, 64)
        load(ring, i, (r.value.at[r.b, rows(i), r.h, columns], r.v_s.at[:, 0]))

    def load_queries(i):
        ring, tokens = config.queries, (r.b, r.h, rows(i))
        load(ring, i, (r.query.at[r.b, rows(i), head], r.q_s))
        if config.decayed:
            load(ring, i, (r.left_v.at[tokens], r.read_s))
        if config.summed:
            load(ring, i, (r.sums_v.at[tokens], r.sums_r), (r.sums_v.at[tokens], r.sums_c))
        if config.masked:
            documents = r.documents.at[r.b, rows(i)]
            load(ring, i, (documents, r.documents_r), (documents, r.documents_c))

    return (config.queries, load_queries), (config.values, load_values), (config.keys, load_keys)


def _write_scores(config, r, i):
    """P of a chunk."""
    keys, queries, scores = config.keys, config.queries, config.scores
    plgpu.barrier_wait(keys.full(r, i))
    plgpu.barrier_wait(queries.full(r, i))
    made = masked_scores(config, r, queries.place(i), r.k_s.at[keys.place(i)])
    plgpu.barrier_arrive(keys.free(r, i))
    scores.wait_place(r, i)
    r.scores_s.at[scores.place(i)][...] = made
    plgpu.commit_smem()
    plgpu.barrier_arrive(scores.full(r, i))
