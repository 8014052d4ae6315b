"""The state warpgroups of `pallas_kernels.hopper.scan`: only what the next chunk waits for."""

from types import SimpleNamespace

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.mosaic import CHUNK, COLS, F32, SQUARE, TILE, matmul, part_of, per_column, product
from pallas_kernels.hopper.warps import put_transposed


def in_piece(role):
    """role, of a grid with a block for each piece of a head: a head in r.h, its piece in r.piece, the chunks before it
    that `forward` walks too in r.lead, and in r.c what `piece_of` takes, the columns of each piece in turn."""

    def run(config, r, w):
        pieces = jnp.int32(config.pieces)
        piece = lax.rem(r.h, pieces)
        at = dict(h=lax.div(r.h, pieces), c=piece * config.blocks + r.rank, piece=piece)
        at |= dict(lead=r.leads[r.b, piece]) if config.mixing else {}
        role(config, SimpleNamespace(**r.__dict__ | at), w)

    return run


def piece_of(config, r):
    """Number of the block's piece, its first chunk and how many it has."""
    piece = lax.div(r.c, jnp.int32(config.blocks))
    first = piece * config.share
    return piece, first, jnp.minimum(config.share, config.chunks - first)


def state_warpgroup(config, r, w):
    """A state warpgroup: 64 columns of the state, over the chunks of a piece."""
    piece, first, count = piece_of(config, r)
    columns = pl.ds(columns_of(config, r) * 64, 64)
    if config.given:
        state = plgpu.load(r.starts.at[r.b, r.h, piece, columns], layout=TILE, optimized=False)
    else:
        state = plgpu.layout_cast(jnp.zeros((64, config.key_dim), F32), TILE)
    state = lax.fori_loop(0, count, lambda i, state: follow(config, r, w, i, first, columns, state), state)
    config.states.wait_last(r, count)
    config.updates.wait_last(r, count)

    @pl.when(piece == config.pieces - 1)
    def _():
        put_transposed(r.final.at[r.b, r.h, :, columns], state)

    plgpu.wait_smem_to_gmem(0)


def skipped(lead, chunks):
    """How many of a part's first chunks are not looked at, by the lead of what is behind it (see `summaries`)."""
    return jnp.where(lead < 0, -1 - lead, chunks)


def columns_of(config, r):
    """Which 64 columns of the state the block has."""
    return lax.rem(r.c, jnp.int32(config.blocks))


def follow(config, r, w, i, first, columns, state):
    """The state after the i-th chunk that the block looks at, of that before it; both transposed, float32, [64, K].

    first, columns: where to save what is kept of the chunk, of the pieces of a scan.
    """
    keys, values = config.keys, config.values
    staged = part_of(r.state_stage, w)
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

    state = matmul(late, k_s, state.shape, init=state, staged=staged, meanwhile=hand_over)
    plgpu.barrier_arrive(keys.free(r, i))
    return state


def _recall(config, r, w, i, first, columns, state, k_s):
    """Sᵀ Kᵀ. Meanwhile the rounded state goes to the output warpgroup, if saved to memory too; and values come."""
    low = state.astype(config.dtype)

    def multiply(acc):
        product(acc, low, k_s.T, part_of(r.state_stage, w))
        if config.read:
            config.states.wait_place(r, i)
            if config.save:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            r.states_s.at[config.states.place(i)][...] = low
            plgpu.commit_smem()
            plgpu.barrier_arrive(config.states.full(r, i))
        plgpu.barrier_wait(config.values.full(r, i))
        return plgpu.wgmma_accumulator_load(acc, wait_n=0)

    recalled = lax.optimization_barrier(pl.run_scoped(multiply, plgpu.ACC(SQUARE, F32)))
    if config.save:
        plgpu.copy_smem_to_gmem(r.states_s.at[config.states.place(i)], r.states.at[r.b, r.h, first + i, columns])
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
