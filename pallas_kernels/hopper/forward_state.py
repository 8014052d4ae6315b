"""The state warpgroups of `pallas_kernels.hopper.forward`: 64 columns of the state each, one chunk after the other."""

from functools import partial
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.forward_helper import chunks_of, send_for_values
from pallas_kernels.hopper.masks import crossed, only_if
from pallas_kernels.hopper.mosaic import (
    CHUNK,
    COLS,
    F32,
    ROWS,
    SQUARE,
    TILE,
    copy_out,
    matmul,
    part_of,
    per_column,
    per_row,
    set_registers,
)
from pallas_kernels.hopper.warps import emptied_if, put_transposed, scaled_if
from pallas_kernels.hopper.wgmma import times_transposed


def state(config, r, w):
    """One state warpgroup: columns 64w … 64w+63 of the block's part of the state."""
    set_registers(config.state_registers, config.warpgroups)
    columns = pl.ds((r.rank * config.writers + w) * 64, 64)
    _, count = chunks_of(config, r)
    if r.scale_s is not None:
        r.scale_s.at[w][...] = plgpu.layout_cast(jnp.full((CHUNK,), config.scale, F32), ROWS)
        plgpu.commit_smem()
    start = plgpu.layout_cast(jnp.zeros((64, config.key_dim), F32), TILE)
    if config.given:
        load = lambda _: plgpu.load(r.starts.at[r.b, r.h, r.piece, columns], layout=TILE, optimized=False)
        start = only_if(r.lead < 0, load, start) if config.mixing else load(start)
    step = partial(_step_ahead if config.ahead else _step, config, r, w, columns)
    end = lax.fori_loop(0, count, step, start)

    @pl.when(r.piece == config.pieces - 1)
    def _():
        put_transposed(r.final.at[r.b, r.h, :, columns], end)

    plgpu.wait_smem_to_gmem(0)


def _step(config, r, w, columns, n, state):
    """The state after chunk n, of that before it; its output to device memory."""
    staged = part_of(r.state_stage, w)
    keys, queries, products = config.keys, config.queries, config.products
    slot, made = keys.place(n), products.place(n)
    k_s, q_s, scores_s = r.k_s.at[slot], r.q_s.at[queries.place(n)], r.scores_s.at[made]
    left = lambda: per_column(plgpu.load(r.left_s.at[slot], layout=COLS), SQUARE)
    plgpu.barrier_wait(keys.full(r, n))
    begins = crossed(r, slot) if config.mixing else None
    _to_stage(config, r, w, n, columns, state)
    state, recalled = _recall(config, r, w, state, k_s)
    update_low, left_over = _update(config, r, w, n, columns, begins, recalled * left() if config.decayed else recalled)
    state, update_low, left_over = lax.optimization_barrier((state, update_low, left_over))

    def advanced(state):
        if config.decayed:
            state = state * r.left_s[slot, CHUNK - 1]
        elif config.mixing:
            state = emptied_if(begins, state)
        return matmul(left_over, k_s, state.shape, init=state, staged=staged)

    if config.staged:  # the state before is still in the stage
        state = lax.optimization_barrier(advanced(state))
    plgpu.barrier_wait(queries.full(r, n))
    if config.halving:
        _make_scores(config, r, w, n, None)
    state, out = _recall(config, r, w, state, q_s, r.scale_s[w, 0])
    if config.decayed:
        out = out * left()
    if config.mixing:
        out = scaled_if(begins, out, r.seen_s.at[made])
    if config.halving:
        plgpu.barrier_wait(r.scores_full.at[made])
    out = matmul(update_low, scores_s.T, SQUARE, init=out, staged=staged)
    if not config.staged:
        state = advanced(state)
    free = lambda: plgpu.barrier_arrive(keys.free(r, n))  # of all places of the chunk, other rings' too
    if not config.save:
        free()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if config.save:  # E has left the place of V
        free()
    _write(config, r, n, columns, r.stage_s.at[w, 0], out)
    return state


