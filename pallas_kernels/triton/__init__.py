"""The chunkwise delta rule in Triton, through jax-triton: bfloat16 and float16 on NVIDIA GPUs from sm_80 on.

Four kernels: `prepare` (T and P of every chunk), `scan` (states and output), and for the backward `reverse_scan` and
`gradients`. Nothing here imports Triton before it is called.
"""

import functools

from pallas_kernels.triton.tiling import OLDEST, declines

__all__ = ["backward", "declines", "forward", "unavailable"]


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None: packages that are missing or fail, no GPU, one too old."""
    try:
        from pallas_kernels.triton import host
    except ImportError as error:
        return f"jax-triton cannot be imported ({error}); install the extra 'triton'"
    try:
        found = host.capability()
    except RuntimeError as error:
        return f"there is no NVIDIA GPU ({str(error).splitlines()[0]})"
    return None if found >= OLDEST else f"the GPU is sm_{found}; it needs sm_{OLDEST} or newer"


def forward(query, key, value, erase, write, log_decay, initial_state, documents, *, scale: float, save: bool):
    """Output, final state and, with `save`, what the backward needs.

    Args:
        query, key: [B, T, Hk, K] bfloat16 or float16, T ≥ 1, B ≥ 1.
        value: [B, T, H, V] of the same type; value head h reads key head h // (H / Hk).
        erase, write: [B, T, H] float32.
        log_decay: [B, T, H] float32 ≤ 0, or None, which leaves decay out of the kernels.
        initial_state: [B, H, K, V] float32.
        documents: [B, T] int32, how many documents began in the row up to the token, 0 at token 0; None for one.
        scale: factor on the output.
        save: whether residuals are wanted.

    Returns:
        (output [B, T, H, V] in value's type, final_state [B, H, K, V] float32, residuals: a tuple of arrays).
    """
    from pallas_kernels.triton import host, launch

    x = launch.Inputs(query, key, value, erase, write, log_decay, initial_state, documents)
    capability = host.capability()
    return launch.forward(host.caller(capability), capability, x, scale=scale, save=save)


def backward(
    query, key, value, erase, write, log_decay, initial_state, documents, residuals, d_output, d_state, *, scale: float
):
    """Gradients of `forward`'s inputs from the cotangents of its output (value's type) and final state (float32).

    Returns:
        (d_query, d_key, d_value in their inputs' types, d_erase, d_write, d_log_decay [B, T, H] float32 or None,
        d_initial_state [B, H, K, V] float32).
    """
    from pallas_kernels.triton import host, launch

    x = launch.Inputs(query, key, value, erase, write, log_decay, initial_state, documents)
    capability = host.capability()
    return launch.backward(host.caller(capability), capability, x, residuals, (d_output, d_state), scale=scale)
