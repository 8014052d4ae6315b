"""What a piece makes of the cotangent of the state behind it: the backward pass without the gradients of the tokens.

With the letters of `pallas_kernels.hopper.backward`, from the piece's last chunk to its first one:

    g = Pᵀ dO + e∘(K dS')    X = c∘Tᵀ g    dS = d dS' + scale (a∘dO)ᵀ Q - (a∘X)ᵀ K

Each state warpgroup has 64 columns of dSᵀ in registers; the helper sends for what they read and makes P ahead of them.
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
    TILE,
    Ring,
    launch,
    matmul,
    part_of,
    per_column,
    recycle,
    smem,
    stage,
    write_numbers,
)


def reverse(query, key, d_output, inverse, vectors, documents, stops, d_final, *, scale, share):
    """The cotangents of the states before all pieces, of zeros behind each; behind the last one, of d_final.

    Args:
        query, key, d_output, vectors, documents: as `backward` takes them; d_final likewise, [B, H, V, K] or None.
        inverse: [B, H, N, C, C], that of I + diag(c) M.
        stops: [B, P] int32, as many chunks of a piece lie up to the first one in which a document begins, or all; or
            None. What lies behind them does not matter to the piece's beginning.
        share: chunks of a piece, of which the last may have fewer.

    Returns:
        [B, H, P, V, K] float32.
    """
    batch, length, key_heads, key_dim = key.shape
    heads, value_dim = d_output.shape[2:]
    dtype, writers = d_output.dtype, value_dim // 64
    chunks = pl.cdiv(length, CHUNK)
    pieces = pl.cdiv(chunks, share)
    masked, decayed, summed = documents is not None, "left" in vectors, "sums" in vectors
    names = ("erase", "left", "right", "sums")
    inputs = dict(query=query, key=key, d_output=d_output, inverse=inverse)
    inputs |= {f"{name}_v": vectors[name] for name in names if name in vectors}
    inputs |= dict(documents=documents, stops=stops) if masked else {}
    inputs |= dict(d_final=d_final) if d_final is not None else {}
    tokens, scores = Ring.of("tokens", 3, 1), Ring.of("scores", 2, 1)
    vector = plgpu.SMEM((tokens.slots, CHUNK), F32)
    numbers = plgpu.SMEM((tokens.slots, CHUNK), jnp.int32)
    copies = dict(
        q_s=smem((tokens.slots, CHUNK, key_dim), dtype),
        k_s=smem((tokens.slots, CHUNK, key_dim), dtype),
        o_s=smem((tokens.slots, CHUNK, value_dim), dtype),
        t_s=smem((tokens.slots, *SQUARE), dtype),
        erase_s=vector,
        left_s=vector if decayed else None,
        right_s=vector if decayed else None,
        sums_r=vector if summed else None,
        sums_c=vector if summed else None,
        documents_r=numbers if masked else None,
        documents_c=numbers if masked else None,
    )
    copies = {name: ref for name, ref in copies.items() if ref is not None}
    absent = dict.fromkeys(("left_s", "right_s", "sums_r", "sums_c", "documents_r", "documents_c"))
    scratch = (
        absent
        | copies
        | dict(
            scores_s=smem((scores.slots, *SQUARE), dtype),
            numbers_r=plgpu.SMEM((CHUNK,), jnp.int32),  # 0 … 63, to be read by rows and by columns
            numbers_c=plgpu.SMEM((CHUNK,), jnp.int32),
            state_stage=stage(dtype, writers),
            **tokens.barriers(len(copies), writers),
            **scores.barriers(1, writers),
        )
    )
    config = SimpleNamespace(
        chunks=chunks, share=share, pieces=pieces, group=heads // key_heads, key_dim=key_dim, dtype=dtype, scale=scale,
        masked=masked, decayed=decayed, summed=summed, given=d_final is not None, tokens=tokens, scores=scores,
        copies=tuple(copies),
    )  # fmt: skip
    outputs = dict(starts=jax.ShapeDtypeStruct((batch, heads, pieces, value_dim, key_dim), F32))
    roles = (writers, _state), (1, _helper)
    return launch("efla_reverse", config, inputs, outputs, scratch, (batch, heads, pieces), *roles)["starts"]


def _count(config, r):
    """Chunks of the block's piece that are looked at."""
    if config.masked:
        return r.stops[r.b, r.c]
    return jnp.minimum(config.share, config.chunks - r.c * config.share)


