"""What parts of a row do to the state, so that all pieces of it can begin at a time.

Over a part the state goes through an affine map, S ↦ M S + E: E is what the scan leaves of a zero state, I - M what it
leaves of a zero state and the keys as values. So both are walked alike, by state warpgroups as those of
`pallas_kernels.hopper.scan`, of 64 columns each; a helper sends for what they read. A block of threads walks
through the parts of a run, and leaves what it has after each, as `pieces.Parts` has them.

Where little is forgotten M is next to the identity, beside which a tensor core, which truncates, loses of what is.
With decay, or documents, which must stay apart exactly, it is M itself that is walked, from the identity and without
values.
"""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.chain import ROUNDED, split
from pallas_kernels.hopper.mosaic import (
    CHUNK,
    F32,
    SQUARE,
    TILE,
    Ring,
    check_registers,
    launch,
    lookup,
    recycle,
    set_registers,
    smem,
    stage,
    store,
)
from pallas_kernels.hopper.scan_state import follow, skipped

REGISTERS = dict(state=224, helper=56)  # of a thread. A launch gives three warpgroups 168 each, two 256.


def summaries(key, value, solve, vectors, initial, *, tied, parts, leads=None):
    """Of every part, what its run makes up to its end of a zero state (the first run: of the initial state); its map.

    Args:
        key, value, solve, vectors: as `scan` takes them; of solve only what parts cover is looked at; vectors may be
            [B, 1, N·64], the same for all heads.
        initial: [B, H, V, K] float32 or None for zeros.
        parts: `pieces.Parts`.
        leads: [B, P + 1] int32 or None. What is behind a part has -1 - n: the part is looked at from its chunk n on, in
            which a document begins if n > 0; or n ≥ 0: it is not, and nothing is left of it.

    Returns:
        ends [B, H, P, V, K] float32, Eᵀ; maps as `chain` takes them, but for those of the first run's parts.
    """
    batch, _, heads, value_dim = value.shape
    key_heads, key_dim = key.shape[2:]
    count, dtype, decayed = len(parts.bounds) - 1, value.dtype, "left" in vectors
    inputs = dict(key=key, value=value, solve=solve)
    inputs |= {f"{name}_v": x for name, x in vectors.items() if name != "sums"}
    inputs |= {name: x for name, x in dict(leads=leads, starts=initial).items() if x is not None}
    outputs = dict(
        ends=jax.ShapeDtypeStruct((batch, heads, count, value_dim, key_dim), F32),
        maps=jax.ShapeDtypeStruct(
            (batch, heads, count, (1 + decayed) * key_dim, key_dim), ROUNDED if decayed else dtype
        ),
    )
    writers = 1 + (value_dim == key_dim)
    keys, values = Ring.of("keys", 4, 1), Ring.of("values", 4, 1)
    numbers = [name for name in ("erase", "left", "right") if name in vectors]  # by token
    scratch = dict.fromkeys(("erase_s", "left_s", "right_s")) | dict(
        k_s=smem((keys.slots, CHUNK, key_dim), dtype),
        v_s=smem((values.slots, writers, *SQUARE), dtype),
        solve_s=smem((values.slots, *SQUARE), dtype),
        **{f"{name}_s": plgpu.SMEM((values.slots, CHUNK), F32) for name in numbers},
        state_stage=stage(dtype, writers),
        **keys.barriers(1, writers),
        **values.barriers(writers + 1 + len(numbers), writers),
    )
    of_values = -(-value_dim // 64 // writers)  # blocks of a walk that have columns of values
    of_maps = (value_dim + key_dim) // 64 // writers - of_values
    walks = len(parts.walks) - 1 - parts.twice
    config = SimpleNamespace(
        parts=parts, walks=walks, of_values=of_values, of_maps=of_maps, group=heads // key_heads, key_dim=key_dim,
        value_groups=value_dim // 64, writers=writers, read=False, tied=tied, dtype=dtype, save=False, fed=False,
        shared=False, folded="erase" not in vectors, decayed=decayed, numbers=numbers, skipping=leads is not None,
        given=initial is not None, keys=keys, values=values, solves=values,
    )  # fmt: skip
    check_registers((writers, REGISTERS["state"]), (1, REGISTERS["helper"]))
    blocks = walks * of_values + (walks - 1) * of_maps + parts.twice  # the first run's map leads nowhere
    if parts.twice and (decayed or not of_values == of_maps == 1):
        raise ValueError("a run is walked twice where K = V = 128, and nothing decays: else maps have no values")
    if leads is not None and len(parts.walks) < len(parts.bounds):
        raise ValueError("with leads every part is a run of its own")
    grid = batch, heads, blocks
    return launch("efla_summaries", config, inputs, outputs, scratch, grid, (writers, _state), (1, _helper))


def _block(config, r):
    """Number of the block's walk, and its first 64 columns: those of values, behind them those of maps."""
    values, maps = (jnp.int32(max(1, count)) for count in (config.of_values, config.of_maps))
    beyond = r.c - config.walks * config.of_values
    walk = jnp.where(beyond < 0, lax.div(r.c, values), 1 + lax.div(beyond, maps))
    block = jnp.where(beyond < 0, lax.rem(r.c, values), config.of_values + lax.rem(beyond, maps))
    return walk, block * config.writers


class _Walk(NamedTuple):
    """What a block of threads walks.

    part, end: the run's first part, and the first behind it.
    first, count: its first chunk looked at, and how many.
    groups: the first 64 columns, of the first time and of the second.
    times: how often it is walked.
    """

    part: jax.Array
    end: jax.Array
    first: jax.Array
    count: jax.Array
    groups: tuple[jax.Array, jax.Array]
    times: jax.Array

    def group(self, time):
        return jnp.where(time == 0, *self.groups)


def _walk(config, r):
    bounds, walks, run_twice = config.parts
    walk, group = _block(config, r)
    next_group, times = group, jnp.int32(1)
    if run_twice:  # the last one by the last block, first with its values and then as its map
        twice = r.c == config.walks * config.of_values + (config.walks - 1) * config.of_maps
        walk, group = jnp.where(twice, config.walks, walk), jnp.where(twice, 0, group)
        next_group, times = jnp.int32(config.value_groups), jnp.where(twice, 2, 1)
    part, end = lookup(walks, walk), lookup(walks[1:], walk)
    first, stop = lookup(bounds, part), lookup(bounds, end)
    if config.skipping:
        first = first + skipped(_lead(config, r, part), stop - first)
        if config.of_maps:  # of blocks of their own. No map: none of its chunks
            first = jnp.where(_no_map(config, r, part), stop, first)
    return _Walk(part, end, first, jnp.maximum(stop - first, 0), (group, next_group), times)


def _lead(config, r, part):
    """Of what is behind a part, as `summaries` takes it; for the part behind a block's last one too."""
    return r.leads[r.b, jnp.minimum(part, len(config.parts.bounds) - 2) + 1] if config.skipping else jnp.int32(-1)


def _no_map(config, r, part):
    """Whether the block has a map to make, and a document begins in the part, which leaves zeros of what was before."""
    return (r.c >= config.walks * config.of_values) & (_lead(config, r, part) < -1)


def _state(config, r, w):
    """A state warpgroup: 64 columns of E or M, after each part of a run."""
    set_registers(REGISTERS["state"], config.writers + 1)
    walk = _walk(config, r)
    bound = lambda part: jnp.maximum(lookup(config.parts.bounds, part), walk.first)

    def one_time(time, carry):
        columns = w + walk.group(time)
        before = time * walk.count - walk.first
        step = lambda i, state: follow(config, r, w, i, None, None, state)

        def walk_part(part, state):
            state = lax.fori_loop(before + bound(part), before + bound(part + 1), step, state)
            _leave(config, r, part, columns, state)
            return state

        lax.fori_loop(walk.part, walk.end, walk_part, _start(config, r, walk.part, columns))
        return carry

    pl.when(_lead(config, r, walk.part) < 0)(lambda: lax.fori_loop(0, walk.times, one_time, None))


def _start(config, r, part, group):
    """What the part is walked from, transposed: zeros or the identity; the first part from what is before the row."""
    shape = 64, config.key_dim
    number = lambda axis: plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)
    if config.decayed:
        one = jnp.where(_no_map(config, r, part), 0.0, 1.0) if config.of_maps else 1.0
        state = jnp.where(number(1) == number(0) + (group - config.value_groups) * 64, one, 0.0)
    else:
        state = plgpu.layout_cast(jnp.zeros(shape, F32), TILE)
    if config.given:
        columns = pl.ds(jnp.minimum(group, config.value_groups - 1) * 64, 64)
        initial = plgpu.load(r.starts.at[r.b, r.h, columns], layout=TILE, optimized=False)
        state = state + initial * jnp.where((part == 0) & (group < config.value_groups), 1.0, 0.0)
    return state


