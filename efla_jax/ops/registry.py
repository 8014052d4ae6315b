"""Implementations of the delta rule by name, and the choice among them.

Every implementation is the same function, differentiable in all floating inputs:
    run(query, key, value, erase, write, log_decay, initial_state, segment_ids, *, scale, chunk_size, precision)
    -> (output [B, T, H, V], state [B, H, K, V])
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efla_jax.choices import check_choice
from efla_jax.ops.chunkwise import chunkwise_delta_rule
from efla_jax.ops.scan import scan_delta_rule

# The order in which None tries them; all names that a caller may use.
NAMES = ("pallas_gpu", "triton", "pallas_tpu", "xla", "scan")


@dataclass(frozen=True)
class Call:
    """What an implementation may look at to say whether it serves a call. Sizes are one device's share."""

    batch: int
    length: int
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    dtypes: tuple[jnp.dtype, ...]  # of query, key, value
    log_decay: bool
    segments: bool
    chunk_size: int | None
    precision: jax.lax.Precision | None
    backend: str  # jax.default_backend()


@dataclass(frozen=True)
class Implementation:
    """backend is the one that a hardware kernel is for (None: any); supported gives the reason against a call."""

    run: Callable
    supported: Callable[[Call], str | None]
    backend: str | None = None


REGISTRY: dict[str, Implementation] = {
    "xla": Implementation(chunkwise_delta_rule, lambda call: None),
    "scan": Implementation(scan_delta_rule, lambda call: None),
}


def _reason(name: str, call: Call) -> str | None:
    """Why `name` cannot serve the call, or None."""
    check_choice("implementation", name, NAMES)
    if name not in REGISTRY:
        return "this version of efla_jax has no such kernel"
    return REGISTRY[name].supported(call)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def choose(implementation: str | Sequence[str] | None, call: Call) -> Callable:
    """The `run` of the implementation for this call.

    A name is served or raises; a sequence is tried in order with a warning on each fallback; None takes the first of
    NAMES that serves the call and warns, once, only if this backend has a kernel and that kernel declined.

    Raises:
        ValueError: an unknown name or an empty sequence.
        NotImplementedError: nothing named serves the call; the message has every reason.
    """
    if implementation is None:
        for name in NAMES:
            candidate = REGISTRY.get(name)
            if candidate is None or candidate.backend not in (None, call.backend):
                continue
            reason = candidate.supported(call)
            if reason is None:
                return candidate.run
            _warn_once(f"implementation {name!r} declined a call, taking the next: {reason}")
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation or ())
    if not names:
        raise ValueError(f"implementation is {implementation!r}; it must be a name, a sequence of names or None")
    reasons = []
    for name in names:
        reason = _reason(name, call)
        if reason is None:
            for passed in reasons:
                warnings.warn(f"implementation falls back to {name!r}: {passed}", stacklevel=4)
            return REGISTRY[name].run
        reasons.append(f"{name!r} cannot serve this call: {reason}")
    raise NotImplementedError("; ".join(f"implementation {reason}" for reason in reasons))
