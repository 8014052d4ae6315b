"""From piece to piece: the state before every piece of a sequence, of what `summaries` makes of its parts.

Sᵀ ← Sᵀ Mᵀ + Eᵀ over the parts, and for cotangents dSᵀ ← dSᵀ M + dEᵀ from the far end. As neither M of the exact rule
expands (‖M‖ ≤ 1, for any keys), rounding does not grow along the chain.

Parts of one run all lead from the state before the run: their maps and ends are of what the run has walked.

A block of threads has 64 columns of the state, and each of its warpgroups 64 of its rows; rounded, as what the tensor
cores multiply, they go through shared memory.

Maps come in one of two forms. I - M, rounded to the type of the kernels: Sᵀ - (Sᵀ rounded) (I - M)ᵀ + Eᵀ keeps S itself
in float32 and rounds only what is recalled of it, once a part, as the scan does once a chunk. M, as the sum of two of
bfloat16: with the state as another such sum, of four products the one of both remainders, 2⁻¹⁶ of the whole, is left
out. A map of zeros then leaves nothing of what was before.
"""

from functools import reduce
from types import SimpleNamespace
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.masks import only_if
from pallas_kernels.hopper.mosaic import F32, SQUARE, TILE, Ring, copy_out, launch, lookup, matmul, modulo, smem, stage

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
    batch, heads, parts, value_dim, key_dim = ends.shape
    inputs = dict(maps=maps, ends=ends)
    if first is not None:
        inputs["first_state"] = first
    if leads is not None:
        inputs["leads"] = leads
    writers, terms = key_dim // 64, maps.shape[3] // key_dim
    ring = Ring.of("maps", 2, 1)
    scratch = dict(
        maps_s=smem((writers, ring.slots, terms, writers, *SQUARE), maps.dtype),
        maps_full=plgpu.Barrier(num_arrivals=terms * writers, num_barriers=writers * ring.turns),
        low_s=smem((2, terms, writers, *SQUARE), maps.dtype),
        low_full=plgpu.Barrier(num_arrivals=writers),
        starts_s=smem((writers, *SQUARE), F32),
        state_stage=stage(maps.dtype),
    )
    runs = None if walks is None or len(walks) > parts else tuple(walks)  # where some have several parts
    config = SimpleNamespace(
        runs=runs, states=parts + (not backward), writers=writers, given=first is not None, skipping=leads is not None,
        backward=backward, ring=ring, wanted=wanted, terms=terms, dtype=maps.dtype,
    )  # fmt: skip
    outputs = dict(starts=jax.ShapeDtypeStruct((batch, heads, len(wanted), value_dim, key_dim), F32))
    grid = batch, heads, value_dim // 64
    return launch("efla_chain", config, inputs, outputs, scratch, grid, (writers, _chain))["starts"]


