"""The backward: a reverse scan over chunks for what is serial, then the gradients of all chunks at once.

With Y = Tᵀ dU and Z = Y Uᵀ the inverse needs no derivative of its own: dM = -c ∘ tril(Z, -1). The scan writes dS', the
cotangent of the state at every chunk's end, and Y, so that what remains is parallel: two C × C × V products, three
C × K × V ones and four C × C × K ones a chunk.
"""

import triton
import triton.language as tl

from pallas_kernels.triton.tiles import (
    end_decay,
    load_documents,
    load_rows,
    load_square,
    load_transposed,
    load_vector,
    pair_decay,
    reach,
    store_rows,
    store_square,
    store_vector,
    token_offset,
)


@triton.jit
def reverse_scan(
    query, key, erase, inverse, weights, sums, documents, d_output, d_state, T, H, key_heads,
    d_initial_state, d_states, solved,
    SCALE: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs as in `scan`. Writes dS' [B, chunks, H, K, V] and Y [B, T, H, V] as products see them."""
    program = tl.program_id(0)
    column = program % (V // BV) * BV
    at_state = program // (V // BV)  # of [B, H]
    h = at_state % H
    b = at_state // H
    operand: tl.constexpr = inverse.dtype.element_ty
    chunks = tl.cdiv(T, C)

    d_state_KV = load_square(d_state + at_state.to(tl.int64) * (K * V) + column, K, BV, V)
    for done in range(chunks):
        n = chunks - 1 - done
        start = n * C
        at = token_offset(b, start, h, T, H)
        at_key = token_offset(b, start, h // (H // key_heads), T, key_heads) * K
        at_chunk = (b.to(tl.int64) * chunks + n) * H + h
        q_CK = load_rows(query + at_key, start, T, key_heads, C, K, K).to(operand)
        k_CK = load_rows(key + at_key, start, T, key_heads, C, K, K).to(operand)
        d_out_CV = load_rows(d_output + at * V + column, start, T, H, C, V, BV)
        # their transposes: products take A operands that lie so, at no cost
        inverse_CC = load_transposed(inverse + at_chunk * (C * C), C, C, C)
        weights_CC = load_transposed(weights + at_chunk * (C * C), C, C, C)
        erase_C = load_vector(erase + at, start, T, H, C)
        sums_C = load_vector(sums + at, start, T, H, C) if DECAY else erase_C
        left_C, right_C, total = end_decay(sums, documents, sums_C, b, h, start, T, H, C, DECAY, DOCUMENTS)

        after_KV = d_state_KV.to(operand)
        store_square(d_states + at_chunk * (K * V) + column, after_KV, K, BV, V)
        d_update_CV = tl.dot(k_CK, after_KV, input_precision=PRECISION)
        if DECAY or DOCUMENTS:
            d_update_CV *= right_C[:, None]
        d_update_CV = tl.dot(weights_CC, d_out_CV.to(operand), acc=d_update_CV, input_precision=PRECISION)
        solved_CV = tl.dot(inverse_CC, d_update_CV.to(operand), input_precision=PRECISION)
        store_rows(solved + at * V + column, solved_CV.to(operand), start, T, H, C, V, BV)

        if DECAY or DOCUMENTS:
            d_state_KV *= total
        d_read_CV = (SCALE * left_C)[:, None] * d_out_CV.to(tl.float32)
        d_state_KV = tl.dot(tl.trans(q_CK), d_read_CV.to(operand), acc=d_state_KV, input_precision=PRECISION)
        d_recalled_CV = (-erase_C * left_C)[:, None] * solved_CV
        d_state_KV = tl.dot(tl.trans(k_CK), d_recalled_CV.to(operand), acc=d_state_KV, input_precision=PRECISION)
    store_square(d_initial_state + at_state.to(tl.int64) * (K * V) + column, d_state_KV, K, BV, V)


@triton.jit
def _pair_products(
    value, updates, d_output, solved, d_value, write_C, start, T, H, part,
    C: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, operand: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What goes through pairs of a chunk's tokens: dO Uᵀ and Y Uᵀ [C, C], and dw [C] of the columns of V that fall to
    this part, which writes their dV = w ∘ Y. Pointers are to the chunk's first element."""
    d_weights_CC = tl.zeros([C, C], tl.float32)
    z_CC = tl.zeros([C, C], tl.float32)
    d_write_C = tl.zeros([C], tl.float32)
    for column in range(0, V, BV):
        u_CV = load_rows(updates + column, start, T, H, C, V, BV)
        y_CV = load_rows(solved + column, start, T, H, C, V, BV)
        d_out_CV = load_rows(d_output + column, start, T, H, C, V, BV).to(operand)
        d_weights_CC = tl.dot(d_out_CV, tl.trans(u_CV), acc=d_weights_CC, input_precision=PRECISION)
        z_CC = tl.dot(y_CV, tl.trans(u_CV), acc=z_CC, input_precision=PRECISION)
        if column // BV % PARTS == part:
            v_CV = load_rows(value + column, start, T, H, C, V, BV).to(tl.float32)
            d_write_C += tl.sum(y_CV.to(tl.float32) * v_CV, axis=1)
            store_rows(d_value + column, write_C[:, None] * y_CV.to(tl.float32), start, T, H, C, V, BV)
    return d_weights_CC, z_CC, d_write_C


@triton.jit
def _state_products(
    updates, d_output, solved, states, d_states, start, T, H,
    C: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, operand: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What goes through the states before and after a chunk: dO Sᵀ, Y Sᵀ and U dS'ᵀ [C, BK], and ⟨S, dS'⟩. Pointers as
    in `_pair_products`."""
    d_read_CK = tl.zeros([C, BK], tl.float32)
    y_state_CK = tl.zeros([C, BK], tl.float32)
    d_end_CK = tl.zeros([C, BK], tl.float32)
    whole = 0.0
    for column in range(0, V, BV):
        state_VK = load_transposed(states + column, BK, BV, V)
        d_state_VK = load_transposed(d_states + column, BK, BV, V)
        d_out_CV = load_rows(d_output + column, start, T, H, C, V, BV).to(operand)
        y_CV = load_rows(solved + column, start, T, H, C, V, BV)
        u_CV = load_rows(updates + column, start, T, H, C, V, BV)
        d_read_CK = tl.dot(d_out_CV, state_VK, acc=d_read_CK, input_precision=PRECISION)
        y_state_CK = tl.dot(y_CV, state_VK, acc=y_state_CK, input_precision=PRECISION)
        d_end_CK = tl.dot(u_CV, d_state_VK, acc=d_end_CK, input_precision=PRECISION)
        if DECAY:
            whole += tl.sum(tl.sum(state_VK.to(tl.float32) * d_state_VK.to(tl.float32), axis=1), axis=0)
    return d_read_CK, y_state_CK, d_end_CK, whole


@triton.jit
def _add_in_document(sum_a, doc_a, sum_b, doc_b):
    """Combines two runs of tokens for a sum that starts anew with every document."""
    return sum_b + tl.where(doc_a == doc_b, sum_a, 0.0), doc_b


@triton.jit
def _later_less_earlier(q_CK, d_query_CK, k_CK, d_key_CK):
    """⟨q, dQ⟩ - ⟨k, dK⟩ [C]."""
    return tl.sum(q_CK.to(tl.float32) * d_query_CK - k_CK.to(tl.float32) * d_key_CK, axis=1)


@triton.jit
def gradients(
    query, key, value, erase, write, sums, documents, states, updates, d_output, d_states, solved,
    T, H, key_heads,
    d_query, d_key, d_value, d_erase, d_write, d_log_decay,
    SCALE: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GROUPED: tl.constexpr, DECAY: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program BK columns of K, a key head and a chunk, in this order; it sums over the value heads that read the
    key head, several if GROUPED. d_erase, d_write and d_log_decay [K / BK, B, T, H] are sums of which each program
    gives its part: over its columns of K, and over columns of V that programs share out.

    Neither K Kᵀ nor Q Kᵀ is formed: ⟨k_i, (Z K)_i⟩ is what a row of M ∘ Z sums to. So are the sums behind d_log_decay:
    every decay is exp of a difference of two sums of log-decay, and its cotangent times itself counts for the later
    one and, negated, for the earlier; over all decays of a chunk that is ⟨q, dQ⟩ - ⟨k, dK⟩ + 2 c dc.
    """
    program = tl.program_id(0)
    part = program % (K // BK)
    key_head = program // (K // BK) % key_heads
    chunks = tl.cdiv(T, C)
    n = program // (K // BK) // key_heads % chunks
    b = program // (K // BK) // key_heads // chunks
    start = n * C
    batch = tl.num_programs(0) // (chunks * (K // BK) * key_heads)
    operand: tl.constexpr = states.dtype.element_ty
    i_C = tl.arange(0, C)

    at_key = token_offset(b, start, key_head, T, key_heads) * K + part * BK
    all_query_CK = tl.zeros([C, BK], tl.float32)
    all_key_CK = tl.zeros([C, BK], tl.float32)
    group = H // key_heads if GROUPED else 1
    # what does not depend on the head stays in the loop: hoisted, it is spilled
    for shared in tl.range(0, group, disable_licm=True):
        h = key_head * group + shared
        at = token_offset(b, start, h, T, H)
        at_part = at + part * batch.to(tl.int64) * T * H
        at_chunk = (b.to(tl.int64) * chunks + n) * H + h
        at_state = (at_chunk * K + part * BK) * V
        write_C = load_vector(write + at, start, T, H, C)
        d_weights_CC, z_CC, d_write_C = _pair_products(
            value + at * V, updates + at * V, d_output + at * V, solved + at * V, d_value + at * V,
            write_C, start, T, H, part, C, V, BV, K // BK, operand, PRECISION,
        )  # fmt: skip
        store_vector(d_write + at_part, d_write_C, start, T, H, C)

        # loaded only here, though heads share query and key: what lives through the loops is spilled
        q_CK = load_rows(query + at_key, start, T, key_heads, C, K, BK).to(operand)
        k_CK = load_rows(key + at_key, start, T, key_heads, C, K, BK).to(operand)
        erase_C = load_vector(erase + at, start, T, H, C)
        sums_C = load_vector(sums + at, start, T, H, C) if DECAY else erase_C
        left_C, right_C, total = end_decay(sums, documents, sums_C, b, h, start, T, H, C, DECAY, DOCUMENTS)
        pairs_CC = pair_decay(reach(documents, b, start, T, C, DOCUMENTS), sums_C, DECAY)
        d_scores_CC = (SCALE * pairs_CC * d_weights_CC).to(operand)
        z_CC = tl.where(i_C[:, None] != i_C[None, :], pairs_CC * z_CC, 0.0)
        d_query_CK = tl.dot(d_scores_CC, k_CK, input_precision=PRECISION)
        d_key_CK = tl.dot(tl.trans(d_scores_CC), q_CK, input_precision=PRECISION)
        d_gram_CC = (-erase_C[:, None] * z_CC).to(operand)
        d_key_CK = tl.dot(tl.trans(d_gram_CC), k_CK, acc=d_key_CK, input_precision=PRECISION)
        z_key_CK = tl.dot(z_CC.to(operand), k_CK, input_precision=PRECISION)
        d_erase_C = -tl.sum(z_key_CK * k_CK.to(tl.float32), axis=1)
        d_key_CK -= erase_C[:, None] * z_key_CK
        d_sums_C = _later_less_earlier(q_CK, d_query_CK, k_CK, d_key_CK) if DECAY else erase_C
        all_query_CK += d_query_CK
        all_key_CK += d_key_CK

        d_read_CK, y_state_CK, d_end_CK, whole = _state_products(
            updates + at * V, d_output + at * V, solved + at * V, states + at_state, d_states + at_state,
            start, T, H, C, V, BK, BV, DECAY, operand, PRECISION,
        )  # fmt: skip
        if DECAY or DOCUMENTS:
            d_end_CK *= right_C[:, None]
        d_query_CK = (SCALE * left_C)[:, None] * d_read_CK
        d_key_CK = d_end_CK - (erase_C * left_C)[:, None] * y_state_CK
        d_erase_C -= left_C * tl.sum(y_state_CK * k_CK.to(tl.float32), axis=1)
        store_vector(d_erase + at_part, d_erase_C, start, T, H, C)
        if DECAY:
            d_sums_C += _later_less_earlier(q_CK, d_query_CK, k_CK, d_key_CK)
            d_sums_C += 2.0 * erase_C * d_erase_C
            end_total = total * whole + tl.sum(tl.sum(d_end_CK * k_CK.to(tl.float32), axis=1), axis=0)
            d_sums_C += tl.where(i_C == tl.minimum(T - start, C) - 1, end_total, 0.0)
            # a log-decay enters the sums of its own token and of those behind it in its document
            if DOCUMENTS:
                doc_C, _end, _before = load_documents(documents, b, start, T, C)
                behind_C, _doc = tl.associative_scan((d_sums_C, doc_C), 0, _add_in_document, reverse=True)
            else:
                behind_C = tl.cumsum(d_sums_C, axis=0, reverse=True)
            store_vector(d_log_decay + at_part, behind_C, start, T, H, C)
        all_query_CK += d_query_CK
        all_key_CK += d_key_CK
    store_rows(d_query + at_key, all_query_CK, start, T, key_heads, C, K, BK)
    store_rows(d_key + at_key, all_key_CK, start, T, key_heads, C, K, BK)
