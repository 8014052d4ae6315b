"""Inverse of unit lower triangular blocks by forward substitution and block doubling, in plain array operations."""

import jax.numpy as jnp

_BASE = 16  # rows solved by substitution; above it two half-size inverses are merged by matrix products


def _substitute(lower):
    """(I + L)⁻¹ of [..., n, n] by forward substitution, a column at a time: once row j is solved, L_:j row_j goes off.

    Rank-one updates of whole blocks vectorise everywhere; sums over solved rows are 50 times slower on a CPU.
    """
    size = lower.shape[-1]
    rows = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    for j in range(size - 1):
        rows = rows - lower[..., :, j : j + 1] * rows[..., j : j + 1, :]
    return rows


def unit_lower_inverse(lower, dot):
    """(I + L)⁻¹ for strictly lower triangular L [..., C, C], C a power of two.

    Never by powers of L, which overflow where the inverse does not. dot is the batched product that merges use:
    [[A, 0], [L, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ L A⁻¹, D⁻¹]].
    """
    *batch, size, _ = lower.shape
    base = min(size, _BASE)
    count = size // base
    blocks = jnp.stack([lower[..., i * base : (i + 1) * base, i * base : (i + 1) * base] for i in range(count)], -3)
    inverse = _substitute(blocks).reshape(*batch, count, base, base)
    while count > 1:
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = jnp.stack(
            [lower[..., (i + 1) * base : (i + 2) * base, i * base : (i + 1) * base] for i in range(0, count, 2)],
            -3,
        )
        corner = -dot(second, dot(corner, first))
        top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)
        count, base = count // 2, base * 2
    return inverse[..., 0, :, :]
