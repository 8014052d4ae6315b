"""The backward pass in one kernel: chunks are walked from the last to the first, every gradient is written once.

With U, E, R as in `pallas_kernels.hopper.forward`, dS' the cotangent of the state at the chunk's end and c = erase:

    g  = Pᵀ dO + e∘(K dS')      Y = Tᵀ g           X = c∘Y            (T = (I + diag(c) M)⁻¹, P with scale)
    dS = d dS' + scale (a∘dO)ᵀ Q - (a∘X)ᵀ K     dP = scale tril(D∘(dO Uᵀ))       Z = tril(D∘(X Uᵀ), -1)
    dQ = scale a∘(dO S) + dP K
    dK = e∘(U dS'ᵀ) - a∘(X Sᵀ) + dPᵀ Q - (Z + Zᵀ) K
    tied:   dV = X    dc = ⟨Y, E⟩ row by row
    untied: dV = Y    dc = -⟨k, a∘(Y Sᵀ)⟩ - Σ_j M_ij (Y Uᵀ)_ij

The inverse needs no derivative of its own: dM = -Z. Each state warpgroup carries 64 columns of dS as dSᵀ [64, K] in
registers through g, Y and dS; the helper makes P beforehand, then all that leaves the chunk. All have the 168 registers
a thread that three warpgroups start with.
"""

import math
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
    SQUARE,
    TILE,
    launch,
    matmul,
    part_of,
    per_column,
    per_row,
    place,
    smem,
    stage,
    write_numbers,
)

# φ₁'(x) = -Σ (n+1)(-x)ⁿ/(n+2)!, exact to float32 for x < NEAR
NEAR = 1 / 4
SLOPE = [-((-1.0) ** n) * (n + 1) / math.factorial(n + 2) for n in range(7)]


