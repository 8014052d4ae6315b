"""From piece to piece: the state before every piece of a sequence, of what `summaries` makes of its parts.

Sᵀ ← Sᵀ Mᵀ + Eᵀ over the parts, and for cotangents dSᵀ ← dSᵀ M + dEᵀ from the far end. As neither M of the exact rule
expands (‖M‖ ≤ 1, for any keys), rounding does not grow along the chain.

Parts of one run all lead from the state before the run: their maps and ends are of what the run has walked.

Maps come in one of two forms. I - M, rounded to the type of the kernels: Sᵀ - (Sᵀ rounded) (I - M)ᵀ + Eᵀ keeps S itself
in float32 and rounds only what is recalled of it, once a part, as the scan does once a chunk. M, as the sum of two of
bfloat16: with the state as another such sum, of four products the one of both remainders, 2⁻¹⁶ of the whole, is left
out. A map of zeros then leaves nothing of what was before.
"""

from collections.abc import Callable
from functools import partial, reduce
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.masks import only_if
from pallas_kernels.hopper.mosaic import CHUNK, F32, TILE, Ring, copy_out, launch, lookup, matmul, smem, stage

ROUNDED = jnp.bfloat16


def split(x):
    """x [float32] as the sum of two of bfloat16."""
    high = x.astype(ROUNDED)
    return high, (x - high.astype(F32)).astype(ROUNDED)


def chain(first, maps, ends, wanted, walks=None, leads=None):
    """States before the parts of a row, and behind the last one.

    Args:
        first: [B, H, V, K] float32, Sᵀ before the first part, or None for zeros.
        maps: [B, H, P, K, K] bfloat16 or float16, (I - M)ᵀ of every part; or [B, H, P, 2·K, K] bfloat16, Mᵀ as the sum
            of two, one below the other. Those of the first run are not looked at: its ends have been made of `first`.
        ends: [B, H, P, V, K] float32, Eᵀ.
        wanted: which of the P + 1 states, in order.
        walks: the first part of each run, and P behind them; None where each part is a run.
        leads: [B, P + 1] int32, as `summaries` takes them. States behind parts that were not looked at may be anything,
            as may be what was left of those.

    Returns:
        [B, H, len(wanted), V, K] float32.
    """
    return _run(first, maps, ends, tuple(wanted), leads, walks=walks, backward=False)


def chain_back(last, maps, ends):
    """The cotangents of the states behind all pieces.

    Args:
        last: [B, H, V, K] float32, dSᵀ behind the last piece, or None for zeros.
        maps: [B, H, P or one less, …], as of `chain`. Those of the first and the last piece are not looked at.
        ends: [B, H, P, V, K] float32, dEᵀ, P ≥ 3; that of the last one has been made of `last`.

    Returns:
        [B, H, P, V, K] float32.
    """
    return _run(last, maps, ends, tuple(range(ends.shape[2])), None, backward=True)


def _run(first, maps, ends, wanted, leads, *, walks=None, backward):
    batch, heads, _, value_dim, key_dim = ends.shape
    inputs = dict(maps=maps, ends=ends)
    if first is not None:
        inputs["first_state"] = first
    if leads is not None:
        inputs["leads"] = leads
    ring = Ring.of("steps", 2, 1)
    scratch = dict(
        maps_s=smem((ring.slots, *maps.shape[3:]), maps.dtype),
        ends_s=smem((ring.slots, CHUNK, key_dim), F32),
        starts_s=smem((CHUNK, key_dim), F32),
        steps_full=plgpu.Barrier(num_arrivals=2, num_barriers=ring.turns),
        state_stage=stage(maps.dtype),
    )
    runs = None if walks is None or len(walks) > ends.shape[2] else tuple(walks)  # where some have several parts
    config = SimpleNamespace(
        runs=runs, states=ends.shape[2] + (not backward), key_dim=key_dim, given=first is not None,
        skipping=leads is not None, backward=backward, ring=ring, wanted=wanted, terms=maps.shape[3] // key_dim,
        dtype=maps.dtype, groups=value_dim // 64,
    )  # fmt: skip
    outputs = dict(starts=jax.ShapeDtypeStruct((batch, heads, len(wanted), value_dim, key_dim), F32))
    grid = batch, heads, config.groups * (1 if runs is None else max(1, len(runs) - 2))
    return launch("efla_chain", config, inputs, outputs, scratch, grid, (1, _chain))["starts"]


class _Course(NamedTuple):
    """The states that a block makes, one after the other, numbered by the parts before them.

    at: number of the i-th, i ≥ 1, the first of which is what its part has left.
    leads: how many of them lead on, each to the next; all others are made of the last of these.
    count: of them all.
    """

    at: Callable[[Any], Any]
    leads: Any
    count: Any


