"""The forward pass in one kernel: q, k, v are read once, o is written once, the inverse never leaves the chip.

One block of threads walks the chunks of one sequence and value head. With the docstring of `efla_jax.ops.chunkwise`,
a = decay from the chunk's start, e = decay to its end, d = decay of the whole chunk:

- the helper warpgroups issue all copies and work ahead, each on a chunk of its own: K Kᵀ, the triangular inverse,
  P = tril(D∘Q Kᵀ). One chunk takes a helper far longer than the state warpgroups; several of them keep up;
- each state warpgroup holds 64 columns of the state as Sᵀ [64, K] in registers and chains the products with the left
  operand in registers: Rᵀ from Sᵀ Kᵀ, then Uᵀ, Oᵀ = a∘Sᵀ Qᵀ + Uᵀ Pᵀ, Sᵀ ← d Sᵀ + (e∘U)ᵀ K. Warpgroups of one head
  share nothing but what the helpers made.

Where heads are few, the state warpgroups of a head are in blocks of their own; what such blocks can share is used by
`pallas_kernels.hopper.few_heads`, which serves the plainest of these calls.

With two state warpgroups, nothing saved, no decay and no documents, helpers are ahead: they make all of a chunk and
keep it in registers until the chunk whose place it takes is done with. Had they to have the place first, the state
warpgroups would wait for all that is made after that. These send for values themselves, and write outputs where values
were.

Of documents without decay, the helpers say of each chunk in which one begins which of its tokens see the state before
it, and which are of the document that it ends with. The state warpgroups multiply what the state recalls by the former
and the updates of the state by the latter, by ones in all other chunks, and empty the state. Rows of documents can be
walked in pieces side by side, each from where the document begins that it cuts, or from a given state.

Where erase and write are the same number c per token ("tied": every rule but the exact one with decay) the kernel
solves for the prediction error E = V - a∘K S - M U, which is what the backward pass wants, and U = c∘E:

    tied:   R = V - a∘K S         E = (I + M diag(c))⁻¹ R        U = c∘E
    untied: R = V - c∘a∘K S       U = (I + diag(c) M)⁻¹ R        (V has been multiplied by write)

The triangular inverse: `pallas_kernels.hopper.inverse`.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.forward_helper import chunks_of, helper, send_for_values
from pallas_kernels.hopper.inverse import BLOCK
from pallas_kernels.hopper.masks import crossed, only_if
from pallas_kernels.hopper.mosaic import (
    CHUNK,
    COLS,
    F32,
    PROCESSORS,
    ROWS,
    SQUARE,
    TILE,
    Ring,
    check_registers,
    copy_out,
    launch,
    matmul,
    part_of,
    per_column,
    set_registers,
    smem,
    stage,
)
from pallas_kernels.hopper.scan_state import in_piece


def _crew(writers, key_dim, save, decayed, tied):
    """(helpers, registers of a thread of state warpgroups, and of helpers); None for as many as a launch gives.

    As many helpers as shared memory and registers hold. A launch gives 168 to each of three warpgroups, 128 of four.
    """
    if writers == 1:
        if save or decayed:
            return (2, 176, 160) if key_dim == 128 and save and (decayed or not tied) else (2, None, None)
        return (3, 176, 112) if key_dim == 128 else (3, None, None)
    if key_dim == 64:
        return 2, None, None
    if save or decayed:
        return (1, 176, 152) if save and (decayed or not tied) else (1, None, None)
    return 2, 168, 88


def forward(key, query, value, vectors, documents, starts, *, scale, tied, save, exact=False, share=None, leads=None):
    """Output, final state and what the backward pass needs, for chunked vectors.

    Args:
        query, key: [B, T, Hk, K], K 64 or 128, bfloat16 or float16.
        value: [B, T, H, V], V 64 or 128; multiplied by write if untied.
        vectors: name -> [B, H, N·64] float32, 0 behind T. gain, which is erase or, if exact, beta; with decay, or
            documents of which something is saved, also left (a) and right (e); with decay also sums, the log2 of the
            decay from the chunk's or document's start.
        documents: [B, N·64] int32 or None, counted anew from chunk to chunk: 0 is what the chunk before ended with.
        starts: [B, H, P, V, K] float32, the state before each piece, or None for zeros.
        exact: erase is (1 - e^{-βλ})/λ, made here from λ = ‖k‖², which the diagonal of K Kᵀ holds anyway.
        share: chunks of a piece, of which the last may have fewer; None for all, as it must be but for documents
            without decay of which nothing is saved.
        leads: [B, P] int32, for those documents: as many chunks before the piece begins the document that it is walked
            from, with zeros before; where negative, it is walked from starts.

    Returns:
        output [B, T, H, V], state [B, H, V, K] float32; with save also the states at chunk starts [B, H, N, V, K], the
        inverse [B, H, N, C, C] of I + diag(c) M, and E (tied) or U (untied) [B, T, H, V], all in value's type, and, if
        exact, erase and square (λ) [B, H, N·64] float32.
    """
    batch, length, key_heads, key_dim = key.shape
    heads, value_dim = value.shape[2:]
    chunks = pl.cdiv(length, CHUNK)
    share = chunks if share is None else share
    pieces = pl.cdiv(chunks, share)
    splits = value_dim // 64 if batch * heads * pieces * (value_dim // 64) <= PROCESSORS else 1
    writers = value_dim // 64 // splits
    decayed, masked = "left" in vectors, documents is not None
    summed, mixing = "sums" in vectors, masked and not decayed
    helpers, state_registers, helper_registers = _crew(writers, key_dim, save, decayed, tied)
    dtype = value.dtype
    inputs = dict(query=query, key=key, value=value, **{f"{name}_v": x for name, x in vectors.items()})
    inputs |= {name: x for name, x in dict(documents=documents, starts=starts, leads=leads).items() if x is not None}
    outputs = dict(
        output=jax.ShapeDtypeStruct(value.shape, dtype),
        final=jax.ShapeDtypeStruct((batch, heads, value_dim, key_dim), F32),
    )
    if save:
        outputs |= dict(
            states=jax.ShapeDtypeStruct((batch, heads, chunks, value_dim, key_dim), dtype),
            inverse=jax.ShapeDtypeStruct((batch, heads, chunks, *SQUARE), dtype),
            solved=jax.ShapeDtypeStruct(value.shape, dtype),
        )
    if save and exact:
        per_token = jax.ShapeDtypeStruct((batch, heads, chunks * CHUNK), F32)
        outputs |= dict(erase=per_token, square=per_token)
    ahead = writers == 2 and not (save or decayed or mixing)
    # one in the state warpgroups, one in each helper, one on its way, one that was made ahead
    keys = Ring.of("keys", helpers + 2 + ahead, helpers)
    queries, values = Ring.of("queries", helpers + 1 if ahead else 2, helpers), Ring.of("values", 2, helpers)
    products = Ring.of("products", max(helpers, 2), helpers)
    crowded = key_dim == 128 and (writers == 1 or save)  # shared memory is
    vector = plgpu.SMEM((keys.slots, CHUNK), F32)
    scratch = dict(
        k_s=smem((keys.slots, CHUNK, key_dim), dtype),
        q_s=smem((queries.slots, CHUNK, key_dim), dtype),
        v_s=smem((values.slots, writers, *SQUARE), dtype),
        solve_s=smem((products.slots, *SQUARE), dtype),
        # 1 for tokens of the document that the chunk ends with, and of that before it; first throughout, then of each
        # chunk in which one begins
        last_s=plgpu.SMEM((1 + products.slots, CHUNK), dtype) if mixing else None,
        seen_s=plgpu.SMEM((1 + products.slots, CHUNK), F32) if mixing else None,
        scores_s=smem((products.slots, *SQUARE), dtype),
        erase_s=plgpu.SMEM((products.slots, CHUNK), F32),
        # the state, then the output, which ahead goes where values were
        stage_s=None if ahead else smem((writers, key_dim // 64 if save or decayed else 1, *SQUARE), dtype),
        gain_s=vector,
        causal_s=None if decayed or crowded else smem(SQUARE, dtype),  # 1 on and below the diagonal
        left_s=vector if decayed else None,
        right_s=vector if decayed else None,
        # a copy to be read by rows and one by columns: of one, the compiler finds no layout in reasonable time
        sums_r=vector if summed else None,
        sums_c=vector if summed else None,
        documents_r=plgpu.SMEM((keys.slots, CHUNK), jnp.int32) if masked else None,
        documents_c=plgpu.SMEM((keys.slots, CHUNK), jnp.int32) if masked else None,
        numbers_r=plgpu.SMEM((CHUNK,), jnp.int32),  # 0 … 63, to be read by rows and by columns
        numbers_c=plgpu.SMEM((CHUNK,), jnp.int32),
        **keys.barriers(2 + 2 * decayed + 2 * summed + 2 * masked, writers),
        **queries.barriers(1),
        **values.barriers(writers),
        **products.barriers(1),
        scale_s=plgpu.SMEM((writers, CHUNK), F32),
        state_stage=stage(dtype, writers),
    )
    own = dict(  # a place for each helper
        cosines_s=smem((helpers, *SQUARE), jnp.float16) if save and tied else None,
        inverse_s=smem((helpers, *SQUARE), dtype) if save and tied else None,
        ladder_s=smem((helpers, 2 * CHUNK, BLOCK), jnp.float16),
        square_s=plgpu.SMEM((helpers, CHUNK), F32) if save and exact else None,
        keys_s=plgpu.SMEM((helpers, 4, CHUNK), F32),  # of each key: norm, one over it, that times cλ, one over cλ
        helper_stage=stage(jnp.float16, helpers),
    )
    config = SimpleNamespace(
        chunks=chunks, group=heads // key_heads, key_dim=key_dim, writers=writers, helpers=helpers, dtype=dtype,
        scale=scale, tied=tied, save=save, staged=save or decayed, masked=masked, decayed=decayed, summed=summed,
        mixing=mixing, given=starts is not None, share=share, pieces=pieces, blocks=splits, exact=exact, keys=keys,
        queries=queries, values=values, products=products, own=tuple(own),
        state_registers=state_registers, helper_registers=helper_registers, folded=False, warpgroups=writers + helpers,
        streams=helpers, fed=False, shared=False, ahead=ahead,
    )  # fmt: skip
    check_registers((writers, state_registers), (helpers, helper_registers))
    roles = (writers, in_piece(_state)), (helpers, in_piece(helper))
    return launch("efla_forward", config, inputs, outputs, scratch | own, (batch, heads * pieces, splits), *roles)


def _state(config, r, w):
    """One state warpgroup: columns 64w … 64w+63 of the block's part of the state."""
    set_registers(config.state_registers, config.warpgroups)
    columns = pl.ds((r.rank * config.writers + w) * 64, 64)
    staged = part_of(r.state_stage, w)
    shape, mixing = (64, config.key_dim), config.mixing
    keys, queries, products = config.keys, config.queries, config.products
    first, count = chunks_of(config, r)
    state = plgpu.layout_cast(jnp.zeros(shape, F32), TILE)
    if config.given:
        load = lambda _: plgpu.load(r.starts.at[r.b, r.h, r.piece, columns], layout=TILE, optimized=False)
        state = only_if(r.lead < 0, load, state) if mixing else load(state)
    r.scale_s.at[w][...] = plgpu.layout_cast(jnp.full((CHUNK,), config.scale, F32), ROWS)
    plgpu.commit_smem()

    def step(n, state):
        slot, scores_s = keys.place(n), r.scores_s.at[products.place(n)]
        k_s, q_s = r.k_s.at[slot], r.q_s.at[queries.place(n)]
        left = lambda: per_column(plgpu.load(r.left_s.at[slot], layout=COLS), SQUARE)
        plgpu.barrier_wait(keys.full(r, n))
        _to_stage(config, r, w, n, columns, state)
        state, recalled = _recall(config, r, w, state, k_s)
        update_low, left_over = _update(config, r, w, n, columns, recalled * left() if config.decayed else recalled)
        state, update_low, left_over = lax.optimization_barrier((state, update_low, left_over))

        def advanced(state):
            if config.decayed:
                state = state * r.left_s[slot, CHUNK - 1]
            late = left_over
            if mixing:
                state = state * jnp.where(crossed(r, slot), 0.0, 1.0)
                late = late * _of_documents(config, r, n, r.last_s)
            return matmul(late, k_s, shape, init=state, staged=staged)

        if config.staged:  # the state before is still in the stage
            state = lax.optimization_barrier(advanced(state))
        plgpu.barrier_wait(queries.full(r, n))
        state, out = _recall(config, r, w, state, q_s, r.scale_s[w, 0])
        if config.decayed:
            out = out * left()
        if mixing:
            out = out * _of_documents(config, r, n, r.seen_s)
        out = matmul(update_low, scores_s.T, SQUARE, init=out, staged=staged)
        if not config.staged:
            state = advanced(state)
        free = lambda: plgpu.barrier_arrive(keys.free(r, n))  # of all places of the chunk, other rings' too
        if not config.save:
            free()
        if not config.ahead:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if config.save:  # E has left the place of V
            free()
        stage_s = r.v_s.at[config.values.place(n), w] if config.ahead else r.stage_s.at[w, 0]
        stage_s.T[...] = out.astype(config.dtype)
        plgpu.commit_smem()
        target = r.output.at[r.b, pl.ds((first + n) * CHUNK, CHUNK), r.h, columns]
        copy_out(stage_s, target, n >= r.lead if mixing else None)
        return state

    state = lax.fori_loop(0, count, step, state)

    @pl.when(r.piece == config.pieces - 1)
    def _():
        r.final.at[r.b, r.h, columns][...] = state

    plgpu.wait_smem_to_gmem(0)


