"""Kernels for Hopper GPUs (H100, H200) in Pallas Mosaic GPU: forward pass, backward pass, decoding step."""

from pallas_kernels.hopper.mosaic import interpreting
from pallas_kernels.hopper.op import backward, forward, unsupported
from pallas_kernels.hopper.variants import variants

__all__ = ["backward", "forward", "interpreting", "unsupported", "variants"]
