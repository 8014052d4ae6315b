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

The inverse is taken on unit keys, where it is D_n-similar to (I + M̂ diag(cλ))⁻¹ with |M̂_ij| ≤ 1: float16 then has range
to spare and eight times bfloat16's precision. X ← X - mask_b(X L) X merges inverses of b×b diagonal blocks, b = 1 … 32;
the mask makes each step a merge of two blocks rather than a power of L.
"""

from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper.mosaic import (
    CHUNK,
    COLS,
    F32,
    ROWS,
    TILE,
    iota,
    kernel,
    matmul,
    per_column,
    per_row,
    smem,
    stage,
)

SQUARE = (CHUNK, CHUNK)
BLOCK = 16
ZEROS, ERASE = 4, 5  # rows of numbers_s
STRONG = 1 / 32  # of cλ, see _inverse
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
        numbers_s=plgpu.SMEM(
            (7, CHUNK), F32
        ),  # of each key: norm, one over it, that times cλ, one over cλ; zeros; erase
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
    names = (*inputs, *outputs)

    def body(*refs, **scratch_refs):
        r = SimpleNamespace(**dict.fromkeys(scratch), **dict(zip(names, refs, strict=True)))
        r.__dict__.update(scratch_refs)
        r.b, r.h = lax.axis_index("b"), lax.axis_index("h")
        warpgroup = lax.axis_index("warpgroup")
        for w in range(writers):
            pl.when(warpgroup == w)(lambda w=w: _state(config, r, w))
        pl.when(warpgroup == writers)(lambda: _helper(config, r))
        # A warpgroup that ends while another still multiplies stops the kernel with an illegal instruction.
        plgpu.barrier_arrive(r.done)
        plgpu.barrier_wait(r.done)

    results = kernel(
        body,
        name="efla_forward",
        out_type=tuple(outputs.values()),
        grid=(batch, heads),
        grid_names=("b", "h"),
        scratch=scratch,
        warpgroups=writers + 1,
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


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

    state, _ = lax.fori_loop(0, config.chunks, step, (state, 0 * r.b))
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

    start = 0 * r.b  # traced: a slice that reaches over the end is refused if it is known
    load_keys(start, start)
    load_values(start)
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
            row, column = _place(r)
            scores = lax.optimization_barrier(jnp.where(row >= column, scores, 0.0)).astype(config.dtype)
        r.scores_s.at[half][...] = scores
        _inverse(config, r, slot, half, decay)
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

    lax.fori_loop(0, config.chunks, step, start)
    for n in range(max(config.chunks - config.slots, 0), config.chunks):  # every phase must be seen to end
        plgpu.barrier_wait(r.keys_free.at[n % config.slots])
    for n in range(max(config.chunks - 2, 0), config.chunks):
        plgpu.barrier_wait(r.values_free.at[n % VALUE_SLOTS])
        plgpu.barrier_wait(r.squares_free.at[n % 2])
    plgpu.wait_smem_to_gmem(0)


def _next(config, slot):
    return jnp.where(slot == config.slots - 1, 0, slot + 1)


def _fresh(r):
    """A zero that the compiler cannot know. Masks and addresses made from it live only where they are used; else they
    would be made once, before the loop, and take the tiles' registers."""
    return r.numbers_s[ZEROS, 0].astype(jnp.int32)


def _place(r, columns=CHUNK):
    """Row and column numbers of a tile."""
    zero = _fresh(r)
    return iota(0, columns) + zero, iota(1, columns) + zero


def _decay(config, r, slot):
    """D_ij on and below the diagonal, 0 across documents; None where it is 1 throughout."""
    if not config.decayed:
        return None
    row, column = _place(r)
    keep = row >= column
    if config.masked:
        documents = (plgpu.load(r.documents_r.at[slot], layout=ROWS), plgpu.load(r.documents_c.at[slot], layout=COLS))
        keep = keep & (per_row(documents[0], SQUARE) == per_column(documents[1], SQUARE))
    if not config.summed:
        return jnp.where(keep, 1.0, 0.0)
    sums = (plgpu.load(r.sums_r.at[slot], layout=ROWS), plgpu.load(r.sums_c.at[slot], layout=COLS))
    return jnp.exp2(jnp.where(keep, per_row(sums[0], SQUARE) - per_column(sums[1], SQUARE), -jnp.inf))


