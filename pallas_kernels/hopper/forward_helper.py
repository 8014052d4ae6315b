"""The helper warpgroups of `pallas_kernels.hopper.forward`: what the state warpgroups read, made and sent for ahead."""

from functools import partial
from types import SimpleNamespace

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.inverse import fresh, gain_of, write_inverse
from pallas_kernels.hopper.masks import crossed, document_rows, weighed
from pallas_kernels.hopper.mosaic import (
    CHUNK,
    COLS,
    ROWS,
    SQUARE,
    TILE,
    copy_in,
    iota,
    matmul,
    part_of,
    per_column,
    per_row,
    place,
    recycle,
    set_registers,
    write_numbers,
)
from pallas_kernels.hopper.scan_state import piece_of
from pallas_kernels.hopper.warps import put_rows

LOADER_REGISTERS = 24


def chunks_of(config, r):
    """The first of the chunks that the block walks, and how many: all of the row, or those of its piece and before."""
    if config.pieces == 1 and not config.mixing:
        return 0, config.chunks
    _, first, count = piece_of(config, r)
    if config.mixing:
        lead = jnp.maximum(r.lead, 0)
        return first - lead, count + lead
    return first, count if config.chunks % config.share else config.share


def _loads(config, r):
    """(ring, function of n that sends for what of chunk n goes through it), in the order in which places get free."""
    head = lax.div(r.h, config.group)
    keys, queries, values = config.keys, config.queries, config.values
    first, _ = chunks_of(config, r)
    rows_of = lambda n: pl.ds((first + n) * CHUNK, CHUNK)

    def load_keys(n):
        rows, slot, bar = rows_of(n), keys.place(n), keys.full(r, n)
        plgpu.copy_gmem_to_smem(r.key.at[r.b, rows, head], r.k_s.at[slot], bar)
        for name in ("left_s", "right_s", "sums_r", "sums_c"):
            target = getattr(r, name)
            if target is not None:
                source = getattr(r, name[:-1] + "v")
                plgpu.copy_gmem_to_smem(source.at[r.b, r.h, rows], target.at[slot], bar)
        if config.masked:
            for target in (r.documents_c,) if config.ahead else (r.documents_r, r.documents_c):
                plgpu.copy_gmem_to_smem(r.documents.at[r.b, rows], target.at[slot], bar)

    def load_queries(n):
        plgpu.copy_gmem_to_smem(r.query.at[r.b, rows_of(n), head], r.q_s.at[queries.place(n)], queries.full(r, n))

    def load_values(n):
        for w in range(config.writers):
            send_for_values(config, r, n, w)

    return (values, load_values), (queries, load_queries), (keys, load_keys)


def send_for_values(config, r, n, w, wanted=None):
    """Sends for what of the values of chunk n is state warpgroup w's; their barrier is told too if it is not wanted."""
    first, _ = chunks_of(config, r)
    rows, columns = pl.ds((first + n) * CHUNK, CHUNK), pl.ds((r.rank * config.writers + w) * 64, 64)
    target = r.v_s.at[config.values.place(n), w]
    copy_in(r.value.at[r.b, rows, r.h, columns], target, config.values.full(r, n), wanted)


def _begin(config, r):
    """What all read, and then the first copies, for which all wait."""
    write_numbers(r)
    if config.halving:
        for w in range(config.writers):
            mask = jnp.where(iota(0, 32) <= iota(1, 32) + 32 * w, 1.0, 0.0)
            r.causal_s.at[r.first, w][...] = mask.astype(config.dtype)
    elif r.causal_s is not None:
        r.causal_s[...] = jnp.where(iota(0) >= iota(1), 1.0, 0.0).astype(config.dtype)
    plgpu.commit_smem()
    _, count = chunks_of(config, r)
    for n in range(min(config.keys.slots, config.chunks)):
        for ring, load in _loads(config, r)[::-1]:
            if n < ring.slots - (config.ahead and ring is config.values):  # of which state warpgroups send for the next
                pl.when(count > n)(lambda load=load, n=n: load(r.first + n))