def backward(query, key, d_output, saved, vectors, documents, behind, *, scale, tied, share, exact=False):
    """Gradients of one call of `forward(..., save=True)`.

    Args:
        query, key: [B, T, Hk, K]; d_output [B, T, H, V], all of one type.
        saved: states, inverse, solved as `forward` returned them.
        vectors, documents: as given to `forward`, but with erase in place of gain and, if exact, besides erase and
            square, as `forward` returned them, beta.
        behind: [B, H, P, V, K] float32, the cotangent of the state behind each piece, or None for zeros.
        share: chunks of a piece, of which the last may have fewer. Pieces have blocks of threads of their own.

    Returns:
        name -> array. d_query, d_key: [B, T, H, K], one for every value head; d_value [B, T, H, V] (untied: of
        value times write); d_erase [B, H, N·64] float32 (exact: d_erase is of beta, and d_key has the key's
        part in λ); d_initial [B, H, V, K] float32. With log-decay (sums in vectors) also the
        cotangent of its sums, d_decay [B, H, N·64]; to the chunk's last token belong besides the sum over its ends
        [B, H, N·64] and the sum over V of whole [B, H, N, V].
    """
    batch, length, key_heads, key_dim = key.shape
    heads, value_dim = d_output.shape[2:]
    chunks = pl.cdiv(length, CHUNK)
    writers = value_dim // 64
    dtype = d_output.dtype
    masked, decayed, summed = documents is not None, "left" in vectors, "sums" in vectors
    inputs = dict(
        query=query, key=key, d_output=d_output, states=saved["states"], inverse=saved["inverse"],
        solved=saved["solved"], **{f"{name}_v": x for name, x in vectors.items()},
    )  # fmt: skip
    if masked:
        inputs["documents"] = documents
    if behind is not None:
        inputs["behind"] = behind
    per_token = jax.ShapeDtypeStruct((batch, heads, chunks * CHUNK), F32)
    outputs = dict(
        d_query=jax.ShapeDtypeStruct((batch, length, heads, key_dim), dtype),
        d_key=jax.ShapeDtypeStruct((batch, length, heads, key_dim), dtype),
        d_value=jax.ShapeDtypeStruct(d_output.shape, dtype),
        d_erase=per_token,
        d_initial=jax.ShapeDtypeStruct((batch, heads, value_dim, key_dim), F32),
    )
    if summed:
        outputs |= dict(
            d_decay=per_token, ends=per_token, whole=jax.ShapeDtypeStruct((batch, heads, chunks, value_dim), F32)
        )
    vector = plgpu.SMEM((CHUNK,), F32)
    parts = key_dim // 64
    copies = dict(
        q_s=smem((1, CHUNK, key_dim), dtype),
        k_s=smem((1, CHUNK, key_dim), dtype),
        o_s=smem((1, CHUNK, value_dim), dtype),
        u_s=smem((1, CHUNK, value_dim), dtype),
        h_s=smem((1, value_dim, key_dim), dtype),
        t_s=smem((1, *SQUARE), dtype),
        erase_c=vector,
        erase_r=vector,
        beta_r=vector if exact else None,
        square_r=vector if exact else None,
        left_c=vector if decayed else None,
        left_r=vector if decayed else None,
        right_c=vector if decayed else None,
        right_r=vector if decayed else None,
        sums_r=vector if summed else None,
        sums_c=vector if summed else None,
        documents_r=plgpu.SMEM((CHUNK,), jnp.int32) if masked else None,
        documents_c=plgpu.SMEM((CHUNK,), jnp.int32) if masked else None,
    )
    copies = {name: ref for name, ref in copies.items() if ref is not None}
    scratch = copies | dict(
        p_s=smem((1, *SQUARE), dtype),  # P, then Z
        dp_s=smem((1, *SQUARE), dtype),  # -dP
        y_s=smem((1, CHUNK, value_dim), dtype),  # Y, then X: the gradient of the values
        ds_s=smem((1, value_dim, key_dim), dtype),  # -dS'
        dq_s=smem((parts, *SQUARE), dtype),
        dk_s=smem((parts, *SQUARE), dtype),
        d_erase_s=vector,
        d_decay_s=vector if summed else None,
        ends_s=vector if summed else None,
        whole_s=plgpu.SMEM((value_dim,), F32) if summed else None,
        numbers_r=plgpu.SMEM((CHUNK,), jnp.int32),  # 0 … 63, to be read by rows and by columns
        numbers_c=plgpu.SMEM((CHUNK,), jnp.int32),
        full=plgpu.Barrier(num_arrivals=len(copies)),
        scores_ready=plgpu.Barrier(),
        state_ready=plgpu.Barrier(num_arrivals=writers),
        y_ready=plgpu.Barrier(num_arrivals=writers),
        inputs_free=plgpu.Barrier(num_arrivals=writers),
        helper_stage=stage(dtype),
        state_stage=stage(dtype, writers),
    )
    config = SimpleNamespace(
        chunks=chunks, group=heads // key_heads, key_dim=key_dim, value_dim=value_dim, writers=writers, helpers=1,
        parts=parts,
        dtype=dtype, scale=scale, tied=tied, masked=masked, decayed=decayed, summed=summed, exact=exact,
        given=behind is not None, share=share, copies=tuple(copies),
    )  # fmt: skip
    grid, roles = (batch, heads, pl.cdiv(chunks, share)), ((writers, _state), (1, _helper))
    return launch("efla_backward", config, inputs, outputs, scratch, grid, *roles)