def _to_stage(config, r, w, n, columns, state):
    """The state rounded, to the stage if it is used from there, and from the stage to device memory if it is saved."""
    parts = range(config.key_dim // 64)
    if config.staged:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for part in parts:
            r.stage_s.at[w, part][...] = state[:, part * 64 : (part + 1) * 64].astype(config.dtype)
        plgpu.commit_smem()
    if config.save:
        for part in parts:
            target = r.states.at[r.b, r.h, n, columns, pl.ds(part * 64, 64)]
            plgpu.copy_smem_to_gmem(r.stage_s.at[w, part], target, commit_group=False)
        plgpu.commit_smem_to_gmem_group()


def _update(config, r, w, n, columns, recalled):
    """Uᵀ rounded, and what of it is there at the chunk's end, of the values and what the keys recall."""
    values, products = config.values, config.products
    slot, made, v_s = config.keys.place(n), products.place(n), r.v_s.at[values.place(n), w]
    erase = lambda factor=1.0: per_column(plgpu.load(r.erase_s.at[made], layout=COLS) * factor, SQUARE)
    plgpu.barrier_wait(values.full(r, n))
    plgpu.barrier_wait(products.full(r, n))
    recalled = recalled * (-1.0 if config.tied else erase(-1.0))
    if config.mixing:
        recalled = recalled * _of_documents(config, r, n, r.seen_s)
    # T V - T (K S): V - K S rounded would lose of K S what is below V's last place, always to the same side
    forgotten, solve_t = recalled.astype(config.dtype), r.solve_s.at[made].T
    update = matmul([v_s.T, forgotten], [solve_t, solve_t], SQUARE, staged=part_of(r.state_stage, w))
    if config.ahead:  # for the next values, where those of the chunk before were and then its output
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _, count = chunks_of(config, r)
        send_for_values(config, r, n + 1, w, n + 1 < count)
    if config.save:  # in the place of V, which all threads have read
        plgpu.commit_smem()
        v_s.T[...] = update.astype(config.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(v_s, r.solved.at[r.b, pl.ds(n * CHUNK, CHUNK), r.h, columns])
    if config.tied:
        update = update * erase()
    low = update.astype(config.dtype)
    if not config.decayed:
        return low, low
    right = per_column(plgpu.load(r.right_s.at[slot], layout=COLS), SQUARE)
    return low, (update * right).astype(config.dtype)


def _of_documents(config, r, n, ref):
    """1 for the tokens of chunk n that ref (seen_s or last_s) is about, else 0."""
    at = jnp.where(crossed(r, config.keys.place(n)), 1 + config.products.place(n), 0)
    return per_column(plgpu.load(ref.at[at], layout=COLS), SQUARE)


def _recall(config, r, w, state, tokens, scale=None):
    """The state as given, and (scale) Sᵀ tokensᵀ; the state from the stage, where it is there, unscaled.

    From registers it is rounded half by half, and again each time: what is kept takes registers. With a scale that the
    compiler does not know it cannot keep it.
    """
    staged, parts = part_of(r.state_stage, w), range(config.key_dim // 64)
    pieces = [tokens.at[:, pl.ds(part * 64, 64)].T for part in parts]
    if config.staged:
        out = matmul([r.stage_s.at[w, part] for part in parts], pieces, SQUARE, staged=staged)
        return state, out if scale is None or config.scale == 1 else out * config.scale
    out: Any = None
    for part in parts:
        low = state[:, part * 64 : (part + 1) * 64]
        low = (low if scale is None else low * scale).astype(config.dtype)
        out = matmul(low, pieces[part], SQUARE, init=out, staged=staged)
        state, out = lax.optimization_barrier((state, out))
    return state, out