def _course(config, r):
    """All states; of a row in runs, those within the block's run and before them what leads there. The first two runs
    are one block's: within the first there is nothing to multiply."""
    if config.runs is None:
        count: Any = config.states - 1
        if config.skipping:  # up to the last that is wanted
            reached = [jnp.where(_lead(config, r, n) < 0, n, 1) for n in range(2, config.states)]
            count = reduce(jnp.maximum, reached, r.first + 1)
        return _Course(lambda i: i, count, count)
    walks, run = (*config.runs, config.runs[-1]), 1 + lax.div(r.c, jnp.int32(config.groups))
    first, end = lookup(walks, run), lookup(walks[1:], run)
    leads = jnp.where(run == 1, walks[1], run)
    leading = lambda i: jnp.where(run == 1, i, lookup(walks, i))
    return _Course(lambda i: jnp.where(i <= leads, leading(i), first + i - leads), leads, leads + end - first)


def _chain(config, r, _):
    """64 columns of the state, over the parts of the block's course."""
    columns = pl.ds(lax.rem(r.c, jnp.int32(config.groups)) * 64, 64)
    ring, last = config.ring, config.states - 1
    places = [config.wanted.index(n) if n in config.wanted else -1 for n in range(config.states)]
    piece = lambda n: last - n if config.backward else n + r.first
    course, own = _course(config, r), r.c < config.groups  # whether what leads on is the block's to store

    def load(i):
        """Sends for the part before the course's i-th state, i ≥ 2."""
        slot, full, n = ring.place(i - 2), ring.full(r, i - 2), course.at(i)
        lead, part = _lead(config, r, n), piece(n - 1)
        copy_maps = lambda: plgpu.copy_gmem_to_smem(r.maps.at[r.b, r.h, part], r.maps_s.at[slot], full)

        @pl.when(lead < 0)
        def _():
            plgpu.copy_gmem_to_smem(r.ends.at[r.b, r.h, part, columns], r.ends_s.at[slot], full)
            pl.when(lead == -1)(copy_maps)
            pl.when(lead < -1)(lambda: plgpu.barrier_arrive(full))

    def store(n, state):
        place = lookup(places, piece(n))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        r.starts_s[...] = state
        plgpu.commit_smem()
        copy_out(r.starts_s, r.starts.at[r.b, r.h, jnp.maximum(place, 0), columns], place >= 0)

    def step(i, before, *, stored):
        """The course's i-th state, of the one before it or before the run."""
        lead = _lead(config, r, course.at(i))
        state = only_if(lead < 0, lambda state: _advanced(config, r, i - 2, lead, state), before)
        pl.when(stored)(lambda: store(course.at(i), state))
        pl.when(jnp.logical_not(stored))(plgpu.commit_smem)  # what read the place is done before the copy, either way
        pl.when(i + ring.slots <= course.count)(lambda: load(i + ring.slots))
        return state

    def walk():
        n = course.at(r.first + 1)
        state = plgpu.load(r.ends.at[r.b, r.h, piece(n - 1), columns], layout=TILE, optimized=False)
        pl.when(own)(lambda: store(n, state))
        state = lax.fori_loop(2, course.leads + 1, partial(step, stored=own), state)
        if config.runs is not None:
            within = lambda i, state: (step(i, state, stored=True), state)[1]
            lax.fori_loop(course.leads + 1, course.count + 1, within, state)

    for i in range(2, min(ring.slots, last - 1) + 2):
        pl.when(i <= course.count)(lambda i=i: load(i + r.first))

    @pl.when(own)
    def _():
        if config.given:
            store(r.first, plgpu.load(r.first_state.at[r.b, r.h, columns], layout=TILE, optimized=False))
        elif not config.skipping:
            store(r.first, plgpu.layout_cast(jnp.zeros((64, config.key_dim), F32), TILE))

    pl.when((course.count > 1) | (_lead(config, r, 1) < 0))(walk)
    plgpu.wait_smem_to_gmem(0)


def _lead(config, r, n):
    """Of the state behind n parts, as `chain` takes them; there is no map of a part of the first run."""
    if config.skipping:
        return r.leads[r.b, n]
    if config.runs:
        return jnp.where(n <= config.runs[1], -2, -1)
    return jnp.int32(-1)


def _advanced(config, r, i, behind, state):
    """What the part in the i-th place makes of the state. behind: its lead; below -1 no state gets through."""
    staged = None if r.state_stage is None else r.state_stage.at[0]
    plgpu.barrier_wait(config.ring.full(r, i))
    slot = config.ring.place(i)
    end = plgpu.load(r.ends_s.at[slot], layout=TILE)
    maps = [r.maps_s.at[slot, pl.ds(part * config.key_dim, config.key_dim)] for part in range(config.terms)]
    maps = [x.T for x in maps] if config.backward else maps

    def through(state):
        if config.terms == 1:
            # added up outside of the tensor cores, which truncate what is small beside the sum
            return state + (end - matmul(state.astype(config.dtype), maps[0], state.shape, staged=staged))
        high, low = split(state)
        return matmul([high, high, low], [maps[0], maps[1], maps[0]], state.shape, init=end, staged=staged)

    partly = config.skipping or (config.runs and config.runs[1] > 1)
    return lax.cond(behind == -1, through, lambda _: end, state) if partly else through(state)