def _recycle(config, r, n):
    """As `recycle`, of places all of which are free at a time."""
    plgpu.barrier_wait(config.keys.free(r, n))
    plgpu.commit_smem()  # what read the place is done before the copy, which is another proxy, writes it
    _send_on(config, r, n)


def _send_on(config, r, n):
    """Sends for what has the places of chunk n next, which are free; but for values, if state warpgroups do."""
    _, count = chunks_of(config, r)
    for ring, load in _loads(config, r)[config.ahead :]:
        pl.when(n + ring.slots < count)(lambda ring=ring, load=load: load(n + ring.slots))


def loader(config, r, _):
    """A warpgroup that only sends for what its block reads, for all chunks in their order."""
    _begin(config, r)
    set_registers(LOADER_REGISTERS, config.warpgroups)
    loads = _loads(config, r)
    _, count = chunks_of(config, r)

    lax.fori_loop(0, count, lambda n, _: recycle(r, loads, n, count), None)


def helper(config, r, i):
    """A helper warpgroup: the inverse and the scores of every so manyth chunk, ahead of the state; copies, if alone."""
    set_registers(config.helper_registers, config.warpgroups)
    own = {name: part_of(getattr(r, name), i) for name in config.own}
    r = SimpleNamespace(**r.__dict__ | own)
    keys, products = config.keys, config.products
    stream = i * (config.streams // config.helpers) + (r.rank if config.shared else 0)
    if not config.fed:
        pl.when(i == 0)(lambda: _begin(config, r))

    first, count = chunks_of(config, r)
    tokens = lambda n: pl.ds((first + n) * CHUNK, CHUNK)
    next_gain = lambda n: gain_of(r, first + jnp.minimum(n, count - 1))

    def step(turn, gain):
        n = turn * config.streams + stream
        coming = next_gain(n + config.streams)
        r.document_rows = lambda: plgpu.load(r.documents.at[r.b, tokens(n)], layout=ROWS, optimized=False)
        plgpu.barrier_wait(keys.full(r, n))
        (_ahead if config.ahead else _in_turn)(config, r, lambda: n + fresh(r), gain)
        plgpu.commit_smem()
        plgpu.barrier_arrive(products.full(r, n + fresh(r)))
        if config.ahead:
            last = n + fresh(r) - config.helpers
            pl.when(last >= 0)(lambda: _send_on(config, r, last))
        return coming

    turns = lax.div(count - 1 - stream + config.streams, jnp.int32(config.streams))
    lax.fori_loop(0, turns, step, next_gain(stream))
    if config.shared:
        return
    if not config.fed:
        last = lambda: fresh(r) + (turns - 1) * config.helpers + i
        pl.when(turns > 0)(lambda: _recycle(config, r, last()))
        plgpu.wait_smem_to_gmem(0)
        return
    for before in range(products.slots // config.helpers)[::-1]:

        @pl.when(turns > before)
        def _(before=before):
            plgpu.barrier_wait(products.free(r, fresh(r) + (turns - 1 - before) * config.helpers + i))

    plgpu.wait_smem_to_gmem(0)


def _in_turn(config, r, n, gain):
    """What is made of chunk n(), each part written as soon as it is made; which is when its place is free."""

    def midway():
        if not config.fed:  # products have as many places as there are helpers, or more: they have one free then
            at = n()
            pl.when(at >= config.helpers)(lambda: _recycle(config, r, at - config.helpers))

    write_inverse(config, r, config.keys.place(n()), gain, partial(_put, config, r, n), midway)
    if not config.halving and r.scores_s is not None:  # else others make them
        _put(config, r, n, "scores_s", _scores(config, r, n()))
    if config.mixing:
        _part_documents(config, r, n())
    if config.save:  # one of the blocks of a head does
        pl.when(r.rank == 0)(lambda: _save(config, r, n()))


def _ahead(config, r, n, gain):
    """The inverse of chunk n(), made before there is a place for it."""
    made = {}
    keep = lambda name, value: made.update({name: lax.optimization_barrier(value)})
    write_inverse(config, r, config.keys.place(n()), gain, keep, lambda: None)
    at = n()
    pl.when(at >= config.helpers)(lambda: plgpu.barrier_wait(config.keys.free(r, at - config.helpers)))
    put_rows(r.erase_s.at[config.products.place(n())], made["erase_s"])
    _put(config, r, n, "solve_s", made["solve_s"])
    if config.mixing:
        _part_documents(config, r, n())


def _scores(config, r, n):
    """P of chunk n, rounded."""
    slot = config.keys.place(n)
    plgpu.barrier_wait(config.queries.full(r, n))
    scores = matmul(r.q_s.at[config.queries.place(n)], r.k_s.at[slot].T, SQUARE)
    if config.scale != 1:
        scores = scores * config.scale
    scores = weighed(config, r, slot, scores)
    if config.decayed:  # masked by then
        scores = scores.astype(config.dtype)
    elif r.causal_s is not None:
        # a product of two numbers at once is cheaper than a choice
        scores = scores.astype(config.dtype) * plgpu.load(r.causal_s.at[pl.ds(fresh(r) * CHUNK, CHUNK)], layout=TILE)
    else:
        row, column = place(r)
        scores = lax.optimization_barrier(jnp.where(row >= column, scores, 0.0)).astype(config.dtype)
    return scores


def _part_documents(config, r, n):
    """What the state warpgroups need to know of documents that begin in chunk n."""
    slot = config.keys.place(n)

    @pl.when(crossed(r, slot))
    def _():
        numbers, made = document_rows(r, slot), config.products.place(n)
        r.last_s.at[made][...] = jnp.where(numbers == r.documents_c[slot, CHUNK - 1], 1.0, 0.0)
        r.seen_s.at[made][...] = jnp.where(numbers == 0, 1.0, 0.0)
        if config.ahead:
            columns = plgpu.load(r.documents_c.at[slot], layout=COLS)
            for w in range(config.writers):
                row, column = (x + 32 * w * axis for axis, x in enumerate(place(r, 32)))
                same = per_row(numbers, (CHUNK, 32)) == per_column(columns[32 * w : 32 * w + 32], (CHUNK, 32))
                r.causal_s.at[1 + made, w][...] = jnp.where((row <= column) & same, 1.0, 0.0).astype(config.dtype)


def _put(config, r, n, name, value):
    """What a helper made of chunk n() to where the state warpgroups read it, those of the cluster's other block too."""
    place = lambda: getattr(r, name).at[config.products.place(n())]
    if config.fed:
        config.products.wait_place(r, n())
    if config.shared:
        full = config.products.full(r, n())
        plgpu.async_store_smem(value, place(), full, cluster_idx=1 - r.rank, cluster_dim="c")
    place()[...] = value


def _save(config, r, n):
    """The inverse and the numbers for the backward pass, to device memory."""
    made, chunk = config.products.place(n), chunks_of(config, r)[0] + n
    plgpu.commit_smem()
    source = r.inverse_s if config.tied else r.solve_s.at[made]
    plgpu.copy_smem_to_gmem(source, r.inverse.at[r.b, r.h, chunk], commit_group=False)
    if config.exact:
        tokens = r.b, r.h, pl.ds(chunk * CHUNK, CHUNK)
        plgpu.copy_smem_to_gmem(r.erase_s.at[made], r.erase.at[tokens], commit_group=False)
        plgpu.copy_smem_to_gmem(r.square_s, r.square.at[tokens], commit_group=False)
    plgpu.commit_smem_to_gmem_group()
