"""What the kernels share: reading tiles and vectors of [B, T, heads, D] arrays, and the decays of a chunk.

Sizes in capitals are compile-time: C tokens of a chunk, K and V features, BV the columns of V that a program holds.
T, H and heads are run-time numbers, so that one compiled kernel serves every length and head count. Offsets of a
chunk are 64-bit, those inside a chunk 32-bit. Names are shape-suffixed: k_CK is [C, K].
"""

import triton
import triton.language as tl


@triton.jit
def token_offset(b, start, h, T, heads):
    """Place of token `start` of row b and head h among the [B, T, heads] vectors of an array."""
    return (b.to(tl.int64) * T + start) * heads + h


@triton.jit
def load_rows(ptr, start, T, heads, C: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr):
    """[C, COLUMNS] of the tokens from `start` on, where ptr points to the first; zeros from T on."""
    i_C = tl.arange(0, C)
    j_N = tl.arange(0, COLUMNS)
    return tl.load(ptr + i_C[:, None] * (heads * D) + j_N[None, :], mask=(start + i_C < T)[:, None], other=0.0)


@triton.jit
def store_rows(ptr, x, start, T, heads, C: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `load_rows`: nothing is written from T on."""
    i_C = tl.arange(0, C)
    j_N = tl.arange(0, COLUMNS)
    tl.store(ptr + i_C[:, None] * (heads * D) + j_N[None, :], x, mask=(start + i_C < T)[:, None])


@triton.jit
def load_vector(ptr, start, T, heads, C: tl.constexpr):
    """[C] numbers of the tokens from `start` on; zeros from T on."""
    i_C = tl.arange(0, C)
    return tl.load(ptr + i_C * heads, mask=start + i_C < T, other=0.0)


@triton.jit
def store_vector(ptr, x, start, T, heads, C: tl.constexpr):
    i_C = tl.arange(0, C)
    tl.store(ptr + i_C * heads, x, mask=start + i_C < T)


@triton.jit
def load_square(ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """[ROWS, COLUMNS] of a contiguous matrix whose rows are STRIDE long."""
    return tl.load(ptr + tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def load_transposed(ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """[COLUMNS, ROWS], the transpose of what `load_square` gives."""
    return tl.load(ptr + tl.arange(0, ROWS)[None, :] * STRIDE + tl.arange(0, COLUMNS)[:, None])


@triton.jit
def store_square(ptr, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    tl.store(ptr + tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :], x)


@triton.jit
def load_documents(documents, b, start, T, C: tl.constexpr):
    """Documents of the chunk's tokens (-1 from T on), of its last one, and of the token before it (0 at the start)."""
    row = documents + b.to(tl.int64) * T
    i_C = tl.arange(0, C)
    doc_C = tl.load(row + start + i_C, mask=start + i_C < T, other=-1)
    doc_end = tl.load(row + tl.minimum(start + C, T) - 1)
    doc_before = tl.where(start > 0, tl.load(row + tl.maximum(start - 1, 0)), 0)
    return doc_C, doc_end, doc_before


@triton.jit
def reach(documents, b, start, T, C: tl.constexpr, DOCUMENTS: tl.constexpr):
    """[C, C] bool: j ≤ i in one document."""
    i_C = tl.arange(0, C)
    reach_CC = i_C[:, None] >= i_C[None, :]
    if DOCUMENTS:
        doc_C, _end, _before = load_documents(documents, b, start, T, C)
        reach_CC = reach_CC & (doc_C[:, None] == doc_C[None, :])
    return reach_CC


@triton.jit
def pair_decay(reach_CC, sums_C, DECAY: tl.constexpr):
    """D [C, C]: decay from j to i, 0 where j does not reach i."""
    if DECAY:
        pairs_CC = tl.where(reach_CC, tl.exp(sums_C[:, None] - sums_C[None, :]), 0.0)
    else:
        pairs_CC = tl.where(reach_CC, 1.0, 0.0)
    return pairs_CC


@triton.jit
def end_decay(
    sums, documents, sums_C, b, h, start, T, H, C: tl.constexpr, DECAY: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """Decays a [C] from the chunk's start to each token, e [C] from each to its end, d over all of it.

    1 throughout without decay and documents; callers then leave the products out. `sums` are the sums of log-decay
    that `prepare` wrote; they restart at document borders, so that no rounding of one document enters another.
    """
    if DECAY:
        sum_end = tl.load(sums + token_offset(b, tl.minimum(start + C, T) - 1, h, T, H))
        left_C = tl.exp(sums_C)
        right_C = tl.exp(sum_end - sums_C)
        total = tl.exp(sum_end)
    else:
        left_C = tl.full([C], 1.0, tl.float32)
        right_C = left_C
        total = 1.0
    if DOCUMENTS:
        doc_C, doc_end, doc_before = load_documents(documents, b, start, T, C)
        left_C = tl.where(doc_C == doc_before, left_C, 0.0)
        right_C = tl.where(doc_C == doc_end, right_C, 0.0)
        total = tl.where(doc_end == doc_before, total, 0.0)
    return left_C, right_C, total