def _state(config, r, w):
    """A state warpgroup: columns 64w … 64w+63 of dS."""
    columns = pl.ds(w * 64, 64)
    staged = part_of(r.state_stage, w)
    shape = 64, config.key_dim
    tokens, scores = config.tokens, config.scores
    if config.given:
        d_state = plgpu.load(r.d_final.at[r.b, r.h, columns], layout=TILE, optimized=False)
        d_state = d_state * jnp.where(r.c == config.pieces - 1, 1.0, 0.0)
    else:
        d_state = plgpu.layout_cast(jnp.zeros(shape, F32), TILE)

    def step(i, d_state):
        slot = tokens.place(i)
        by_token = lambda ref, factor=1.0: per_column(plgpu.load(ref.at[slot], layout=COLS) * factor, SQUARE)
        q_s, k_s, o_t = r.q_s.at[slot], r.k_s.at[slot], r.o_s.at[slot, :, columns].T
        plgpu.barrier_wait(tokens.full(r, i))
        d_update = matmul(d_state.astype(config.dtype), k_s.T, SQUARE, staged=staged)
        if config.decayed:
            d_update = d_update * by_token(r.right_s)
        plgpu.barrier_wait(scores.full(r, i))
        d_update = matmul(o_t, r.scores_s.at[scores.place(i)], SQUARE, init=d_update, staged=staged)
        plgpu.barrier_arrive(scores.free(r, i))
        x = matmul(d_update.astype(config.dtype), r.t_s.at[slot], SQUARE, staged=staged) * by_token(r.erase_s, -1.0)
        x = (x * by_token(r.left_s) if config.decayed else x).astype(config.dtype)
        if config.decayed or config.scale != 1:
            x = lax.optimization_barrier(x)
            o_t = plgpu.load(o_t, layout=TILE).astype(F32) * config.scale
            o_t = (o_t * by_token(r.left_s) if config.decayed else o_t).astype(config.dtype)
        if config.decayed:
            d_state = d_state * r.left_s[slot, CHUNK - 1]
        d_state = matmul([o_t, x], [q_s, k_s], shape, init=d_state, staged=staged)
        plgpu.barrier_arrive(tokens.free(r, i))
        return d_state

    r.starts.at[r.b, r.h, r.c, columns][...] = lax.fori_loop(0, _count(config, r), step, d_state)


def _helper(config, r, _):
    """Sends for what is read, and makes P a chunk ahead."""
    count = _count(config, r)
    head = lax.div(r.h, config.group)
    tokens, scores = config.tokens, config.scores

    def load(i):
        n = r.c * config.share + count - 1 - i
        rows, slot, full = pl.ds(n * CHUNK, CHUNK), tokens.place(i), tokens.full(r, i)
        sources = dict(
            q_s=r.query.at[r.b, rows, head], k_s=r.key.at[r.b, rows, head], o_s=r.d_output.at[r.b, rows, r.h],
            t_s=r.inverse.at[r.b, r.h, n],
        )  # fmt: skip
        for name in config.copies:
            if name.startswith("documents"):
                source = r.documents.at[r.b, rows]
            else:
                source = sources[name] if name in sources else getattr(r, name[:-1] + "v").at[r.b, r.h, rows]
            plgpu.copy_gmem_to_smem(source, getattr(r, name).at[slot], full)

    loads = ((tokens, load),)
    write_numbers(r)
    plgpu.commit_smem()
    for i in range(min(tokens.slots, config.share)):
        pl.when(count > i)(lambda i=i: load(i + r.first))

    def step(i, carry):
        slot = tokens.place(i)
        plgpu.barrier_wait(tokens.full(r, i))
        made = masked_scores(config, r, slot, r.k_s.at[slot])
        scores.wait_place(r, i)
        r.scores_s.at[scores.place(i)][...] = made
        plgpu.commit_smem()
        plgpu.barrier_arrive(scores.full(r, i))
        pl.when(i > 0)(lambda: recycle(r, loads, i - 1, count))
        return carry

    lax.fori_loop(0, count, step, None)
    recycle(r, loads, count - 1, count)
    scores.wait_last(r, count)