def _leave(config, r, part, group, state):
    """What the part has made, to device memory."""

    @pl.when(group < config.value_groups)
    def _():
        r.ends.at[r.b, r.h, part, pl.ds(group * 64, 64)][...] = state

    @pl.when(group >= config.value_groups)
    def _():
        for term, rounded in enumerate(split(state) if config.decayed else [state.astype(config.dtype)]):
            rows = pl.ds(term * config.key_dim + (group - config.value_groups) * 64, 64)
            store(r.maps.at[r.b, r.h, part, rows], rounded)


def _helper(config, r, _):
    """Sends for what is read, in the order in which places get free."""
    set_registers(REGISTERS["helper"], config.writers + 1)
    walk = _walk(config, r)
    count = walk.times * walk.count
    loads = _loads(config, r)
    if config.decayed:
        pl.when(count > 0)(lambda: _empty_values(config, r))
    for i in range(config.keys.slots):
        for _, load in loads:
            pl.when(count > i)(lambda i=i, load=load: load(0 * count + i))

    lax.fori_loop(0, count, lambda i, _: recycle(r, loads, i, count), None)


def _empty_values(config, r):
    """Where maps have no values: zeros, which stay."""
    nothing = plgpu.layout_cast(jnp.zeros(SQUARE, config.dtype), TILE)
    for w in range(config.writers):

        @pl.when(_block(config, r)[1] + w >= config.value_groups)
        def _(w=w):
            for slot in range(config.values.slots):
                r.v_s.at[slot + r.first, w][...] = nothing

    plgpu.commit_smem()