def _inverse(config, r, slot, half, decay):
    """Writes what the state warpgroups solve with, and (saved, tied) the inverse of I + diag(c) M, in blocks [C, 16].

    While the inverse is block diagonal, its blocks lie
    side by side in one [C, 16] tile, a quarter of the registers. Values per column are read from shared memory where
    they are used: kept, they would take the tiles' registers.
    """
    if config.save:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the chunk before left here has been copied
    k_s = r.k_s.at[slot]
    gram = matmul(k_s, k_s.T, SQUARE)
    row, column = _place(r, BLOCK)
    square = jnp.sum(jnp.where((row & 15) == column, _diagonal(gram, row), 0.0), axis=1)
    norm = jnp.where(square > 0, jnp.sqrt(square), 1.0)
    inverse_norm = 1 / norm
    gain = plgpu.load(r.gain_s.at[slot], layout=ROWS)
    erase = gain * _phi1(gain * square) if config.exact else gain
    strength = erase * square
    columns = [norm, inverse_norm, inverse_norm * strength if config.tied else inverse_norm]
    if config.tied and config.save:
        columns.append(jnp.where(strength > STRONG, 1 / jnp.where(strength > STRONG, strength, 1.0), 0.0))
    for i, numbers in enumerate(columns):
        r.numbers_s.at[_fresh(r) + i][...] = numbers
    r.numbers_s.at[ERASE + half][...] = erase
    if config.save and config.exact:
        r.square_s[...] = square
    plgpu.commit_smem()
    numbers = lambda i: plgpu.load(r.numbers_s.at[_fresh(r) + i], layout=COLS)
    if decay is not None:
        gram = gram * decay
    if config.tied and config.save:
        row, column = _place(r)
        strict = jnp.where(row > column, gram * (per_row(inverse_norm, SQUARE) * per_column(numbers(1), SQUARE)), 0.0)
        strict = _half(strict)
        for i in range(CHUNK // BLOCK):
            r.cosines_s.at[_fresh(r) + i][...] = strict[:, i * BLOCK : (i + 1) * BLOCK]
    rows = inverse_norm if config.tied else inverse_norm * strength
    lower = gram * (per_row(rows, SQUARE) * per_column(numbers(2), SQUARE))
    x = _ladder(r, lower)
    shape = (CHUNK, BLOCK)
    over = lambda which, i: per_column(numbers(which)[i * BLOCK : (i + 1) * BLOCK], shape)
    before, after = (norm, 1) if config.tied else (inverse_norm, 0)
    for i, block in enumerate(x):
        r.solve_s.at[half, i][...] = (block * (per_row(before, shape) * over(after, i))).astype(config.dtype)
    if not (config.tied and config.save):
        return
    low = [block.astype(jnp.float16) for block in x]
    for i, block in enumerate(x):
        terms = [r.cosines_s.at[_fresh(r) + i, pl.ds(j * BLOCK, BLOCK)] for j in range(CHUNK // BLOCK)]
        linked = matmul(low, terms, shape, staged=r.helper_stage) * -1.0
        ratio = over(3, i)
        inverse = jnp.where(ratio > 0, block * ratio, linked) * (per_row(strength * inverse_norm, shape) * over(0, i))
        row, column = _place(r, BLOCK)
        inverse = jnp.where(row == column + i * BLOCK, 1.0, inverse)
        r.inverse_s.at[_fresh(r) + i][...] = lax.optimization_barrier(inverse).astype(config.dtype)


def _phi1(x):
    """(1 - e^{-x})/x for x ≥ 0, by its series where the difference would cancel; 9 terms are exact to float32 there."""
    near = jnp.where(x < 0.5, x, 0.0)
    series = jnp.ones_like(x)
    for n in range(9, 1, -1):
        series = 1.0 - near * (1.0 / n) * series
    far = jnp.where(x < 0.5, 1.0, x)
    return jnp.where(x < 0.5, series, (1.0 - jnp.exp(-far)) / far)


def _diagonal(tile, row):
    """The four diagonal blocks of a [C, C] tile, one below the other: [C, 16]."""
    block = row >> 4
    upper = jnp.where(block == 0, tile[:, :16], tile[:, 16:32])
    return jnp.where(block < 2, upper, jnp.where(block == 2, tile[:, 32:48], tile[:, 48:]))


def _ladder(r, lower):
    """The inverse of I + tril(lower, -1) [C, C], float16 products: four column blocks [C, 16] float32."""
    shape = (CHUNK, BLOCK)
    tile = lambda i: r.ladder_s.at[_fresh(r) + i]
    rows = lambda ref, i: ref.at[pl.ds(i * BLOCK, BLOCK)]
    row, column = _place(r, BLOCK)
    own = jnp.where((row & 15) > column, _diagonal(lower, row), 0.0)
    tile(0)[...] = _half(own)
    tile(1)[...] = _half(
        jnp.where(row < 32, lower[:, :16], lower[:, 32:48])
    )  # left of the diagonal, rows of odd blocks
    for i in range(2):
        r.corner_s.at[_fresh(r) + i][...] = _half(lower[:, i * BLOCK : (i + 1) * BLOCK])
    x = jnp.where((row & 15) == column, 1.0, jnp.where(((row & 15) ^ column) == 1, own * -1.0, 0.0))
    # Products with 0 and 1, since selecting halves of a register takes several instructions.
    one_block = [jnp.where((row >> 4) == i, 1.0, 0.0).astype(jnp.float16) for i in range(4)]

    def apply(x, ref, blocks, offset=0):
        """diag(x) @ ref, where rows of block i of x meet block i + offset of ref; only these blocks."""
        left = [x * one_block[i] for i in blocks]
        return matmul(left, [rows(ref, i + offset) for i in blocks], shape, staged=r.helper_stage)

    for level in (1, 2, 3):
        low = _half(x)
        tile(2)[...] = low
        plgpu.commit_smem()
        merged = apply(_half(apply(low, tile(0), range(4))), tile(2), range(4))
        row, column = _place(r, BLOCK)
        x = jnp.where((((row & 15) ^ column) >> level) == 1, merged * -1.0, x)
    low = _half(x)
    tile(2)[...] = low
    plgpu.commit_smem()
    merged = apply(_half(apply(low, tile(1), (1, 3))), tile(2), (1, 3), offset=-1)
    row, _ = _place(r, BLOCK)
    odd = (row & 16) == 16
    left, right = jnp.where(odd, merged * -1.0, x), jnp.where(odd, x, 0.0)
    tile(0)[...] = _half(left)
    tile(1)[...] = _half(right)
    plgpu.commit_smem()
    below = row >= 32
    left_below, right_below = jnp.where(below, left, 0.0), jnp.where(below, right, 0.0)
    terms = [_half(left_below), _half(right_below)]
    corner = [r.corner_s.at[_fresh(r) + i] for i in range(2)]
    links = [_half(matmul(terms, [rows(ref, 2), rows(ref, 3)], shape, staged=r.helper_stage)) for ref in corner]
    first = matmul(links, [rows(tile(0), 0), rows(tile(0), 1)], shape, staged=r.helper_stage)
    second = matmul(links[1], rows(tile(1), 1), shape, staged=r.helper_stage)
    return [
        jnp.where(below, first * -1.0, left),
        jnp.where(below, second * -1.0, right),
        left_below,
        right_below,
    ]


def _half(x):
    """float16; the barrier keeps the compiler from selecting among halves of registers instead of whole ones."""
    return lax.optimization_barrier(x).astype(jnp.float16)
