"""The chunkwise delta rule in Triton, through jax-triton: bfloat16 and float16 on NVIDIA GPUs from sm_80 on.

Four kernels: `prepare` (T and P of every chunk), `scan` (states and output), and for the backward `reverse_scan` and
`gradients`. Nothing here imports Triton before it is called.
"""

import functools

from pallas_kernels.triton.tiling import OLDEST, capability, unsupported

__all__ = ["NO_DEVICE", "absent", "backward", "forward", "missing", "unsupported"]


NO_DEVICE = f"it needs an NVIDIA GPU of compute capability {OLDEST / 10} or higher"


@functools.cache
def missing() -> str | None:
    """Why this process cannot compile the kernels, or None: jax-triton is not installed or fails to import."""
    try:
        from pallas_kernels.triton import host  # noqa: F401
    except Exception as error:  # of versions that do not fit each other anything may come
        return f"jax-triton cannot be imported ({type(error).__name__}: {error}); install the extra 'triton'"
    return None


def absent() -> str | None:
    """Why the kernels cannot run on this process's default device, or None."""
    found = capability()
    if found is None:
        return NO_DEVICE
    return None if found >= OLDEST else f"{NO_DEVICE}; this one has {found / 10}"


def forward(query, key, value, erase, write, log_decay, initial_state, begins, *, scale: float, save: bool):
    """Output, final state and, with `save`, what the backward needs.

    Args:
        query, key: [B, T, Hk, K] bfloat16 or float16, T ≥ 1, B ≥ 1.
        value: [B, T, H, V] of the same type; value head h reads key head h // (H / Hk).
        erase: [B, T, H] float32. write: likewise, or None where it is erase.
        log_decay: [B, T, H] float32 ≤ 0, or None, which leaves decay out of the kernels.
        initial_state: [B, H, K, V] float32, or None for zeros.
        begins: [B, T] bool, whether a document begins with the token, not with token 0; None for one document.
        scale: factor on the output.
        save: whether residuals are wanted.

    Returns:
        (output [B, T, H, V] in value's type, final_state [B, H, K, V] float32, residuals: a tuple of arrays).
    """
    from pallas_kernels.triton import launch

    x = launch.Inputs(query, key, value, erase, write, log_decay, initial_state, launch.numbered(begins))
    return launch.forward(*_target(), x, scale=scale, save=save)


def backward(
    query, key, value, erase, write, log_decay, initial_state, begins, residuals, d_output, d_state, *, scale: float
):
    """Gradients of `forward`'s inputs from the cotangents of its output (value's type) and final state (float32).

    Returns:
        (d_query, d_key, d_value in their inputs' types, d_erase, d_write, d_log_decay [B, T, H] float32,
        d_initial_state [B, H, K, V] float32), None where the input is None.
    """
    from pallas_kernels.triton import launch

    x = launch.Inputs(query, key, value, erase, write, log_decay, initial_state, launch.numbered(begins))
    return launch.backward(*_target(), x, residuals, (d_output, d_state), scale=scale)


def _target():
    """How kernels are called and for which capability. Without a GPU they are exported, for sm_80: what is compiled
    for it runs on every 8.x, and is refused by other GPUs."""
    from pallas_kernels.triton import host

    target = capability() or OLDEST
    return host.caller(target), target
