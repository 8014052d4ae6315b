"""Kernels for TPUs in Pallas: forward pass, backward pass, decoding step."""

from pallas_kernels.tpu.device import NO_DEVICE, absent, interpreting
from pallas_kernels.tpu.op import backward, forward, unsupported
from pallas_kernels.tpu.variants import variants

__all__ = ["NO_DEVICE", "absent", "backward", "forward", "interpreting", "unsupported", "variants"]
