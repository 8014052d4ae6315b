"""Kernels for Hopper GPUs (H100, H200) in Pallas Mosaic GPU: one for the forward pass, one for the backward pass."""

from pallas_kernels.hopper.mosaic import interpreting
from pallas_kernels.hopper.op import backward, forward, unsupported
from pallas_kernels.hopper.variants import variants

__all__ = ["backward", "forward", "interpreting", "unsupported", "variants"]
