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
    interpreting,
    iota,
    kernel,
    matmul,
    per_column,
    per_row,
    product,
    read,
    smem,
    stage,
)

SQUARE = (CHUNK, CHUNK)
BLOCK = 16
KEY_SLOTS = 3  # chunks of q, k: one in the state warpgroups, one in the helper, one on its way
VALUE_SLOTS = 2
# Of the 168 registers a thread that three warpgroups start with.
STATE_REGISTERS, HELPER_REGISTERS = 192, 120


def forward(key, query, value, vectors, documents, initial, *, scale, tied, save):
    """Output, final state and what the backward pass needs, for chunked vectors.

    Args:
        query, key: [B, T, Hk, K], K 64 or 128, bfloat16 or float16.
        value: [B, T, H, V], V 64 or 128; multiplied by write if untied.
        vectors: name -> [B, H, N·64] float32, 0 behind T. erase; with decay or documents also left (a) and right (e);
            with decay also sums, the log2 of the decay from the chunk's or document's start.
        documents: [B, N·64] int32 or None.
        initial: [B, H, V, K] float32 or None for zeros.

    Returns:
        output [B, T, H, V], state [B, H, V, K] float32; with save also the states at chunk starts [B, H, N, V, K], the
        inverse [B, H, N, C, C] of I + diag(c) M, and E (tied) or U (untied) [B, T, H, V], all in value's type.
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
    vector = plgpu.SMEM((KEY_SLOTS, CHUNK), F32)
    decayed = "left" in vectors
    summed = "sums" in vectors
    scratch = dict(
        q_s=smem((KEY_SLOTS, CHUNK, key_dim), dtype),
        k_s=smem((KEY_SLOTS, CHUNK, key_dim), dtype),
        v_s=smem((VALUE_SLOTS, CHUNK, value_dim), dtype),
        solve_s=smem((2, CHUNK // BLOCK, CHUNK, BLOCK), dtype),
        scores_s=smem((2, *SQUARE), dtype),
        cosines_s=smem((CHUNK // BLOCK, CHUNK, BLOCK), dtype) if save and tied else None,
        ladder_s=smem((3, CHUNK, BLOCK), jnp.float16),
        corner_s=smem((2, CHUNK, BLOCK), jnp.float16),
        stage_s=smem((writers, 2 if save else 1, *SQUARE), dtype),
        erase_c=vector,
        erase_r=vector,
        zero_s=plgpu.SMEM((CHUNK,), jnp.int32),
        norm_s=plgpu.SMEM((CHUNK,), F32),
        inverse_norm_s=plgpu.SMEM((CHUNK,), F32),
        strength_s=plgpu.SMEM((CHUNK,), F32),
        left_c=vector if decayed else None,
        right_c=vector if decayed else None,
        sums_r=vector if summed else None,
        sums_c=vector if summed else None,
        documents_r=plgpu.SMEM((KEY_SLOTS, CHUNK), jnp.int32) if masked else None,
        documents_c=plgpu.SMEM((KEY_SLOTS, CHUNK), jnp.int32) if masked else None,
        keys_full=plgpu.Barrier(
            num_arrivals=4 + 2 * decayed + 2 * summed + 2 * masked, num_barriers=KEY_SLOTS
        ),
        keys_free=plgpu.Barrier(num_arrivals=writers, num_barriers=KEY_SLOTS),
        values_full=plgpu.Barrier(num_barriers=VALUE_SLOTS),
        values_free=plgpu.Barrier(num_arrivals=writers, num_barriers=VALUE_SLOTS),
        squares_full=plgpu.Barrier(num_barriers=2),
        squares_free=plgpu.Barrier(num_arrivals=writers, num_barriers=2),
        done=plgpu.Barrier(num_arrivals=writers + 1),
        helper_stage=stage(jnp.float16),
        bf16_stage=stage(dtype),
        **{f"state_stage_{w}": stage(dtype) for w in range(writers)},
    )
    config = SimpleNamespace(
        chunks=chunks, group=heads // key_heads, key_dim=key_dim, writers=writers, dtype=dtype, scale=scale, tied=tied,
        save=save, masked=masked, decayed=decayed, summed=summed, initial=initial is not None,
    )  # fmt: skip
    names = (*inputs, *outputs)

    def body(*refs, **scratch_refs):
        r = SimpleNamespace(**{name: None for name in scratch}, **dict(zip(names, refs, strict=True)))
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

    def step(n, state):
        slot, half, vslot = lax.rem(n, KEY_SLOTS), lax.rem(n, 2), lax.rem(n, VALUE_SLOTS)
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
        left = plgpu.load(r.left_c.at[slot], layout=COLS) if config.decayed else None

        def solve(recall, output, solution):
            """R, the solution of the chunk, U and O; O's part of the state runs while R is made."""
            product(recall, low, k_s.T, staged)
            product(output, low, q_s.T, staged)
            rest = read(recall, in_flight=1)
            factor = None if config.tied else plgpu.load(r.erase_c.at[slot], layout=COLS)
            if config.decayed:
                factor = left if factor is None else factor * left
            if factor is not None:
                rest = rest * per_column(factor, SQUARE)
            plgpu.barrier_wait(r.values_full.at[vslot])
            rest = plgpu.load(r.v_s.at[vslot, :, columns].T, layout=TILE).astype(F32) - rest
            plgpu.barrier_arrive(r.values_free.at[vslot])
            plgpu.barrier_wait(r.squares_full.at[half])
            rest = rest.astype(config.dtype)
            for i in range(CHUNK // BLOCK):
                product(solution, rest[:, i * BLOCK : (i + 1) * BLOCK], r.solve_s.at[half, i].T, staged)
            solved = read(solution)
            if config.save:  # the state has left the stage long ago
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                r.stage_s.at[w, 1].T[...] = solved.astype(config.dtype)
            update = solved
            if config.tied:
                update = solved * per_column(plgpu.load(r.erase_c.at[slot], layout=COLS), SQUARE)
            update_low = update.astype(config.dtype)
            if config.decayed:
                out = read(output) * per_column(left, SQUARE)
                out = matmul(update_low, r.scores_s.at[half].T, SQUARE, init=out, staged=staged)
            else:
                product(output, update_low, r.scores_s.at[half].T, staged)
                out = read(output)
            return out, update

        out, update = pl.run_scoped(solve, *[plgpu.ACC(SQUARE, F32)] * 3)
        plgpu.barrier_arrive(r.squares_free.at[half])
        if config.decayed:
            update = update * per_column(plgpu.load(r.right_c.at[slot], layout=COLS), SQUARE)
            state = state * r.left_c[slot, CHUNK - 1]
        new = matmul(update.astype(config.dtype), k_s, shape, init=state, staged=staged)
        plgpu.barrier_arrive(r.keys_free.at[slot])
        if not config.save:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        r.stage_s.at[w, 0].T[...] = (out * config.scale).astype(config.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            r.stage_s.at[w, 0], r.output.at[r.b, rows, r.h, columns], commit_group=False
        )
        if config.save:
            plgpu.copy_smem_to_gmem(
                r.stage_s.at[w, 1], r.solved.at[r.b, rows, r.h, columns], commit_group=False
            )
        plgpu.commit_smem_to_gmem_group()
        return new

    state = lax.fori_loop(0, config.chunks, step, state)
    r.final.at[r.b, r.h, columns][...] = state
    plgpu.wait_smem_to_gmem(0)


def _helper(config, r):
    """The helper warpgroup: copies, the inverse and the scores, one chunk ahead of the state."""
    if config.writers == 2:
        plgpu.set_max_registers(HELPER_REGISTERS, action="decrease")
    head = lax.div(r.h, config.group)

    def load_keys(n):
        slot = lax.rem(n, KEY_SLOTS)
        rows, bar = pl.ds(n * CHUNK, CHUNK), r.keys_full.at[slot]
        plgpu.commit_smem()  # what read this slot is done before the copy, which is another proxy, writes it
        plgpu.copy_gmem_to_smem(r.query.at[r.b, rows, head], r.q_s.at[slot], bar)
        plgpu.copy_gmem_to_smem(r.key.at[r.b, rows, head], r.k_s.at[slot], bar)
        for name in ("erase_c", "erase_r", "left_c", "right_c", "sums_r", "sums_c"):
            target = getattr(r, name)
            if target is not None:
                source = getattr(r, name[:-1] + "v")
                plgpu.copy_gmem_to_smem(source.at[r.b, r.h, rows], target.at[slot], bar)
        if config.masked:
            for target in (r.documents_r, r.documents_c):
                plgpu.copy_gmem_to_smem(r.documents.at[r.b, rows], target.at[slot], bar)

    def load_values(n):
        slot = lax.rem(n, VALUE_SLOTS)
        rows = pl.ds(n * CHUNK, CHUNK)
        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(r.value.at[r.b, rows, r.h], r.v_s.at[slot], r.values_full.at[slot])

    start = 0 * r.b  # traced: a slice that reaches over the end is refused if it is known
    load_keys(start)
    load_values(start)
    r.zero_s[...] = plgpu.layout_cast(jnp.zeros((CHUNK,), jnp.int32), ROWS)
    plgpu.commit_smem()

    def step(n, carry):
        # Masks are made anew wherever they are used: kept, they would take the registers of the tiles.
        slot, half = lax.rem(n, KEY_SLOTS), lax.rem(n, 2)

        @pl.when(n + 1 < config.chunks)
        def _():
            following = lax.rem(n + 1, KEY_SLOTS)
            pl.when(n + 1 >= KEY_SLOTS)(lambda: plgpu.barrier_wait(r.keys_free.at[following]))
            load_keys(n + 1)

        plgpu.barrier_wait(r.keys_full.at[slot])
        decay = _decay(config, r, slot)
        scores = matmul(r.q_s.at[slot], r.k_s.at[slot].T, SQUARE)
        pl.when(n >= 2)(lambda: plgpu.barrier_wait(r.squares_free.at[half]))
        row, column = _place(r)
        scores = jnp.where(row >= column, scores if decay is None else scores * decay, 0.0)
        scores = lax.optimization_barrier(scores)
        r.scores_s.at[half][...] = scores.astype(config.dtype)
        solve, inverse = _inverse(config, r, slot, half, decay)
        if config.save and not config.tied:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, block in enumerate(solve):
            r.solve_s.at[half, i][...] = block.astype(config.dtype)
        if config.save and config.tied:
            for i, block in enumerate(inverse):
                r.cosines_s.at[i][...] = block.astype(config.dtype)
        if config.save:
            plgpu.commit_smem()
            for i in range(CHUNK // BLOCK):
                source = r.cosines_s.at[i] if config.tied else r.solve_s.at[half, i]
                plgpu.copy_smem_to_gmem(source, r.inverse.at[r.b, r.h, n, :, pl.ds(i * BLOCK, BLOCK)])
        plgpu.commit_smem()
        plgpu.barrier_arrive(r.squares_full.at[half])

        @pl.when(n + 1 < config.chunks)
        def _():
            following = lax.rem(n + 1, VALUE_SLOTS)
            pl.when(n + 1 >= VALUE_SLOTS)(lambda: plgpu.barrier_wait(r.values_free.at[following]))
            load_values(n + 1)

        return carry

    lax.fori_loop(0, config.chunks, step, None)
    for n in range(max(config.chunks - KEY_SLOTS, 0), config.chunks):  # every phase must be seen to end
        plgpu.barrier_wait(r.keys_free.at[n % KEY_SLOTS])
    for n in range(max(config.chunks - 2, 0), config.chunks):
        plgpu.barrier_wait(r.values_free.at[n % VALUE_SLOTS])
        plgpu.barrier_wait(r.squares_free.at[n % 2])
    plgpu.wait_smem_to_gmem(0)


def _fresh(r):
    """A zero that the compiler cannot know. Masks and addresses made from it live only where they are used; else they
    would be made once, before the loop, and take the tiles' registers."""
    return r.zero_s[0]


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
    """What the state warpgroups solve with, and (saved, tied) the inverse of I + diag(c) M.

    Returns four column blocks [C, 16] and a [C, C] tile, float32. While the inverse is block diagonal, its blocks lie
    side by side in one [C, 16] tile, a quarter of the registers. Values per column are read from shared memory where
    they are used: kept, they would take the tiles' registers.
    """
    k_s = r.k_s.at[slot]
    gram = matmul(k_s, k_s.T, SQUARE)
    row, column = _place(r, BLOCK)
    square = jnp.sum(jnp.where((row & 15) == column, _diagonal(gram, row), 0.0), axis=1)
    norm = jnp.where(square > 0, jnp.sqrt(square), 1.0)
    inverse_norm = 1 / norm
    strength = plgpu.load(r.erase_r.at[slot], layout=ROWS) * square
    r.norm_s[...] = norm
    r.inverse_norm_s[...] = inverse_norm
    r.strength_s[...] = strength
    plgpu.commit_smem()
    over_columns = lambda ref: per_column(plgpu.load(ref, layout=COLS), SQUARE)
    cosines = gram * (per_row(inverse_norm, SQUARE) * over_columns(r.inverse_norm_s))
    if decay is not None:
        cosines = cosines * decay
    if config.tied and config.save:
        row, column = _place(r)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the inverse of the chunk before has left
        strict = jnp.where(row > column, cosines, 0.0).astype(config.dtype)
        for i in range(CHUNK // BLOCK):
            r.cosines_s.at[i][...] = strict[:, i * BLOCK : (i + 1) * BLOCK]
    lower = cosines * (over_columns(r.strength_s) if config.tied else per_row(strength, SQUARE))
    x = _ladder(r, lower)
    if not config.tied:
        over = lambda i: per_column(plgpu.load(r.norm_s, layout=COLS)[i * 16 : (i + 1) * 16], (CHUNK, BLOCK))
        return [block * (per_row(inverse_norm, (CHUNK, BLOCK)) * over(i)) for i, block in enumerate(x)], None
    over = lambda ref, i: per_column(plgpu.load(ref, layout=COLS)[i * BLOCK : (i + 1) * BLOCK], (CHUNK, BLOCK))
    inverse = None
    if config.save:
        low = [block.astype(config.dtype) for block in x]
        back = per_row(strength * -inverse_norm, (CHUNK, BLOCK))
        inverse = []
        for i in range(CHUNK // BLOCK):
            terms = [r.cosines_s.at[i, pl.ds(j * BLOCK, BLOCK)] for j in range(CHUNK // BLOCK)]
            linked = matmul(low, terms, (CHUNK, BLOCK), staged=r.bf16_stage) * (back * over(r.norm_s, i))
            row, column = _place(r, BLOCK)
            inverse.append(jnp.where(row == column + i * BLOCK, 1.0, linked))
    return [
        block * (per_row(norm, (CHUNK, BLOCK)) * over(r.inverse_norm_s, i)) for i, block in enumerate(x)
    ], inverse


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
    tile(1)[...] = _half(jnp.where(row < 32, lower[:, :16], lower[:, 32:48]))  # left of the diagonal, rows of odd blocks
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
