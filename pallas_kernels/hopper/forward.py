"""The forward pass in one kernel: q, k, v are read once, o is written once, the inverse never leaves the chip.

One block of threads walks the chunks of one sequence and value head. With the docstring of `efla_jax.ops.chunkwise`,
a = decay from the chunk's start, e = decay to its end, d = decay of the whole chunk:

- the helper warpgroup issues all copies and works one chunk ahead: K Kᵀ, the triangular inverse, P = tril(D∘Q Kᵀ);
- each state warpgroup holds 64 columns of the state as Sᵀ [64, K] in registers and chains the products with the left
  operand in registers: Rᵀ from Sᵀ Kᵀ, then Uᵀ, Sᵀ ← d Sᵀ + (e∘U)ᵀ K, Oᵀ = a∘Sᵀ Qᵀ + Uᵀ Pᵀ. Warpgroups of one head
  share nothing but what the helper made.

Where erase and write are the same number c per token ("tied": every rule but the exact one with decay) the kernel
solves for the prediction error E = V - a∘K S - M U, which is what the backward pass wants, and U = c∘E:

    tied:   R = V - a∘K S         E = (I + M diag(c))⁻¹ R        U = c∘E
    untied: R = V - c∘a∘K S       U = (I + diag(c) M)⁻¹ R        (V has been multiplied by write)

The triangular inverse: `pallas_kernels.hopper.inverse`.
"""

from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.inverse import BLOCK, ERASE, ZEROS, place, write_inverse
from pallas_kernels.hopper.mosaic import (
    CHUNK,
    COLS,
    F32,
    ROWS,
    SQUARE,
    TILE,
    iota,
    launch,
    matmul,
    per_column,
    per_row,
    smem,
    stage,
)

KEY_SLOTS = 3  # chunks of q, k: one in the state warpgroups, one in the helper, one on its way, if there is room
VALUE_SLOTS = 2  # also of what the helper makes
# Of the 168 registers a thread that three warpgroups start with.
STATE_REGISTERS, HELPER_REGISTERS = 184, 136


