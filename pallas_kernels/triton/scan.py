"""The forward scan over chunks, the state in registers, the output fused into it."""

import triton
import triton.language as tl

from pallas_kernels.triton.tiles import (
    end_decay,
    load_rows,
    load_square,
    load_vector,
    store_rows,
    store_square,
    token_offset,
)


@triton.jit
def scan(
    query, key, value, erase, write, inverse, weights, sums, documents, initial_state, T, H, key_heads,
    output, final_state, states, updates,
    SCALE: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DOCUMENTS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a row, value head and BV columns of V, which are fastest: they share query, key, T and P in
    the cache.

    SAVE writes what the backward wants: the states at chunk starts [B, chunks, H, K, V] and U [B, T, H, V], both as
    the products see them.
    """
    program = tl.program_id(0)
    column = program % (V // BV) * BV
    at_state = program // (V // BV)  # of [B, H]
    h = at_state % H
    b = at_state // H
    operand: tl.constexpr = inverse.dtype.element_ty
    chunks = tl.cdiv(T, C)

    state_KV = load_square(initial_state + at_state.to(tl.int64) * (K * V) + column, K, BV, V)
    for n in range(chunks):
        start = n * C
        at = token_offset(b, start, h, T, H)
        at_key = token_offset(b, start, h // (H // key_heads), T, key_heads) * K
        at_chunk = (b.to(tl.int64) * chunks + n) * H + h
        k_CK = load_rows(key + at_key, start, T, key_heads, C, K, K).to(operand)
        # every tile is loaded where it is used: where loads have one stage, what comes early is held, and spilled
        erase_C = load_vector(erase + at, start, T, H, C)
        write_C = load_vector(write + at, start, T, H, C)
        sums_C = load_vector(sums + at, start, T, H, C) if DECAY else erase_C
        left_C, right_C, total = end_decay(sums, documents, sums_C, b, h, start, T, H, C, DECAY, DOCUMENTS)

        before_KV = state_KV.to(operand)
        if SAVE:
            store_square(states + at_chunk * (K * V) + column, before_KV, K, BV, V)
        recalled_CV = tl.dot(k_CK, before_KV, input_precision=PRECISION)
        v_CV = load_rows(value + at * V + column, start, T, H, C, V, BV).to(tl.float32)
        asked_CV = write_C[:, None] * v_CV - (erase_C * left_C)[:, None] * recalled_CV
        inverse_CC = load_square(inverse + at_chunk * (C * C), C, C, C)
        update_CV = tl.dot(inverse_CC, asked_CV.to(operand), input_precision=PRECISION)
        if SAVE:
            store_rows(updates + at * V + column, update_CV.to(operand), start, T, H, C, V, BV)

        q_CK = load_rows(query + at_key, start, T, key_heads, C, K, K).to(operand)
        out_CV = (SCALE * left_C)[:, None] * tl.dot(q_CK, before_KV, input_precision=PRECISION)
        weights_CC = load_square(weights + at_chunk * (C * C), C, C, C)
        out_CV = tl.dot(weights_CC, update_CV.to(operand), acc=out_CV, input_precision=PRECISION)
        store_rows(output + at * V + column, out_CV, start, T, H, C, V, BV)

        if DECAY or DOCUMENTS:
            update_CV *= right_C[:, None]
            state_KV *= total
        state_KV = tl.dot(tl.trans(k_CK), update_CV.to(operand), acc=state_KV, input_precision=PRECISION)
    store_square(final_state + at_state.to(tl.int64) * (K * V) + column, state_KV, K, BV, V)