def _step_ahead(config, r, w, columns, n, state):
    """The same, where helpers are ahead."""
    keys, queries, products = config.keys, config.queries, config.products
    staged = part_of(r.state_stage, w)
    made, k_s, v_s = products.place(n), r.k_s.at[keys.place(n)], r.v_s.at[config.values.place(n), w]
    erase = lambda: per_column(plgpu.load(r.erase_s.at[made], layout=COLS), SQUARE)
    plgpu.barrier_wait(keys.full(r, n))
    begins = crossed(r, keys.place(n)) if config.mixing else None  # a document, in the chunk
    plgpu.barrier_wait(queries.full(r, n))
    state, recalled, out = _recall_both(config, r, w, n, state)
    plgpu.barrier_wait(config.values.full(r, n))
    plgpu.barrier_wait(products.full(r, n))
    _make_scores(config, r, w, n, begins)
    forgotten = (recalled * (-1.0 if config.tied else erase() * -1.0)).astype(config.dtype)
    if config.mixing:
        forgotten = scaled_if(begins, forgotten, r.seen_s.at[made])
        out = scaled_if(begins, out, r.seen_s.at[made])
        state = emptied_if(begins, state)
    update = times_transposed([v_s, forgotten], r.solve_s.at[made])  # T V - T (K S)
    plgpu.wgmma_wait(0)
    state, out, update = lax.optimization_barrier((state, out, update))
    # for the next values, where those of the chunk before were and then its output
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    _, count = chunks_of(config, r)
    send_for_values(config, r, n + 1, w, n + 1 < count)
    low = (update * erase() if config.tied else update).astype(config.dtype)
    state, out, low = lax.optimization_barrier((state, out, low))
    plgpu.barrier_wait(r.scores_full.at[made])
    if begins is not None:
        pl.when(begins)(lambda: _forget_keys(config, r, w, n))
    out = times_transposed([low], r.scores_s.at[made], out)

    def write():  # while the state advances
        plgpu.wgmma_wait(1)
        _write(config, r, n, columns, v_s, lax.optimization_barrier(out))

    state = matmul(low, k_s, state.shape, init=state, staged=staged, meanwhile=write)
    plgpu.barrier_arrive(keys.free(r, n))
    return state


def _make_scores(config, r, w, n, begins):
    """This warpgroup's half of the rows of P, which both read later."""
    rows, made = pl.ds(32 * w, 32), config.products.place(n)
    k_s, q_s = r.k_s.at[config.keys.place(n)], r.q_s.at[config.queries.place(n), rows]
    share = _scaled(config, matmul(k_s, q_s.T, (CHUNK, 32))).astype(config.dtype)
    mask = jnp.where(begins, 1 + made, 0) if config.mixing else 0
    # transposed, as it is stored; a product with ones and zeros, two numbers at once, is cheaper than a choice
    r.scores_s.at[made, rows].T[...] = share * plgpu.load(r.causal_s.at[r.first + mask, w], layout=TILE)
    plgpu.commit_smem()
    plgpu.barrier_arrive(r.scores_full.at[made])


def _forget_keys(config, r, w, n):
    """Zeros for keys of chunk n that are not of the document that it ends with; only the state still reads them.

    Of updates there would be two kinds in registers. Each state warpgroup does half, and waits for the other.
    """
    keeps = per_row(plgpu.load(r.last_s.at[config.products.place(n)], layout=ROWS), SQUARE) > 0

    def forget(part):
        k_s = r.k_s.at[config.keys.place(n), :, pl.ds(part * 64, 64)]
        k_s[...] = jnp.where(keeps, plgpu.load(k_s, layout=TILE), 0.0)

    if config.key_dim == 64:
        pl.when(w == 0)(lambda: forget(0))
    else:
        forget(w)
    plgpu.commit_smem()
    plgpu.barrier_arrive(r.forgotten)
    plgpu.barrier_wait(r.forgotten)


def _write(config, r, n, columns, stage_s, out):
    """The output of chunk n to a stage that is free, and on to device memory, but for chunks before a piece."""
    first, _ = chunks_of(config, r)
    stage_s.T[...] = out.astype(config.dtype)
    plgpu.commit_smem()
    target = r.output.at[r.b, pl.ds((first + n) * CHUNK, CHUNK), r.h, columns]
    copy_out(stage_s, target, n >= r.lead if config.mixing else None)