def forward(key, query, value, vectors, documents, initial, *, scale, tied, save, exact=False):
    """Output, final state and what the backward pass needs, for chunked vectors.

    Args:
        query, key: [B, T, Hk, K], K 64 or 128, bfloat16 or float16.
        value: [B, T, H, V], V 64 or 128; multiplied by write if untied.
        vectors: name -> [B, H, N·64] float32, 0 behind T. gain, which is erase or, if exact, beta; with decay or
            documents also left (a) and right (e); with decay also sums, the log2 of the decay from the chunk's or
            document's start.
        documents: [B, N·64] int32 or None.
        initial: [B, H, V, K] float32 or None for zeros.
        exact: erase is (1 - e^{-βλ})/λ, made here from λ = ‖k‖², which the diagonal of K Kᵀ holds anyway.

    Returns:
        output [B, T, H, V], state [B, H, V, K] float32; with save also the states at chunk starts [B, H, N, V, K], the
        inverse [B, H, N, C, C] of I + diag(c) M, and E (tied) or U (untied) [B, T, H, V], all in value's type, and, if
        exact, erase and square (λ) [B, H, N·64] float32.
    """
    batch, length, key_heads, key_dim = key.shape
    heads, value_dim = value.shape[2:]
    chunks = pl.cdiv(length, CHUNK)
    writers = value_dim // 64
    dtype = value.dtype
    masked = documents is not None
    inputs = dict(query=query, key=key, value=value, **{f"{name}_v": x for name, x in vectors.items()})
    if masked:
        inputs["documents"] = documents
    if initial is not None:
        inputs["initial"] = initial
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
    full = save and tied and key_dim + value_dim == 256  # shared memory is
    decayed = "left" in vectors
    summed = "sums" in vectors
    slots = KEY_SLOTS - (full and summed)
    vector = plgpu.SMEM((slots, CHUNK), F32)
    scratch = dict(
        q_s=smem((slots, CHUNK, key_dim), dtype),
        k_s=smem((slots, CHUNK, key_dim), dtype),
        v_s=smem((VALUE_SLOTS, CHUNK, value_dim), dtype),
        solve_s=smem((2, CHUNK // BLOCK, CHUNK, BLOCK), dtype),
        scores_s=smem((2, *SQUARE), dtype),
        cosines_s=smem((CHUNK // BLOCK, CHUNK, BLOCK), jnp.float16) if save and tied else None,
        inverse_s=smem((CHUNK // BLOCK, CHUNK, BLOCK), dtype) if save and tied else None,
        ladder_s=smem((3, CHUNK, BLOCK), jnp.float16),
        corner_s=smem((2, CHUNK, BLOCK), jnp.float16),
        stage_s=smem((writers, 2 if save else 1, *SQUARE), dtype),
        gain_s=vector,
        square_s=plgpu.SMEM((CHUNK,), F32) if save and exact else None,
        causal_s=None if decayed or full else smem(SQUARE, dtype),  # 1 on and below the diagonal
        # of each key: norm, one over it, that times cλ, one over cλ; zeros; erase of two chunks
        numbers_s=plgpu.SMEM((7, CHUNK), F32),
        left_s=vector if decayed else None,
        right_s=vector if decayed else None,
        # a copy to be read by rows and one by columns: of one, the compiler finds no layout in reasonable time
        sums_r=vector if summed else None,
        sums_c=vector if summed else None,
        documents_r=plgpu.SMEM((slots, CHUNK), jnp.int32) if masked else None,
        documents_c=plgpu.SMEM((slots, CHUNK), jnp.int32) if masked else None,
        keys_full=plgpu.Barrier(num_arrivals=3 + 2 * decayed + 2 * summed + 2 * masked, num_barriers=slots),
        keys_free=plgpu.Barrier(num_arrivals=writers, num_barriers=slots),
        values_full=plgpu.Barrier(num_barriers=VALUE_SLOTS),
        values_free=plgpu.Barrier(num_arrivals=writers, num_barriers=VALUE_SLOTS),
        squares_full=plgpu.Barrier(num_barriers=2),
        squares_free=plgpu.Barrier(num_arrivals=writers, num_barriers=2),
        done=plgpu.Barrier(num_arrivals=writers + 1),
        helper_stage=stage(jnp.float16),
        **{f"state_stage_{w}": stage(dtype) for w in range(writers)},
    )
    config = SimpleNamespace(
        chunks=chunks, group=heads // key_heads, key_dim=key_dim, writers=writers, dtype=dtype, scale=scale, tied=tied,
        save=save, masked=masked, decayed=decayed, summed=summed, initial=initial is not None, exact=exact, slots=slots,
    )  # fmt: skip
    return launch("efla_forward", config, inputs, outputs, scratch, (batch, heads), _state, _helper)


def _state(config, r, w):
    """One state warpgroup: columns 64w … 64w+63 of the state."""
    if config.writers == 2:
        plgpu.set_max_registers(STATE_REGISTERS, action="increase")
    columns = pl.ds(w * 64, 64)
    staged = getattr(r, f"state_stage_{w}")
    shape = (64, config.key_dim)
    if config.initial:
        state = plgpu.load(r.initial.at[r.b, r.h, columns], layout=TILE, optimized=False)
    else:
        state = plgpu.layout_cast(jnp.zeros(shape, F32), TILE)

    def step(n, carry):
        state, slot = carry
        half, vslot = n & 1, n & 1
        k_s, q_s = r.k_s.at[slot], r.q_s.at[slot]
        rows = pl.ds(n * CHUNK, CHUNK)
        plgpu.barrier_wait(r.keys_full.at[slot])
        low = state.astype(config.dtype)
        if config.save:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for part in range(config.key_dim // 64):
                r.stage_s.at[w, part][...] = low[:, part * 64 : (part + 1) * 64]
            plgpu.commit_smem()
            for part in range(config.key_dim // 64):
                plgpu.copy_smem_to_gmem(
                    r.stage_s.at[w, part], r.states.at[r.b, r.h, n, columns, pl.ds(part * 64, 64)], commit_group=False
                )
            plgpu.commit_smem_to_gmem_group()
        left = lambda: per_column(plgpu.load(r.left_s.at[slot], layout=COLS), SQUARE)

        rest = matmul(low, k_s.T, SQUARE, staged=staged)
        if config.decayed:
            rest = rest * left()
        erase = lambda: per_column(plgpu.load(r.numbers_s.at[ERASE + half], layout=COLS), SQUARE)
        if not config.tied:
            plgpu.barrier_wait(r.squares_full.at[half])
            rest = rest * erase()
        plgpu.barrier_wait(r.values_full.at[vslot])
        rest = plgpu.load(r.v_s.at[vslot, :, columns].T, layout=TILE).astype(F32) - rest
        plgpu.barrier_arrive(r.values_free.at[vslot])
        if config.tied:
            plgpu.barrier_wait(r.squares_full.at[half])
        rest = rest.astype(config.dtype)
        blocks = range(CHUNK // BLOCK)
        solved = matmul(
            [rest[:, i * BLOCK : (i + 1) * BLOCK] for i in blocks], [r.solve_s.at[half, i].T for i in blocks],
            SQUARE, staged=staged,
        )  # fmt: skip
        if config.save:  # the state has left the stage long ago
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            r.stage_s.at[w, 1].T[...] = solved.astype(config.dtype)
        update = solved
        if config.tied:
            update = solved * erase()
        update_low = update.astype(config.dtype)
        left_over = update_low  # what of it is there at the chunk's end
        if config.decayed:
            right = per_column(plgpu.load(r.right_s.at[slot], layout=COLS), SQUARE)
            left_over = (update * right).astype(config.dtype)
        # The state is rounded again: kept since above, it would take 32 registers.
        state, update_low, left_over = lax.optimization_barrier((state, update_low, left_over))
        low, scores = state.astype(config.dtype), r.scores_s.at[half].T
        if config.decayed:
            out = matmul(low, q_s.T, SQUARE, staged=staged) * left()
            out = matmul(update_low, scores, SQUARE, init=out, staged=staged)
        else:
            out = matmul([low, update_low], [q_s.T, scores], SQUARE, staged=staged)
        plgpu.barrier_arrive(r.squares_free.at[half])
        if config.decayed:
            state = state * r.left_s[slot, CHUNK - 1]
        new = matmul(left_over, k_s, shape, init=state, staged=staged)
        plgpu.barrier_arrive(r.keys_free.at[slot])
        if not config.save:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        r.stage_s.at[w, 0].T[...] = (out * config.scale).astype(config.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(r.stage_s.at[w, 0], r.output.at[r.b, rows, r.h, columns], commit_group=False)
        if config.save:
            plgpu.copy_smem_to_gmem(r.stage_s.at[w, 1], r.solved.at[r.b, rows, r.h, columns], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        return new, _next(config, slot)

    state, _ = lax.fori_loop(0, config.chunks, step, (state, r.first))
    r.final.at[r.b, r.h, columns][...] = state
    plgpu.wait_smem_to_gmem(0)


def _helper(config, r):
    """The helper warpgroup: copies, the inverse and the scores, one chunk ahead of the state."""
    if config.writers == 2:
        plgpu.set_max_registers(HELPER_REGISTERS, action="decrease")
    head = lax.div(r.h, config.group)

    def load_keys(n, slot):
        rows, bar = pl.ds(n * CHUNK, CHUNK), r.keys_full.at[slot]
        plgpu.commit_smem()  # what read this slot is done before the copy, which is another proxy, writes it
        plgpu.copy_gmem_to_smem(r.query.at[r.b, rows, head], r.q_s.at[slot], bar)
        plgpu.copy_gmem_to_smem(r.key.at[r.b, rows, head], r.k_s.at[slot], bar)
        for name in ("gain_s", "left_s", "right_s", "sums_r", "sums_c"):
            target = getattr(r, name)
            if target is not None:
                source = getattr(r, name[:-1] + "v")
                plgpu.copy_gmem_to_smem(source.at[r.b, r.h, rows], target.at[slot], bar)
        if config.masked:
            for target in (r.documents_r, r.documents_c):
                plgpu.copy_gmem_to_smem(r.documents.at[r.b, rows], target.at[slot], bar)

    def load_values(n):
        slot = n & 1
        rows = pl.ds(n * CHUNK, CHUNK)
        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(r.value.at[r.b, rows, r.h], r.v_s.at[slot], r.values_full.at[slot])

    load_keys(r.first, r.first)
    load_values(r.first)
    r.numbers_s.at[ZEROS][...] = plgpu.layout_cast(jnp.zeros((CHUNK,), F32), ROWS)
    if r.causal_s is not None:
        r.causal_s[...] = jnp.where(iota(0) >= iota(1), 1.0, 0.0).astype(config.dtype)
    plgpu.commit_smem()

    def step(n, slot):
        half, following = n & 1, _next(config, slot)

        @pl.when(n + 1 < config.chunks)
        def _():
            pl.when(n + 1 >= config.slots)(lambda: plgpu.barrier_wait(r.keys_free.at[following]))
            load_keys(n + 1, following)

        plgpu.barrier_wait(r.keys_full.at[slot])
        decay = _decay(config, r, slot)
        scores = matmul(r.q_s.at[slot], r.k_s.at[slot].T, SQUARE)
        pl.when(n >= 2)(lambda: plgpu.barrier_wait(r.squares_free.at[half]))
        if decay is not None:
            scores = (scores * decay).astype(config.dtype)
        elif r.causal_s is not None:  # a product with 0 and 1, two numbers at once, is cheaper than a choice
            scores = scores.astype(config.dtype) * plgpu.load(r.causal_s, layout=TILE)
        else:
            row, column = place(r)
            scores = lax.optimization_barrier(jnp.where(row >= column, scores, 0.0)).astype(config.dtype)
        r.scores_s.at[half][...] = scores
        write_inverse(config, r, slot, half, decay)
        if config.save:
            plgpu.commit_smem()
            for i in range(CHUNK // BLOCK):
                source = r.inverse_s.at[i] if config.tied else r.solve_s.at[half, i]
                plgpu.copy_smem_to_gmem(
                    source, r.inverse.at[r.b, r.h, n, :, pl.ds(i * BLOCK, BLOCK)], commit_group=False
                )
            if config.exact:
                tokens = r.b, r.h, pl.ds(n * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(r.numbers_s.at[ERASE + half], r.erase.at[tokens], commit_group=False)
                plgpu.copy_smem_to_gmem(r.square_s, r.square.at[tokens], commit_group=False)
            plgpu.commit_smem_to_gmem_group()
        plgpu.commit_smem()
        plgpu.barrier_arrive(r.squares_full.at[half])

        @pl.when(n + 1 < config.chunks)
        def _():
            pl.when(n + 1 >= VALUE_SLOTS)(lambda: plgpu.barrier_wait(r.values_free.at[(n + 1) & 1]))
            load_values(n + 1)

        return following

    lax.fori_loop(0, config.chunks, step, r.first)
    for n in range(max(config.chunks - config.slots, 0), config.chunks):  # every phase must be seen to end
        plgpu.barrier_wait(r.keys_free.at[n % config.slots])
    for n in range(max(config.chunks - 2, 0), config.chunks):
        plgpu.barrier_wait(r.values_free.at[n % VALUE_SLOTS])
        plgpu.barrier_wait(r.squares_free.at[n % 2])
    plgpu.wait_smem_to_gmem(0)


def _next(config, slot):
    return jnp.where(slot == config.slots - 1, 0, slot + 1)


def _decay(config, r, slot):
    """D_ij on and below the diagonal, 0 across documents; None where it is 1 throughout."""
    if not config.decayed:
        return None
    row, column = place(r)
    keep = row >= column
    if config.masked:
        documents = (plgpu.load(r.documents_r.at[slot], layout=ROWS), plgpu.load(r.documents_c.at[slot], layout=COLS))
        keep = keep & (per_row(documents[0], SQUARE) == per_column(documents[1], SQUARE))
    if not config.summed:
        return jnp.where(keep, 1.0, 0.0)
    sums = (plgpu.load(r.sums_r.at[slot], layout=ROWS), plgpu.load(r.sums_c.at[slot], layout=COLS))
    return jnp.exp2(jnp.where(keep, per_row(sums[0], SQUARE) - per_column(sums[1], SQUARE), -jnp.inf))