def _loads(config, r):
    """(ring, function of i that sends for what of the i-th chunk goes through it), the first to get free first."""
    head = lax.div(r.h, config.group)
    walk = _walk(config, r)
    keys, values = config.keys, config.values

    def chunk(i):
        return walk.first + i - jnp.where(i < walk.count, 0, walk.count)

    def load_keys(i):
        rows = pl.ds(chunk(i) * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(r.key.at[r.b, rows, head], r.k_s.at[keys.place(i)], keys.full(r, i))

    def load_values(i):
        n, slot, full = chunk(i), values.place(i), values.full(r, i)
        rows = pl.ds(n * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(r.solve.at[r.b, r.h, n], r.solve_s.at[slot], full)
        for name in config.numbers:
            source, target = getattr(r, f"{name}_v"), getattr(r, f"{name}_s")
            head_or_all = r.first if source.shape[1] == 1 else r.h
            plgpu.copy_gmem_to_smem(source.at[r.b, head_or_all, rows], target.at[slot], full)
        for w in range(config.writers):
            target, columns = r.v_s.at[slot, w], w + walk.group(jnp.where(i < walk.count, 0, 1))

            @pl.when(columns < config.value_groups)
            def _(target=target, columns=columns):
                plgpu.copy_gmem_to_smem(r.value.at[r.b, rows, r.h, pl.ds(columns * 64, 64)], target, full)

            @pl.when(columns >= config.value_groups)
            def _(target=target, columns=columns):
                if config.decayed:
                    plgpu.barrier_arrive(full)
                else:
                    source = r.key.at[r.b, rows, head, pl.ds((columns - config.value_groups) * 64, 64)]
                    plgpu.copy_gmem_to_smem(source, target, full)

    return (values, load_values), (keys, load_keys)
