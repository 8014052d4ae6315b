"""The triangular inverse of every chunk, all chunks side by side: what summaries and the scan would else wait for.

Warpgroups of a block share nothing: each takes chunks of its own, one after the other, and sends for the next chunk's
keys once it has multiplied those of one. The inverse itself: `pallas_kernels.hopper.inverse`.
"""

from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.inverse import fresh, gain_of, write_inverse
from pallas_kernels.hopper.mosaic import (
    CHUNK,
    F32,
    PROCESSORS,
    SQUARE,
    launch,
    part_of,
    smem,
    stage,
    write_numbers,
)
from pallas_kernels.hopper.scan_state import skipped
from pallas_kernels.hopper.unit_inverse import WORKSPACE


def prepare(key, vectors, documents, dtype, *, chunks, tied, save, exact=False, leads=None):
    """What solves for the updates of a chunk's tokens, and what the backward pass needs of it.

    Args:
        key: [B, T, Hk, K], K 64 or 128, bfloat16 or float16.
        vectors: gain, and with decay sums and left, as `forward` takes them.
        documents: [B, N·64] int32 or None.
        dtype: of the results that are matrices.
        chunks: n, of which so many are prepared, the first ones.
        leads: [B, P + 1] int32, as `summaries` takes them, for P equal parts of those chunks; None for all of them.

    Returns:
        name -> array. solve [B, H, n, C, C]: tied and saved E = solve (V - a∘K S), tied and not saved, which is folded,
        U = c∘E at once, untied U = solve (V - c∘a∘K S). If tied and saved inverse, that of I + diag(c) M. If exact and
        not folded erase, and if saved too square (λ), [B, H, n·64] float32.
    """
    batch, _, _, key_dim = key.shape
    heads = vectors["gain"].shape[2]
    masked, decayed, summed = documents is not None, "left" in vectors, "sums" in vectors
    inputs = dict(key=key, gain=vectors["gain"])
    if summed:
        inputs["sums_v"] = vectors["sums"]
    inputs |= {name: x for name, x in dict(documents=documents, leads=leads).items() if x is not None}
    both = save and tied
    matrices = jax.ShapeDtypeStruct((batch, heads, chunks, *SQUARE), dtype)
    numbers = jax.ShapeDtypeStruct((batch, heads, chunks * CHUNK), F32)
    outputs = dict(solve=matrices)
    if both:
        outputs["inverse"] = matrices
    folded = tied and not save
    if exact and not folded:
        outputs |= dict(erase=numbers) | (dict(square=numbers) if save else {})
    # Of a block. A launch gives each thread of four 128 registers, of three 168.
    count = min(3 if both and decayed else 4, chunks)
    vector = plgpu.SMEM((count, 1, CHUNK), F32)
    own = dict(  # a place for each warpgroup
        k_s=smem((count, 1, CHUNK, key_dim), dtype),
        sums_r=vector if summed else None,
        sums_c=vector if summed else None,
        documents_r=plgpu.SMEM((count, 1, CHUNK), jnp.int32) if masked else None,
        documents_c=plgpu.SMEM((count, 1, CHUNK), jnp.int32) if masked else None,
        solve_s=smem((count, 1, *SQUARE), dtype),
        erase_s=None if folded else plgpu.SMEM((count, 1, CHUNK), F32),
        square_s=plgpu.SMEM((count, CHUNK), F32) if save and exact else None,
        cosines_s=smem((count, *SQUARE), jnp.float16) if both else None,
        inverse_s=smem((count, *SQUARE), dtype) if both else None,
        work_s=plgpu.SMEM((count, WORKSPACE), F32),
        keys_s=plgpu.SMEM((count, 4, CHUNK), F32),  # numbers of each key, as `write_inverse` orders them
        helper_stage=stage(jnp.float16, count),
    )
    scratch = own | dict(
        numbers_r=plgpu.SMEM((CHUNK,), jnp.int32),  # 0 … 63, to be read by rows and by columns
        numbers_c=plgpu.SMEM((CHUNK,), jnp.int32),
        full=plgpu.Barrier(num_arrivals=1 + 2 * summed + 2 * masked, num_barriers=count),
        ready=plgpu.Barrier(num_arrivals=1),
    )
    shares, blocks = max(1, min(PROCESSORS // (batch * heads), pl.cdiv(chunks, count))), 1
    if leads is not None:
        shares = leads.shape[1] - 1
        blocks = max(1, chunks // (4 * count * shares))  # more than the card runs at a time: many have nothing to do
    config = SimpleNamespace(
        chunks=chunks, share=pl.cdiv(chunks, shares), group=heads // key.shape[2], count=count, dtype=dtype, tied=tied,
        save=save, folded=folded, exact=exact, both=both, masked=masked, decayed=decayed, summed=summed,
        skipping=leads is not None, blocks=blocks, stride=count * blocks, own=tuple(own),
    )  # fmt: skip
    return launch("efla_prepare", config, inputs, outputs, scratch, (batch, heads, shares * blocks), (count, _chunks))


def _chunks(config, r, i):
    """Of a share of the chunks, every so manyth of those that are looked at."""
    full = r.full.at[i]
    own = {name: part_of(getattr(r, name), i) for name in config.own}
    r = SimpleNamespace(**r.__dict__ | own)
    share = lax.div(r.c, jnp.int32(config.blocks))
    first, end = share * config.share, jnp.minimum((share + 1) * config.share, config.chunks)
    if config.skipping:
        first = jnp.minimum(first + skipped(r.leads[r.b, share + 1], config.share), end)
    first = first + lax.rem(r.c, jnp.int32(config.blocks)) * config.count + i

    @pl.when(i == 0)
    def _():
        write_numbers(r)
        plgpu.commit_smem()
        plgpu.barrier_arrive(r.ready)

    plgpu.barrier_wait(r.ready)

    def load(turn):
        n, slot = first + turn * config.stride, r.first
        rows = pl.ds(n * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(r.key.at[r.b, rows, lax.div(r.h, config.group)], r.k_s.at[slot], full)
        for name in ("sums_r", "sums_c"):
            if getattr(r, name) is not None:
                source = getattr(r, name[:-1] + "v").at[r.b, r.h, rows]
                plgpu.copy_gmem_to_smem(source, getattr(r, name).at[slot], full)
        if config.masked:
            for target in (r.documents_r, r.documents_c):
                plgpu.copy_gmem_to_smem(r.documents.at[r.b, rows], target.at[slot], full)

    pl.when(first < end)(lambda: load(r.first))

    next_gain = lambda turn: gain_of(r, jnp.minimum(first + turn * config.stride, config.chunks - 1))

    def step(turn, gain):
        coming = next_gain(turn + 1)
        plgpu.barrier_wait(full)

        def midway():
            plgpu.commit_smem()  # what read the place is done before the copy, which is another proxy, writes it
            pl.when(first + (turn + 1) * config.stride < end)(lambda: load(turn + 1))

        def put(name, value):
            getattr(r, name).at[r.first][...] = value

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the chunk before left here has been copied
        write_inverse(config, r, fresh(r), gain, put, midway)
        plgpu.commit_smem()
        _leave(config, r, first + turn * config.stride)
        return coming

    turns = lax.div(jnp.maximum(end - first, 0) + config.stride - 1, jnp.int32(config.stride))
    lax.fori_loop(0, turns, step, next_gain(0))
    plgpu.wait_smem_to_gmem(0)


def _leave(config, r, n):
    """What was made of chunk n, to device memory."""
    plgpu.copy_smem_to_gmem(r.solve_s.at[fresh(r)], r.solve.at[r.b, r.h, n], commit_group=False)
    if config.both:
        plgpu.copy_smem_to_gmem(r.inverse_s, r.inverse.at[r.b, r.h, n], commit_group=False)
    if config.exact and not config.folded:
        tokens = r.b, r.h, pl.ds(n * CHUNK, CHUNK)
        plgpu.copy_smem_to_gmem(r.erase_s.at[r.first], r.erase.at[tokens], commit_group=False)
        if config.save:
            plgpu.copy_smem_to_gmem(r.square_s, r.square.at[tokens], commit_group=False)
    plgpu.commit_smem_to_gmem_group()
