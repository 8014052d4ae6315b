"""Matrix products on the MXU, which multiplies bfloat16: a float32 operand goes in as a sum of bfloat16 pieces.

One piece each is one pass, 2^-9 relative; two pieces are three passes, 2^-16; three hold all 24 bits, six passes. A
bfloat16 operand is one piece whatever is asked for. Split here, not by the compiler, the products are the same when
interpreted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

F32, BF16 = jnp.float32, jnp.bfloat16


class Pieces(NamedTuple):
    """A matrix as a sum of bfloat16 matrices, the largest first."""

    parts: tuple[jax.Array, ...]


def split(x: jax.Array | Pieces, count: int) -> Pieces:
    """x in at most `count` pieces. All but the last are cut, not rounded: no compiler takes `x - cut(x)` for zero."""
    if isinstance(x, Pieces):
        return x
    if x.dtype == BF16 or count == 1:
        return Pieces((x.astype(BF16),))
    parts = []
    for _ in range(count - 1):
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        top = lax.bitcast_convert_type(bits, F32)
        parts.append(top.astype(BF16))
        x = x - top
    return Pieces((*parts, x.astype(BF16)))


def _joined(axis: int, *matrices: Pieces) -> Pieces:
    """Matrices side by side; one with fewer pieces than another has zeros for the rest."""
    count = max(len(x.parts) for x in matrices)
    rows = [x.parts + (jnp.zeros_like(x.parts[0]),) * (count - len(x.parts)) for x in matrices]
    return Pieces(tuple(jnp.concatenate(parts, axis) for parts in zip(*rows, strict=True)))


def above(*matrices: Pieces) -> Pieces:
    """The matrices one above the other: a product with them loads the other operand once."""
    return _joined(0, *matrices)


def beside(*matrices: Pieces) -> Pieces:
    """The matrices side by side."""
    return _joined(1, *matrices)


class Products(NamedTuple):
    """Products of matrices that are given as arrays or as pieces, summed in float32."""

    pieces: int

    def split(self, x: jax.Array) -> Pieces:
        return split(x, self.pieces)

    def nn(self, x, y):
        """x y."""
        return self._sum(x, y, (1, 0))

    def nt(self, x, y):
        """x yᵀ."""
        return self._sum(x, y, (1, 1))

    def tn(self, x, y):
        """xᵀ y."""
        return self._sum(x, y, (0, 0))

    def _sum(self, x, y, contract):
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        x, y = self.split(x), self.split(y)
        pairs = [(i + j, a, b) for i, a in enumerate(x.parts) for j, b in enumerate(y.parts)]
        total = None
        for place, a, b in sorted(pairs, key=lambda pair: -pair[0]):  # the small terms first
            if place < self.pieces:
                term = lax.dot_general(a, b, dimensions, preferred_element_type=F32)
                total = term if total is None else total + term
        assert total is not None
        return total
