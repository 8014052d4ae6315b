"""The scan over chunks where heads are few and time is what one chunk takes to follow the other.

The inverse of every chunk is there (`pallas_kernels.hopper.prepare`). A block of threads walks the chunks of one piece
of a sequence, for one value head and 64 columns of its state, with three warpgroups:

- the state warpgroup does only what the next chunk waits for: Rᵀ from Sᵀ Kᵀ, Uᵀ, Sᵀ ← d Sᵀ + (e∘U)ᵀ K, in registers;
- the output warpgroup follows with P = tril(D∘Q Kᵀ) and Oᵀ = a∘Sᵀ Qᵀ + Uᵀ Pᵀ, from what the first leaves in shared
  memory;
- the third sends for what they read.

The letters are those of `pallas_kernels.hopper.forward`.

Without queries (`summaries`) a piece is summed up instead: over it, the state goes through an affine map, S ↦ M S + E;
E is what the scan leaves of a zero state, M what it leaves of the identity and values that are zero.
"""

from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.masks import decay_mask
from pallas_kernels.hopper.mosaic import (
    CHUNK,
    COLS,
    F32,
    SQUARE,
    TILE,
    Ring,
    launch,
    matmul,
    part_of,
    per_column,
    place,
    product,
    smem,
    stage,
    write_numbers,
)

ROUNDED = jnp.bfloat16  # maps are kept as the sum of two of these: float32 in all but the last bits, and its range


def scan(key, query, value, solve, vectors, documents, starts, *, scale, tied, save, pieces=1):
    """Output, final state and what the backward pass needs, as `forward` gives them.

    Args:
        key, query, value, documents: as `forward` takes them.
        solve: [B, H, N, C, C], of `prepare`.
        vectors: erase [B, H, N·64] float32; with decay also left, right and sums, as `forward` takes them.
        starts: [B, H, pieces, V, K] float32, the state before each piece, or None for zeros (one piece).
        pieces: of how many chunks each, as equal as may be: `bounds`.

    Returns:
        output [B, T, H, V], final [B, H, V, K] float32; with save also states [B, H, N, V, K] and solved [B, T, H, V].
    """
    batch, length, heads, value_dim = value.shape
    key_dim, dtype = key.shape[-1], value.dtype
    chunks = pl.cdiv(length, CHUNK)
    outputs = dict(
        output=jax.ShapeDtypeStruct(value.shape, dtype),
        final=jax.ShapeDtypeStruct((batch, heads, value_dim, key_dim), F32),
    )
    if save:
        outputs |= dict(
            states=jax.ShapeDtypeStruct((batch, heads, chunks, value_dim, key_dim), dtype),
            solved=jax.ShapeDtypeStruct(value.shape, dtype),
        )
    return _scan(
        "efla_scan", key, query, value, solve, vectors, documents, starts, outputs,
        scale=scale, tied=tied, save=save, pieces=pieces, writers=1,
    )  # fmt: skip


def summaries(key, value, solve, vectors, documents, *, tied, pieces):
    """Of every piece, what it makes of a zero state, and its map.

    Arguments: as of `scan`.

    Returns:
        ends [B, H, pieces, V, K] float32, Eᵀ; maps [B, H, pieces, 2, K, K] bfloat16, Mᵀ as a sum of two.
    """
    batch, _, heads, value_dim = value.shape
    key_dim = key.shape[-1]
    outputs = dict(
        ends=jax.ShapeDtypeStruct((batch, heads, pieces, value_dim, key_dim), F32),
        maps=jax.ShapeDtypeStruct((batch, heads, pieces, 2, key_dim, key_dim), ROUNDED),
    )
    return _scan(
        "efla_summaries", key, None, value, solve, vectors, documents, None, outputs,
        scale=1.0, tied=tied, save=False, pieces=pieces, writers=1 + (value_dim == key_dim),
    )  # fmt: skip


