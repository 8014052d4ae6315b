"""What a chunk gives before any state is known: T = (I + diag(c) M)⁻¹ with M = tril(D ∘ K Kᵀ, -1), the weights
P = scale · tril(D ∘ Q Kᵀ), and the sums of log-decay. All chunks at once: scans are serial and do none of it."""

import triton
import triton.language as tl

from pallas_kernels.triton.tiles import (
    load_rows,
    load_vector,
    pair_decay,
    reach,
    store_square,
    store_vector,
    token_offset,
)


@triton.jit
def _invert_diagonal(lower_CC, C: tl.constexpr):
    """(I + L)⁻¹ of the 16 × 16 blocks on the diagonal of L [C, C], zero elsewhere, by forward substitution in float32.

    A column at a time, all blocks at once: once row j is solved, L_:j row_j goes off.
    """
    N: tl.constexpr = C // 16
    block_N = tl.arange(0, N)
    place = tl.arange(0, 16)
    on_diagonal = block_N[:, None, None, None] == block_N[None, None, :, None]
    lower_N16 = tl.sum(tl.where(on_diagonal, tl.reshape(lower_CC, (N, 16, N, 16)), 0.0), axis=2)
    rows_N16 = tl.where(place[None, :, None] == place[None, None, :], 1.0, 0.0) + tl.zeros([N, 16, 16], tl.float32)
    for j in range(15):
        column = tl.sum(tl.where(place[None, None, :] == j, lower_N16, 0.0), axis=2)
        row = tl.sum(tl.where(place[None, :, None] == j, rows_N16, 0.0), axis=1)
        rows_N16 -= column[:, :, None] * row[:, None, :]
    return tl.reshape(tl.where(on_diagonal, rows_N16[:, :, None, :], 0.0), (C, C))


@triton.jit
def _merge(inverse_CC, lower_CC, HALF: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses of the HALF × HALF blocks on the diagonal -> those of the blocks of twice the size.

    [[A, 0], [L, B]]⁻¹ = [[A⁻¹, 0], [-B⁻¹ L A⁻¹, B⁻¹]] for all pairs at once.
    """
    i_C = tl.arange(0, C)
    pair = i_C[:, None] // (2 * HALF) == i_C[None, :] // (2 * HALF)
    corner = pair & (i_C[:, None] // HALF != i_C[None, :] // HALF)
    solved_CC = tl.dot(inverse_CC, tl.where(corner, lower_CC, 0.0), input_precision=PRECISION)
    return inverse_CC - tl.dot(solved_CC, inverse_CC, input_precision=PRECISION)


@triton.jit
def unit_lower_inverse(lower_CC, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)⁻¹ for strictly lower triangular L [C, C] float32; never by powers of L, which may overflow."""
    inverse_CC = _invert_diagonal(lower_CC, C)
    if C > 16:
        inverse_CC = _merge(inverse_CC, lower_CC, 16, C, PRECISION)
    if C > 32:
        inverse_CC = _merge(inverse_CC, lower_CC, 32, C, PRECISION)
    return inverse_CC


@triton.jit
def prepare(
    query, key, erase, log_decay, documents, T, H, key_heads,
    inverse, weights, sums,
    SCALE: tl.constexpr, C: tl.constexpr, K: tl.constexpr, DECAY: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a chunk and value head, heads fastest. Writes T and P [B, chunks, H, C, C] and sums [B, T, H]."""
    program = tl.program_id(0)
    h = program % H
    chunks = tl.cdiv(T, C)
    n = program // H % chunks
    b = program // H // chunks
    start = n * C
    at = token_offset(b, start, h, T, H)
    at_key = token_offset(b, start, h // (H // key_heads), T, key_heads) * K
    at_square = program.to(tl.int64) * (C * C)
    operand: tl.constexpr = inverse.dtype.element_ty

    reach_CC = reach(documents, b, start, T, C, DOCUMENTS)
    sums_C = tl.zeros([C], tl.float32)
    if DECAY:
        log_decay_C = load_vector(log_decay + at, start, T, H, C)
        sums_C = tl.sum(tl.where(reach_CC, log_decay_C[None, :], 0.0), axis=1)
        store_vector(sums + at, sums_C, start, T, H, C)
    pairs_CC = pair_decay(reach_CC, sums_C, DECAY)

    k_CK = load_rows(key + at_key, start, T, key_heads, C, K, K)
    i_C = tl.arange(0, C)
    erase_C = load_vector(erase + at, start, T, H, C)
    lower_CC = tl.where(i_C[:, None] != i_C[None, :], erase_C[:, None] * pairs_CC, 0.0)
    lower_CC *= tl.dot(k_CK, tl.trans(k_CK), input_precision=PRECISION)
    q_CK = load_rows(query + at_key, start, T, key_heads, C, K, K)
    scores_CC = tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION)
    store_square(weights + at_square, (SCALE * pairs_CC * scores_CC).to(operand), C, C, C)
    inverse_CC = unit_lower_inverse(lower_CC, C, PRECISION)
    store_square(inverse + at_square, inverse_CC.to(operand), C, C, C)