def _state(config, r, w):
    """One state warpgroup: columns 64w … 64w+63 of dS."""
    columns = pl.ds(w * 64, 64)
    staged = part_of(r.state_stage, w)
    shape = (64, config.key_dim)
    if config.given:
        d_state = plgpu.load(r.behind.at[r.b, r.h, r.c, columns], layout=TILE, optimized=False)
    else:
        d_state = plgpu.layout_cast(jnp.zeros(shape, F32), TILE)

    def step(_, d_state):
        plgpu.barrier_wait(r.full)
        s = _tiles(r)
        low = d_state.astype(config.dtype)
        s.ds_s.at[columns][...] = (d_state * -1.0).astype(config.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(r.state_ready)
        d_update = matmul(low, s.k_s.T, SQUARE, staged=staged)
        if config.decayed:
            d_update = d_update * per_column(plgpu.load(r.right_c, layout=COLS), SQUARE)
        plgpu.barrier_wait(r.scores_ready)
        o_t = s.o_s.at[:, columns].T
        d_update = matmul(o_t, s.p_s, SQUARE, init=d_update, staged=staged)
        y = matmul(d_update.astype(config.dtype), s.t_s, SQUARE, staged=staged)
        s.y_s.at[:, columns].T[...] = y.astype(config.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(r.y_ready)
        left = lambda: per_column(plgpu.load(r.left_c, layout=COLS), SQUARE)
        x = y * per_column(plgpu.load(r.erase_c, layout=COLS) * -1.0, SQUARE)
        x = (x * left() if config.decayed else x).astype(config.dtype)
        if config.decayed or config.scale != 1:
            x = lax.optimization_barrier(x)
            o_t = plgpu.load(o_t, layout=TILE).astype(F32) * config.scale
            o_t = (o_t * left() if config.decayed else o_t).astype(config.dtype)
        if config.decayed:
            d_state = d_state * r.left_c[CHUNK - 1]
        new = matmul([o_t, x], [s.q_s, s.k_s], shape, init=d_state, staged=staged)
        plgpu.barrier_arrive(r.inputs_free)
        return new

    _, count = _piece(config, r)
    d_state = lax.fori_loop(0, count, step, d_state)

    @pl.when(r.c == 0)
    def _():
        r.d_initial.at[r.b, r.h, columns][...] = d_state


def _piece(config, r):
    """The first chunk of the block's piece, and how many it has."""
    first = r.c * config.share
    return first, jnp.minimum(config.share, config.chunks - first)


def _helper(config, r, i):
    """The helper warpgroup: copies, P, and everything that leaves the chunk but dS."""
    r = SimpleNamespace(**r.__dict__ | dict(helper_stage=part_of(r.helper_stage, i)))
    head = lax.div(r.h, config.group)
    vectors = ("erase_c", "erase_r", "beta_r", "square_r", "left_c", "left_r", "right_c", "right_r", "sums_r", "sums_c")

    def load(n):
        rows = pl.ds(n * CHUNK, CHUNK)
        plgpu.commit_smem()
        sources = dict(
            q_s=r.query.at[r.b, rows, head], k_s=r.key.at[r.b, rows, head], o_s=r.d_output.at[r.b, rows, r.h],
            u_s=r.solved.at[r.b, rows, r.h], h_s=r.states.at[r.b, r.h, n], t_s=r.inverse.at[r.b, r.h, n],
        )  # fmt: skip
        for name in config.copies:
            if name in vectors:
                source = getattr(r, name[:-1] + "v").at[r.b, r.h, rows]
            elif name.startswith("documents"):
                source = r.documents.at[r.b, rows]
            else:
                source = sources[name]
            target = getattr(r, name)
            plgpu.copy_gmem_to_smem(source, target.at[r.first] if name in sources else target, r.full)

    write_numbers(r)
    first, count = _piece(config, r)
    load(first + count - 1)

    def step(i, carry):
        n = first + count - 1 - i
        plgpu.barrier_wait(r.full)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _queries(config, r, n)
        _keys(config, r, n)
        plgpu.barrier_wait(r.inputs_free)
        pl.when(i + 1 < count)(lambda: load(n - 1))
        rows = pl.ds(n * CHUNK, CHUNK)
        for part in range(config.parts):
            columns = pl.ds(part * 64, 64)
            plgpu.copy_smem_to_gmem(r.dk_s.at[part], r.d_key.at[r.b, rows, r.h, columns], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        return carry

    lax.fori_loop(0, count, step, None)
    plgpu.wait_smem_to_gmem(0)


def _tiles(r):
    """The tiles of shared memory, at addresses that the compiler cannot know to be the same as before: the operands'
    descriptors are then made where they are used. Known, all of them would be made once and kept in registers."""
    zero = r.numbers_r[0]
    names = ("q_s", "k_s", "o_s", "u_s", "h_s", "y_s", "ds_s", "t_s", "p_s", "dp_s")
    return SimpleNamespace(**{name: getattr(r, name).at[zero] for name in names})


def _pairs(config, r, x, strict=False):
    """tril(D∘x), or below the diagonal only."""
    row, column = place(r)
    keep = row > column if strict else row >= column
    if config.masked:
        documents = plgpu.load(r.documents_r, layout=ROWS), plgpu.load(r.documents_c, layout=COLS)
        keep = keep & (per_row(documents[0], SQUARE) == per_column(documents[1], SQUARE))
    if config.summed:
        sums = plgpu.load(r.sums_r, layout=ROWS), plgpu.load(r.sums_c, layout=COLS)
        apart = jnp.where(keep, per_row(sums[0], SQUARE) - per_column(sums[1], SQUARE), -jnp.inf)
        return lax.optimization_barrier(x * jnp.exp2(apart))
    return lax.optimization_barrier(jnp.where(keep, x, 0.0))


def _queries(config, r, n):
    """P for the state warpgroups, dP, dQ."""
    staged = r.helper_stage
    low = lambda x: x.astype(config.dtype)
    s = _tiles(r)
    scores = matmul(s.q_s, s.k_s.T, SQUARE, staged=staged)
    s.p_s[...] = low(_pairs(config, r, scores) * config.scale)
    plgpu.commit_smem()
    plgpu.barrier_arrive(r.scores_ready)
    s = _tiles(r)
    d_scores = _times_updates(config, r, s, s.o_s)
    d_scores = _pairs(config, r, d_scores) * config.scale
    d_scores_low = low(d_scores)
    s.dp_s[...] = low(d_scores * -1.0)
    for part in range(config.parts):
        columns = pl.ds(part * 64, 64)
        s = _tiles(r)
        k_s, h_s = s.k_s.at[:, columns], s.h_s.at[:, columns]
        if config.decayed or config.scale != 1:
            read = matmul(s.o_s, h_s, SQUARE, staged=staged) * config.scale
            if config.decayed:
                read = read * _rows(r.left_r)
            d_query = matmul(d_scores_low, k_s, SQUARE, init=read, staged=staged)
        else:
            d_query = matmul([s.o_s, d_scores_low], [h_s, k_s], SQUARE, staged=staged)
        r.dq_s.at[part][...] = low(d_query)
        if config.summed:
            _add(r.d_decay_s, _row_dot(d_query, s.q_s.at[:, columns]), first=part == 0)
    plgpu.commit_smem()
    for part in range(config.parts):
        target = r.d_query.at[r.b, pl.ds(n * CHUNK, CHUNK), r.h, pl.ds(part * 64, 64)]
        plgpu.copy_smem_to_gmem(r.dq_s.at[part], target, commit_group=False)
    plgpu.commit_smem_to_gmem_group()


def _keys(config, r, n):
    """Gradients of the values, of erase and of the keys, once the state warpgroups have Y."""
    staged = r.helper_stage
    rows = pl.ds(n * CHUNK, CHUNK)
    plgpu.barrier_wait(r.state_ready)
    plgpu.barrier_wait(r.y_ready)
    diagonal = None
    if config.tied:
        d_erase = _values(config, r)  # and X in the place of Y
        if config.exact:
            d_erase, diagonal = _through_erase(r, d_erase)
        r.d_erase_s[...] = d_erase
        plgpu.commit_smem()
    s = _tiles(r)
    z = _times_updates(config, r, s, s.y_s)  # X Uᵀ, untied Y Uᵀ
    if not config.tied:
        gram = _pairs(config, r, matmul(s.k_s, s.k_s.T, SQUARE, staged=staged), strict=True)
        r.d_erase_s[...] = jnp.sum(gram * z, axis=1) * -1.0
        z = z * _rows(r.erase_r)
    z = _pairs(config, r, z, strict=True)
    if diagonal is not None:  # Z and Zᵀ both multiply K, so that the key's part in λ comes for free
        row, column = place(r)
        z = lax.optimization_barrier(jnp.where(row == column, per_row(diagonal, SQUARE), z))
    z_low = z.astype(config.dtype)
    s.p_s[...] = z_low
    plgpu.commit_smem()
    for part in range(config.parts):
        columns = pl.ds(part * 64, 64)
        s = _tiles(r)
        k_s, q_s = s.k_s.at[:, columns], s.q_s.at[:, columns]
        # everything of -dK: what the state at the chunk's start and what later tokens have of it
        recalled = matmul(s.y_s, s.h_s.at[:, columns], SQUARE, staged=staged)
        if config.decayed:
            recalled = recalled * _rows(r.left_r)
        if not config.tied:
            _add(r.d_erase_s, _row_dot(recalled * -1.0, k_s))
            recalled = recalled * _rows(r.erase_r)
        before = matmul(z_low, k_s, SQUARE, init=recalled, staged=staged)
        stored = matmul(s.u_s, s.ds_s.at[:, columns], SQUARE, staged=staged)
        if config.tied:
            stored = stored * _rows(r.erase_r)
        if config.decayed:
            stored = stored * _rows(r.right_r)
        if config.summed:
            _add(r.ends_s, _row_dot(stored * -1.0, k_s), first=part == 0)
        after = matmul([s.dp_s.T, s.p_s.T], [q_s, k_s], SQUARE, init=stored, staged=staged)
        r.dk_s.at[part][...] = ((before + after) * -1.0).astype(config.dtype)
        if config.summed:
            _add(r.d_decay_s, _row_dot(after - before, k_s))
    if config.summed:
        _whole(config, r)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(r.y_s.at[r.first], r.d_value.at[r.b, rows, r.h], commit_group=False)
    plgpu.copy_smem_to_gmem(r.d_erase_s, r.d_erase.at[r.b, r.h, rows], commit_group=False)
    if config.summed:
        plgpu.copy_smem_to_gmem(r.d_decay_s, r.d_decay.at[r.b, r.h, rows], commit_group=False)
        plgpu.copy_smem_to_gmem(r.ends_s, r.ends.at[r.b, r.h, rows], commit_group=False)
        plgpu.copy_smem_to_gmem(r.whole_s, r.whole.at[r.b, r.h, n], commit_group=False)


def _through_erase(r, d_erase):
    """Exact: the gradient of beta, and what Z holds on its diagonal for that of λ, -∂L/∂λ.

    With x = βλ: ∂erase/∂β = e^{-x}, ∂erase/∂λ = β² φ₁'(x), φ₁'(x) = (e^{-x} - φ₁(x))/x, by its series near 0.
    """
    beta, square = plgpu.load(r.beta_r, layout=ROWS), plgpu.load(r.square_r, layout=ROWS)
    erase = plgpu.load(r.erase_r, layout=ROWS)
    x = beta * square
    fades = jnp.exp(x * -1.0)
    near = jnp.where(x < NEAR, x, 0.0)
    series = jnp.zeros_like(x) + SLOPE[-1]
    for term in SLOPE[-2::-1]:
        series = series * near + term
    inverse_norm = lax.rsqrt(square)  # squared, one instruction and a product where a quotient is ten
    far = (beta * fades - erase) * (inverse_norm * inverse_norm)  # β² φ₁' = (β e^{-x} - erase)/λ
    slope = jnp.where(x < NEAR, beta * beta * series, far)
    return d_erase * fades, d_erase * slope * -1.0


def _rows(ref):
    """A vector of shared memory over the columns of a square."""
    return per_row(plgpu.load(ref, layout=ROWS), SQUARE)


def _add(ref, term, first=False):
    """ref += term, or = if first, for a vector of shared memory. The compiler does not put off a store; a sum kept in
    registers it works out where it is used, keeping until then the tiles that it is made of."""
    ref[...] = term if first else plgpu.load(ref, layout=ROWS) + term


def _row_dot(x, ref):
    """⟨x_i, ref_i⟩ of every row."""
    return jnp.sum(x * plgpu.load(ref, layout=TILE).astype(F32), axis=1)


def _times_updates(config, r, s, x):
    """x Uᵀ; tied, U = c∘E, and c is applied to the product's columns."""
    out = matmul(x, s.u_s.T, SQUARE, staged=r.helper_stage)
    return out * per_column(plgpu.load(r.erase_c, layout=COLS), SQUARE) if config.tied else out


def _values(config, r):
    """Tied: Y becomes X = c∘Y in place; returns ⟨Y, E⟩ of every row."""
    total = None
    for w in range(config.writers):
        columns = pl.ds(w * 64, 64)
        s = _tiles(r)
        y = plgpu.load(s.y_s.at[:, columns], layout=TILE).astype(F32)
        dot = _row_dot(y, s.u_s.at[:, columns])
        total = dot if total is None else total + dot
        s.y_s.at[:, columns][...] = (y * _rows(r.erase_r)).astype(config.dtype)
    return total


def _whole(config, r):
    """d⟨S, dS'⟩, a value for each column of the state."""
    for w in range(config.writers):
        total = None
        for part in range(config.parts):
            tile = pl.ds(w * 64, 64), pl.ds(part * 64, 64)
            s = _tiles(r)
            dot = _row_dot(plgpu.load(s.h_s.at[tile], layout=TILE).astype(F32), s.ds_s.at[tile])
            total = dot if total is None else total + dot
        r.whole_s.at[pl.ds(w * 64, 64)][...] = total * (r.left_c[CHUNK - 1] * -1.0)