def _scan(name, key, query, value, solve, vectors, documents, starts, outputs, *, scale, tied, save, pieces, writers):
    batch, length, key_heads, key_dim = key.shape
    heads, value_dim = value.shape[2:]
    dtype = value.dtype
    read = query is not None
    decayed, summed, masked = "left" in vectors, read and "sums" in vectors, read and documents is not None
    inputs = dict(key=key, value=value, solve=solve)
    inputs |= {f"{name}_v": x for name, x in vectors.items() if read or name != "sums"}
    inputs |= dict(query=query) if read else {}
    inputs |= dict(documents=documents) if masked else {}
    inputs |= dict(starts=starts) if starts is not None else {}
    readers = 1 + read
    keys, queries, values = Ring.of("keys", 3, 1), Ring.of("queries", 3, 1), Ring.of("values", 3, 1)
    states, updates = Ring.of("states", 2, 1), Ring.of("updates", 2, 1)
    vector = lambda ring: plgpu.SMEM((ring.slots, CHUNK), F32)
    scratch = dict(
        k_s=smem((keys.slots, CHUNK, key_dim), dtype),
        v_s=smem((values.slots, writers, *SQUARE), dtype),
        solve_s=smem((values.slots, *SQUARE), dtype),
        erase_s=vector(values),
        left_s=vector(keys) if decayed else None,
        right_s=vector(values) if decayed else None,
        state_stage=stage(dtype, writers),
        **keys.barriers(1 + decayed, writers * readers),
        **values.barriers(writers + 2 + decayed, writers),
    )
    if read:
        scratch |= dict(
            q_s=smem((queries.slots, CHUNK, key_dim), dtype),
            states_s=smem((states.slots, key_dim // 64, *SQUARE), dtype),
            updates_s=smem((updates.slots, *SQUARE), dtype),
            solved_s=smem(SQUARE, dtype) if save and tied else None,
            scores_s=smem(SQUARE, dtype),
            output_s=smem(SQUARE, dtype),
            sums_r=vector(queries) if summed else None,
            sums_c=vector(queries) if summed else None,
            documents_r=plgpu.SMEM((queries.slots, CHUNK), jnp.int32) if masked else None,
            documents_c=plgpu.SMEM((queries.slots, CHUNK), jnp.int32) if masked else None,
            numbers_r=plgpu.SMEM((CHUNK,), jnp.int32),  # 0 … 63, to be read by rows and by columns
            numbers_c=plgpu.SMEM((CHUNK,), jnp.int32),
            **queries.barriers(1 + 2 * summed + 2 * masked, 1),
            **states.barriers(1, 1),
            **updates.barriers(1, 1),
        )
    groups = (value_dim + (0 if read else key_dim)) // 64  # of 64 columns
    chunks = pl.cdiv(length, CHUNK)
    config = SimpleNamespace(
        chunks=chunks, share=pl.cdiv(chunks, pieces), pieces=pieces, group=heads // key_heads, blocks=groups // writers,
        key_dim=key_dim, value_groups=value_dim // 64, writers=writers, read=read, dtype=dtype, scale=scale, tied=tied,
        save=save, decayed=decayed, summed=summed, masked=masked, given=starts is not None,
        keys=keys, queries=queries, values=values, states=states, updates=updates,
    )  # fmt: skip
    roles = ((writers, _state), (1, _output), (1, _loads)) if read else ((writers, _state), (1, _loads))
    return launch(name, config, inputs, outputs, scratch, (batch, heads, pieces * config.blocks), *roles)


def _piece(config, r):
    """Number of the block's piece, its first chunk and how many it has."""
    piece = lax.div(r.c, jnp.int32(config.blocks))
    first = jnp.minimum(piece * config.share, config.chunks)
    return piece, first, jnp.minimum(config.share, config.chunks - first)


def _group(config, r, w):
    """Which 64 columns state warpgroup w has: those of the values, behind them those of the map."""
    return lax.rem(r.c, jnp.int32(config.blocks)) * config.writers + w


def _state(config, r, w):
    """A state warpgroup."""
    piece, first, count = _piece(config, r)
    group = _group(config, r, w)
    staged = part_of(r.state_stage, w)
    shape = 64, config.key_dim
    keys, values = config.keys, config.values
    columns = pl.ds(group * 64, 64)
    if config.given:
        state = plgpu.load(r.starts.at[r.b, r.h, piece, columns], layout=TILE, optimized=False)
    elif config.read:
        state = plgpu.layout_cast(jnp.zeros(shape, F32), TILE)
    else:
        number = lambda axis: plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)
        state = jnp.where(number(1) == number(0) + (group - config.value_groups) * 64, 1.0, 0.0)
    valued = jnp.where(group < config.value_groups, 1.0, 0.0)

    def step(i, state):
        slot, v_s = values.place(i), r.v_s.at[values.place(i), w]
        k_s = r.k_s.at[keys.place(i)]
        by_token = lambda ref, place: per_column(plgpu.load(ref.at[place], layout=COLS), SQUARE)
        left = lambda: by_token(r.left_s, keys.place(i))
        plgpu.barrier_wait(keys.full(r, i))
        recalled = _recall(config, r, i, first, columns, state, k_s, staged)
        plgpu.barrier_wait(values.full(r, i))
        if config.decayed:
            recalled = recalled * left()
        if not config.tied:
            recalled = recalled * by_token(r.erase_s, slot)
        value = plgpu.load(v_s.T, layout=TILE).astype(F32)
        rest = (value if config.read else value * valued) - recalled
        update = matmul(rest.astype(config.dtype), r.solve_s.at[slot].T, SQUARE, staged=staged)
        if config.save and config.tied:
            _leave_solved(config, r, first + i, columns, update.astype(config.dtype), r.solved_s)
        if config.tied:
            update = update * by_token(r.erase_s, slot)
        low = update.astype(config.dtype)
        if config.read:
            _hand_over(config, r, i, first, columns, low)
        if config.decayed:
            low = (update * by_token(r.right_s, slot)).astype(config.dtype)
            state = state * r.left_s[keys.place(i), CHUNK - 1]
        plgpu.barrier_arrive(values.free(r, i))
        state = matmul(low, k_s, shape, init=state, staged=staged)
        plgpu.barrier_arrive(keys.free(r, i))
        return state

    state = lax.fori_loop(0, count, step, state)
    if config.read:
        config.states.wait_last(r, count)
        config.updates.wait_last(r, count)
        pl.when(piece == config.pieces - 1)(lambda: _store(r.final.at[r.b, r.h, columns], state))
    else:
        pl.when(group < config.value_groups)(lambda: _store(r.ends.at[r.b, r.h, piece, columns], state))
        pl.when(group >= config.value_groups)(lambda: _store_map(config, r, piece, group, state))
    plgpu.wait_smem_to_gmem(0)


def _store(ref, state):
    ref[...] = state


def _store_map(config, r, piece, group, state):
    columns = pl.ds((group - config.value_groups) * 64, 64)
    high = state.astype(ROUNDED)
    r.maps.at[r.b, r.h, piece, 0, columns][...] = high
    r.maps.at[r.b, r.h, piece, 1, columns][...] = (state - high.astype(F32)).astype(ROUNDED)


def _recall(config, r, i, first, columns, state, k_s, staged):
    """Sᵀ Kᵀ; meanwhile the rounded state goes to where the output warpgroup reads it, and to device memory if saved."""
    parts = range(config.key_dim // 64)
    low = state.astype(config.dtype)
    states = config.states

    def multiply(acc):
        product(acc, low, k_s.T, staged)
        if config.read:
            states.wait_place(r, i)
            if config.save:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for part in parts:
                r.states_s.at[states.place(i), part][...] = low[:, part * 64 : (part + 1) * 64]
            plgpu.commit_smem()
            plgpu.barrier_arrive(states.full(r, i))
        return plgpu.wgmma_accumulator_load(acc, wait_n=0)

    recalled = lax.optimization_barrier(pl.run_scoped(multiply, plgpu.ACC(SQUARE, F32)))
    if config.save:
        for part in parts:
            target = r.states.at[r.b, r.h, first + i, columns, pl.ds(part * 64, 64)]
            plgpu.copy_smem_to_gmem(r.states_s.at[states.place(i), part], target, commit_group=False)
        plgpu.commit_smem_to_gmem_group()
    return recalled


def _hand_over(config, r, i, first, columns, low):
    """Uᵀ to the output warpgroup."""
    updates = config.updates
    updates.wait_place(r, i)
    place = r.updates_s.at[updates.place(i)]
    if config.save and not config.tied:
        _leave_solved(config, r, first + i, columns, low, place)
    else:
        place.T[...] = low
        plgpu.commit_smem()
    plgpu.barrier_arrive(updates.full(r, i))


def _leave_solved(config, r, n, columns, low, place):
    """What was solved for, to device memory through a place in shared memory."""
    place.T[...] = low
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(place, r.solved.at[r.b, pl.ds(n * CHUNK, CHUNK), r.h, columns])


def _output(config, r, _):
    """The output warpgroup: what the tokens of a chunk read of the state before it and of the chunk's own updates."""
    _, first, count = _piece(config, r)
    columns = pl.ds(_group(config, r, 0) * 64, 64)
    keys, queries, states, updates = config.keys, config.queries, config.states, config.updates
    parts = range(config.key_dim // 64)
    write_numbers(r)
    plgpu.commit_smem()

    def step(i, carry):
        k_s, q_s = r.k_s.at[keys.place(i)], r.q_s.at[queries.place(i)]
        plgpu.barrier_wait(keys.full(r, i))
        plgpu.barrier_wait(queries.full(r, i))
        _write_scores(config, r, queries.place(i), q_s, k_s)
        plgpu.barrier_wait(states.full(r, i))
        slot = states.place(i)
        out = matmul(
            [r.states_s.at[slot, part] for part in parts], [q_s.at[:, pl.ds(part * 64, 64)].T for part in parts], SQUARE
        )
        plgpu.barrier_arrive(queries.free(r, i))
        plgpu.barrier_arrive(states.free(r, i))
        if config.scale != 1:
            out = out * config.scale
        if config.decayed:
            out = out * per_column(plgpu.load(r.left_s.at[keys.place(i)], layout=COLS), SQUARE)
        plgpu.barrier_arrive(keys.free(r, i))
        plgpu.barrier_wait(updates.full(r, i))
        inner = r.updates_s.at[updates.place(i)].T, r.scores_s.T
        out = matmul(*inner, SQUARE, init=out, staged=r.state_stage)
        plgpu.barrier_arrive(updates.free(r, i))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        r.output_s.T[...] = out.astype(config.dtype)
        plgpu.commit_smem()
        rows = pl.ds((first + i) * CHUNK, CHUNK)
        plgpu.copy_smem_to_gmem(r.output_s, r.output.at[r.b, rows, r.h, columns])
        return carry

    lax.fori_loop(0, count, step, None)
    plgpu.wait_smem_to_gmem(0)


def _write_scores(config, r, slot, q_s, k_s):
    """P of a chunk."""
    scores = matmul(q_s, k_s.T, SQUARE)
    if config.scale != 1:
        scores = scores * config.scale
    decay = decay_mask(config, r, slot)
    if decay is None:
        row, column = place(r)
        scores = jnp.where(row >= column, scores, 0.0)
    else:
        scores = scores * decay
    r.scores_s[...] = lax.optimization_barrier(scores).astype(config.dtype)
    plgpu.commit_smem()


def _loads(config, r, _):
    """Sends for what the others read, as places get free."""
    _, first, count = _piece(config, r)
    head = lax.div(r.h, config.group)
    keys, queries, values = config.keys, config.queries, config.values
    rings = (keys, values, queries) if config.read else (keys, values)

    def to(ring, i, *pairs):
        for source, target in pairs:
            plgpu.copy_gmem_to_smem(source, target.at[ring.place(i)], ring.full(r, i))

    def step(i, carry):
        rows = pl.ds((first + i) * CHUNK, CHUNK)
        tokens = r.b, r.h, rows
        for ring in rings:
            ring.wait_place(r, i)
        plgpu.commit_smem()  # what read the places is done before the copies, which are another proxy, write them
        to(keys, i, (r.key.at[r.b, rows, head], r.k_s))
        to(values, i, (r.solve.at[r.b, r.h, first + i], r.solve_s), (r.erase_v.at[tokens], r.erase_s))
        for w in range(config.writers):
            # a map has no values; some are read all the same, and count for nothing
            columns = pl.ds(jnp.minimum(_group(config, r, w), config.value_groups - 1) * 64, 64)
            target = r.v_s.at[values.place(i), w]
            plgpu.copy_gmem_to_smem(r.value.at[r.b, rows, r.h, columns], target, values.full(r, i))
        if config.decayed:
            to(keys, i, (r.left_v.at[tokens], r.left_s))
            to(values, i, (r.right_v.at[tokens], r.right_s))
        if config.read:
            to(queries, i, (r.query.at[r.b, rows, head], r.q_s))
        if config.summed:
            to(queries, i, (r.sums_v.at[tokens], r.sums_r), (r.sums_v.at[tokens], r.sums_c))
        if config.masked:
            documents = r.documents.at[r.b, rows]
            to(queries, i, (documents, r.documents_r), (documents, r.documents_c))
        return carry

    lax.fori_loop(0, count, step, None)
    for ring in rings:
        ring.wait_last(r, count)
