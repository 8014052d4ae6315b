"""The state warpgroups of `pallas_kernels.hopper.scan`: only what the next chunk waits for."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.chain import split
from pallas_kernels.hopper.mosaic import CHUNK, COLS, F32, SQUARE, TILE, matmul, part_of, per_column, product, store


def piece_of(config, r):
    """Number of the block's piece, the first chunk to look at and how many."""
    piece = lax.div(r.c, jnp.int32(config.blocks))
    first = piece * config.share
    count = jnp.minimum(config.share, config.chunks - first)
    if not config.skipping:
        return piece, first, count
    begin = r.begins[r.b, piece]  # nothing before matters to the piece's end
    return piece, first + begin, count - begin


def group_of(config, r, w):
    """Which 64 columns state warpgroup w has: those of the values, behind them those of the map."""
    return lax.rem(r.c, jnp.int32(config.blocks)) * config.writers + w


def state_warpgroup(config, r, w):
    """A state warpgroup."""
    piece, first, count = piece_of(config, r)
    group = group_of(config, r, w)
    staged = part_of(r.state_stage, w)
    shape = 64, config.key_dim
    keys, values = config.keys, config.values
    columns = pl.ds(group * 64, 64)
    state = _start(config, r, piece, group)

    def step(i, state):
        slot, k_s = values.place(i), r.k_s.at[keys.place(i)]
        solve_s = r.solve_s.at[config.solves.place(i)]
        by_token = lambda ref: per_column(plgpu.load(ref.at[slot], layout=COLS), SQUARE)
        plgpu.barrier_wait(keys.full(r, i))
        recalled = _recall(config, r, w, i, first, columns, state, k_s)
        if config.decayed:
            recalled = recalled * by_token(r.left_s)
        if not config.tied:
            recalled = recalled * by_token(r.erase_s)
        if config.fed:
            plgpu.barrier_wait(config.solves.full(r, i))
        if config.shared:
            plgpu.commit_smem()  # what another block wrote, which the product reads through another proxy
        # T V - T (K S): V - K S rounded would lose of K S what is below V's last place, always to the same side
        forgotten, v_s = (recalled * -1.0).astype(config.dtype), r.v_s.at[slot, w].T
        update = matmul([v_s, forgotten], [solve_s.T, solve_s.T], SQUARE, staged=staged)
        solved = update.astype(config.dtype) if config.save and config.tied else None
        if config.tied and not config.folded:
            update = update * by_token(r.erase_s)
        low = late = update.astype(config.dtype)
        if config.decayed:
            late = (update * by_token(r.right_s)).astype(config.dtype)
            state = state * r.left_s[slot, CHUNK - 1]

        def hand_over():
            plgpu.barrier_arrive(values.free(r, i))
            if config.read:
                _hand_over(config, r, i, first, columns, low, solved)

        state = matmul(late, k_s, shape, init=state, staged=staged, meanwhile=hand_over)
        plgpu.barrier_arrive(keys.free(r, i))
        return state

    state = lax.fori_loop(0, count, step, state)
    if config.read:
        config.states.wait_last(r, count)
        config.updates.wait_last(r, count)

        @pl.when(piece == config.pieces - 1)
        def _():
            r.final.at[r.b, r.h, columns][...] = state
    else:

        @pl.when(group < config.value_groups)
        def _():
            r.ends.at[r.b, r.h, piece, columns][...] = state

        @pl.when(group >= config.value_groups)
        def _():
            for part, rounded in enumerate(split(state)):
                rows = pl.ds(part * config.key_dim + (group - config.value_groups) * 64, 64)
                store(r.maps.at[r.b, r.h, piece, rows], rounded)

    plgpu.wait_smem_to_gmem(0)


def _start(config, r, piece, group):
    """Sᵀ before the piece; what summaries start from."""
    shape = 64, config.key_dim
    columns = lambda group: pl.ds(group * 64, 64)
    if config.read:
        if config.given:
            return plgpu.load(r.starts.at[r.b, r.h, piece, columns(group)], layout=TILE, optimized=False)
        return plgpu.layout_cast(jnp.zeros(shape, F32), TILE)
    number = lambda axis: plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)
    state = jnp.where(number(1) == number(0) + (group - config.value_groups) * 64, 1.0, 0.0)
    if config.given:
        of_values = columns(jnp.minimum(group, config.value_groups - 1))
        initial = plgpu.load(r.starts.at[r.b, r.h, of_values], layout=TILE, optimized=False)
        state = state + initial * jnp.where((piece == 0) & (group < config.value_groups), 1.0, 0.0)
    return state


def _recall(config, r, w, i, first, columns, state, k_s):
    """Sᵀ Kᵀ. Meanwhile the rounded state goes to the output warpgroup, if saved to memory too; and values come."""
    states, values = config.states, config.values
    low = state.astype(config.dtype)

    def multiply(acc):
        product(acc, low, k_s.T, part_of(r.state_stage, w))
        if config.read:
            states.wait_place(r, i)
            if config.save:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            r.states_s.at[states.place(i)][...] = low
            plgpu.commit_smem()
            plgpu.barrier_arrive(states.full(r, i))
        plgpu.barrier_wait(values.full(r, i))
        return plgpu.wgmma_accumulator_load(acc, wait_n=0)

    recalled = lax.optimization_barrier(pl.run_scoped(multiply, plgpu.ACC(SQUARE, F32)))
    if config.save:
        plgpu.copy_smem_to_gmem(r.states_s.at[states.place(i)], r.states.at[r.b, r.h, first + i, columns])
    return recalled


def _hand_over(config, r, i, first, columns, low, solved):
    """Uᵀ to the output warpgroup; what was solved for, which tied is Eᵀ, to device memory if saved."""
    updates = config.updates
    updates.wait_place(r, i)
    place = r.updates_s.at[updates.place(i)]
    place.T[...] = low
    if config.save and config.tied:
        r.solved_s.T[...] = solved
    plgpu.commit_smem()
    if config.fed:  # in a cluster one thread does, for all that have just been waited for
        plgpu.barrier_arrive(config.solves.free(r, i))
    plgpu.barrier_arrive(updates.full(r, i))
    if config.save:
        source = r.solved_s if config.tied else place
        plgpu.copy_smem_to_gmem(source, r.solved.at[r.b, pl.ds((first + i) * CHUNK, CHUNK), r.h, columns])