def _chain(config, r, w):
    """64 rows and columns of the state, over all parts."""
    here = pl.ds(r.c * 64, 64), pl.ds(w * 64, 64)  # of Sᵀ
    ring, last = config.ring, config.states - 1
    places = [config.wanted.index(n) if n in config.wanted else -1 for n in range(config.states)]
    piece = lambda i: last - i if config.backward else i + r.first
    lead = lambda n: _lead(config, r, n)
    steps: Any = last - 1
    if config.skipping:  # up to the last state that is wanted
        steps = reduce(jnp.maximum, [jnp.where(lead(n) < 0, n - 1, 0) for n in range(2, config.states)], r.first)

    def load(i):
        copy = lambda: _load(config, r, w, i, r.maps.at[r.b, r.h, piece(i + 1)])
        pl.when(i < steps)(lambda: pl.when(lead(i + 2) == -1)(copy))

    def end(i):
        part = piece(jnp.minimum(i, last - 1))
        return plgpu.load(r.ends.at[r.b, r.h, part, *here], layout=TILE, optimized=False)

    def put(i, state):
        """The i-th state where it is sent from; what is written until `send` goes with it."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        r.starts_s.at[w][...] = state

    def send(i):
        place = lookup(places, piece(i))
        plgpu.commit_smem()
        copy_out(r.starts_s.at[w], r.starts.at[r.b, r.h, jnp.maximum(place, 0), *here], place >= 0)

    def step(i, carry):
        *states, made = carry
        behind, before = lead(i + 2), states[0]
        if config.runs:
            begins = lookup([part in config.runs for part in range(last)], i + 1) != 0
            before = only_if(begins, lambda _: states[1], before)
        put(i + 1, states[-1])
        _put_low(config, r, w, i, before)
        send(i + 1)
        plgpu.barrier_arrive(r.low_full)
        # A fence waits for all loads: this one has the rest of the step.
        coming = end(i + 2)
        plgpu.barrier_wait(r.low_full)
        state = only_if(behind < 0, lambda state: _advanced(config, r, w, i, behind, state, made), before)
        load(i + ring.slots)
        return (before, state, coming) if config.runs else (state, coming)

    def store(i, state):
        put(i, state)
        send(i)

    def walk():
        state = end(r.first)
        states = (state, state) if config.runs else (state,)
        *_, state, _ = lax.fori_loop(0, steps, step, (*states, end(r.first + 1)))
        store(steps + 1 + r.first, state)

    for i in range(min(ring.slots, last - 1)):
        load(i + r.first)
    if config.given:
        store(r.first, plgpu.load(r.first_state.at[r.b, r.h, *here], layout=TILE, optimized=False))
    elif not config.skipping:
        store(r.first, plgpu.layout_cast(jnp.zeros(SQUARE, F32), TILE))
    pl.when((steps > 0) | (lead(1) < 0))(walk)
    plgpu.wait_smem_to_gmem(0)


def _load(config, r, w, i, maps):
    """Sends for what the warpgroup multiplies by in step i: of the map, or backward of its transpose, 64 columns."""
    for term in range(config.terms):
        for part in range(config.writers):
            rows, columns = (w, part) if config.backward else (part, w)
            source = maps.at[pl.ds((term * config.writers + rows) * 64, 64), pl.ds(columns * 64, 64)]
            slot = config.ring.place(i)
            plgpu.copy_gmem_to_smem(source, r.maps_s.at[w, slot, term, part], _full(config, r, w, i))


def _full(config, r, w, i):
    return r.maps_full.at[w * config.ring.turns + config.ring.place(i)]


def _lead(config, r, n):
    """Of what is behind part n - 1, as `chain` takes them; there is no map of a part of the first run."""
    if config.skipping:
        return r.leads[r.b, n]
    if config.runs:
        return jnp.where((n > 1) & (n <= config.runs[1]), -2, -1)
    return jnp.int32(-1)


def _advanced(config, r, w, i, behind, state, end):
    """The state behind part i + 1. behind: its lead; below -1 nothing of the state gets through the part."""
    partly = config.skipping or (config.runs and config.runs[1] > 1)
    through = lambda state: _through(config, r, w, i, state, end)
    return lax.cond(behind == -1, through, lambda _: end, state) if partly else through(state)


def _put_low(config, r, w, i, state):
    """What of the state is multiplied in step i, to where both warpgroups read it; they may still read that of the step
    before."""
    for term, low in enumerate(split(state) if config.terms > 1 else [state]):
        r.low_s.at[modulo(i, 2), r.first + term, w][...] = low.astype(config.dtype)


def _through(config, r, w, i, state, end):
    """What the map of step i and its end make of the state."""
    plgpu.barrier_wait(_full(config, r, w, i))
    pairs = ((0, 0), (0, 1), (1, 0)) if config.terms > 1 else ((0, 0),)
    tile = lambda ref, term, part: ref.at[r.first + term, r.first + part]
    of_map = lambda tile: tile.T if config.backward else tile
    maps_s = r.maps_s.at[w, config.ring.place(i)]
    terms = [(*pair, part) for pair in pairs for part in range(config.writers)]
    operands = [tile(r.low_s.at[modulo(i, 2)], term, part) for term, _, part in terms]
    maps = [of_map(tile(maps_s, term, part)) for _, term, part in terms]
    if config.terms > 1:
        staged = None if r.state_stage is None else r.state_stage.at[0]
        return matmul(operands, maps, SQUARE, init=end, staged=staged)
    # added up outside of the tensor cores, which truncate what is small beside the sum
    return state + (end - matmul(operands, maps, SQUARE))
