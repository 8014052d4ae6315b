"""What a kernel does, for `cost_estimate`: XLA plans with it, and counts the FLOPs of a program by it.

FLOPs are those of the products on the MXU, every pass counted (of decoding, of the vector units, by the formula); bytes
are the arrays, each moved once.
"""

from collections.abc import Iterable
from typing import Any

import jax.experimental.pallas as pl

from pallas_kernels.tpu.config import Config
from pallas_kernels.tpu.inverse import BLOCK

WIDE, NARROW = False, True  # operands: made in float32, or as the inputs are


def _bytes(arrays: Iterable[Any]) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)


class _Flops:
    """Sums FLOPs of products of [rows, inner] and [inner, columns]."""

    def __init__(self, config: Config, narrow: bool):
        """narrow: the inputs are bfloat16, one piece each."""
        self.pieces, self.narrow, self.total = config.pieces, narrow, 0

    def add(self, rows: int, inner: int, columns: int, left: bool, right: bool) -> None:
        counts = [1 if one and self.narrow else self.pieces for one in (left, right)]
        passes = sum(i + j < self.pieces for i in range(counts[0]) for j in range(counts[1]))
        self.total += 2 * rows * inner * columns * passes


def _inverse(flops: _Flops, size: int) -> None:
    block = BLOCK
    while block < size:
        for _ in range(2):
            flops.add(size // 2, size, size, WIDE, WIDE)
        block *= 2


def forward_cost(config: Config, steps: int, arrays: Iterable[Any], narrow: bool) -> pl.CostEstimate:
    """steps: B · groups · chunks. arrays: inputs and outputs."""
    c, k, v = config.chunk, config.key_dim, config.value_dim
    shared, head = _Flops(config, narrow), _Flops(config, narrow)
    shared.add(2 * c, k, c, NARROW, NARROW)  # K Kᵀ and Q Kᵀ
    _inverse(head, c)
    head.add(2 * c, k, v, NARROW, WIDE)  # K S and Q S
    head.add(c, c, v, WIDE, WIDE)  # U
    if config.decay or config.documents:
        head.add(c, c, v, WIDE, WIDE)  # P U
        head.add(k, c, v, NARROW, WIDE)  # Kᵀ (e∘U)
    else:
        head.add(c + k, c, v, WIDE, WIDE)
    exponentials = config.heads * (2 * c * c + 2 * c) if config.decay else 0
    return _estimate(config, steps, shared, head, exponentials, arrays)


def backward_cost(config: Config, steps: int, arrays: Iterable[Any], narrow: bool) -> pl.CostEstimate:
    """As `forward_cost`."""
    c, k, v = config.chunk, config.key_dim, config.value_dim
    shared, head = _Flops(config, narrow), _Flops(config, narrow)
    shared.add(c, k, 2 * c, NARROW, NARROW)  # K Kᵀ and K Qᵀ
    head.add(c, k, 2 * v, NARROW, WIDE)  # K S and K dS'
    head.add(c, c, v, WIDE, WIDE)  # U
    head.add(c, c, v, WIDE, NARROW)  # Pᵀ dO
    head.add(c, c, v, WIDE, WIDE)  # Y
    head.add(2 * c, v, k, WIDE, WIDE)  # Y Sᵀ and dR Sᵀ
    head.add(2 * c, v, c, WIDE, WIDE)  # Y Uᵀ and dO Uᵀ
    head.add(k, 2 * c, v, NARROW, WIDE)  # what goes to dS
    head.add(2 * c, c, k, WIDE, NARROW)  # F K and (G + Gᵀ) K
    head.add(c, c, k, WIDE, NARROW)  # Fᵀ Q
    head.add(c, v, k, WIDE, WIDE)  # (e∘U) dS'ᵀ
    exponentials = config.heads * (3 * c * c + 2 * c) if config.decay else 0
    return _estimate(config, steps, shared, head, exponentials, arrays)


def _estimate(config, steps, shared, head, exponentials, arrays):
    flops = steps * (config.key_heads * shared.total + config.heads * head.total)
    return pl.CostEstimate(flops=flops, transcendentals=steps * exponentials, bytes_accessed=_bytes(arrays))


def decode_cost(inputs: Iterable[Any], outputs: Iterable[Any], state: Any) -> pl.CostEstimate:
    """Of `state` [B, H, K, V]: S k, the rank-one term and S q take two FLOPs a number each."""
    return pl.CostEstimate(flops=6 * state.size, transcendentals=0, bytes_accessed=_bytes(inputs) + _bytes(outputs))