def _to_stage(config, r, w, n, columns, state):
    """The state rounded, to the stage if it is used from there, and from the stage to device memory if it is saved."""
    parts, (first, _) = range(config.key_dim // 64), chunks_of(config, r)
    if config.staged:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for part in parts:
            r.stage_s.at[w, part][...] = state[:, part * 64 : (part + 1) * 64].astype(config.dtype)
        plgpu.commit_smem()
    if config.save:
        for part in parts:
            target = r.states.at[r.b, r.h, first + n, columns, pl.ds(part * 64, 64)]
            plgpu.copy_smem_to_gmem(r.stage_s.at[w, part], target, commit_group=False)
        plgpu.commit_smem_to_gmem_group()


def _update(config, r, w, n, columns, begins, recalled):
    """Uᵀ rounded, and what of it is there at the chunk's end, of the values and what the keys recall."""
    values, products = config.values, config.products
    slot, made, v_s = config.keys.place(n), products.place(n), r.v_s.at[values.place(n), w]
    erase = lambda factor=1.0: per_column(plgpu.load(r.erase_s.at[made], layout=COLS) * factor, SQUARE)
    plgpu.barrier_wait(values.full(r, n))
    plgpu.barrier_wait(products.full(r, n))
    # T V - T (K S): V - K S rounded would lose of K S what is below V's last place, always to the same side
    forgotten = (recalled * (-1.0 if config.tied else erase(-1.0))).astype(config.dtype)
    if config.mixing:
        forgotten = scaled_if(begins, forgotten, r.seen_s.at[made])
    update = times_transposed([v_s, forgotten], r.solve_s.at[made])
    plgpu.wgmma_wait(0)
    update = lax.optimization_barrier(update)
    if config.save:  # in the place of V, which all threads have read
        plgpu.commit_smem()
        v_s.T[...] = update.astype(config.dtype)
        plgpu.commit_smem()
        first, _ = chunks_of(config, r)
        plgpu.copy_smem_to_gmem(v_s, r.solved.at[r.b, pl.ds((first + n) * CHUNK, CHUNK), r.h, columns])
    if config.tied:
        update = update * erase()
    low = update.astype(config.dtype)
    if config.mixing:
        return low, scaled_if(begins, low, r.last_s.at[made])
    if not config.decayed:
        return low, low
    right = per_column(plgpu.load(r.right_s.at[slot], layout=COLS), SQUARE)
    return low, (update * right).astype(config.dtype)


def _scaled(config, tile):
    return tile if config.scale == 1 else tile * config.scale


def _recall(config, r, w, state, tokens, scale=None):
    """The state as given, and (scale) Sᵀ tokensᵀ; the state from the stage, where it is there, unscaled.

    From registers it is rounded half by half, and again each time: what is kept takes registers. With a scale that the
    compiler does not know it cannot keep it.
    """
    staged, parts = part_of(r.state_stage, w), range(config.key_dim // 64)
    pieces = [tokens.at[:, pl.ds(part * 64, 64)].T for part in parts]
    if config.staged:
        out = matmul([r.stage_s.at[w, part] for part in parts], pieces, SQUARE, staged=staged)
        return state, out if scale is None else _scaled(config, out)
    out: Any = None
    for part in parts:
        low = state[:, part * 64 : (part + 1) * 64]
        low = (low if scale is None else low * scale).astype(config.dtype)
        out = matmul(low, pieces[part], SQUARE, init=out, staged=staged)
        state, out = lax.optimization_barrier((state, out))
    return state, out


def _recall_both(config, r, w, n, state):
    """The state as given, Sᵀ Kᵀ and scale Sᵀ Qᵀ. The state is rounded once for both, half by half: all of it would take
    registers."""
    k_s, q_s = r.k_s.at[config.keys.place(n)], r.q_s.at[config.queries.place(n)]
    recalled: Any = None
    out: Any = None
    for part in range(config.key_dim // 64):
        columns = pl.ds(part * 64, 64)
        low = state[:, part * 64 : (part + 1) * 64].astype(config.dtype)
        recalled = times_transposed([low], k_s.at[:, columns], recalled)
        out = times_transposed([low], q_s.at[:, columns], out)
        plgpu.wgmma_wait(0)
        state, recalled, out = lax.optimization_barrier((state, recalled, out))
    return state, recalled, _scaled(config, out)
