"""Implementations of the delta rule by name, and the choice among them.

Every implementation is the same function, differentiable in all floating inputs:
    run(query, key, value, erase, write, log_decay, initial_state, segment_ids, *, scale, chunk_size, precision)
    -> (output [B, T, H, V], state [B, H, K, V])
write is None where it is erase, initial_state None where it is zeros.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from efla_jax.choices import check_choice
from efla_jax.ops.chunkwise import chunkwise_delta_rule
from efla_jax.ops.kernels import implementation, step_implementation
from efla_jax.ops.scan import scan_delta_rule, single_step
from pallas_kernels import hopper, tpu, triton
from pallas_kernels.hopper import decode
from pallas_kernels.tpu import decode as tpu_decode

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
    """One way to compute the delta rule.

    supported gives the reason against a call of this kind, absent the reason why what is traced now cannot run here.
    backend is the one that a hardware kernel is for (None: any). takes_beta: whether for this call run makes erase and
    write of the exact rule itself, given beta in the place of erase and exact=True.
    """

    run: Callable
    supported: Callable[[Call], str | None]
    absent: Callable[[], str | None] = lambda: None
    backend: str | None = None
    takes_beta: Callable[[Call], bool] = lambda call: False


_NO_HOPPER = (
    "it needs a Hopper GPU (compute capability 9.0), or a context of "
    "jax.experimental.pallas.mosaic_gpu.force_gpu_interpret_mode to be interpreted"
)


def _hopper_absent() -> str | None:
    if hopper.interpreting():
        return None
    if jax.default_backend() == "gpu":
        capability = getattr(jax.devices()[0], "compute_capability", None)
        return None if capability == "9.0" else f"{_NO_HOPPER}; this one has {capability}"
    return _NO_HOPPER


def _precision_unsupported(call: Call) -> str | None:
    """Kernels multiply in the inputs' own type."""
    if call.precision in (None, jax.lax.Precision.DEFAULT):
        return None
    return f"precision is {call.precision}; the kernels multiply in the inputs' own type (None or DEFAULT)"


def _hopper_unsupported(call: Call) -> str | None:
    return _precision_unsupported(call) or hopper.unsupported(
        call.dtypes, call.key_dim, call.value_dim, call.chunk_size
    )


def _triton_unsupported(call: Call) -> str | None:
    declined = triton.unsupported(call.dtypes, call.key_dim, call.value_dim, call.chunk_size)
    return _precision_unsupported(call) or declined or triton.missing()


def _tpu_unsupported(call: Call) -> str | None:
    return tpu.unsupported(
        call.dtypes, call.key_heads, call.heads, call.length, call.key_dim, call.value_dim, call.chunk_size,
        call.precision,
    )  # fmt: skip


REGISTRY: dict[str, Implementation] = {
    "pallas_gpu": Implementation(
        implementation(
            hopper.forward, hopper.backward, "cuda", lambda: _hopper_absent() is None, _NO_HOPPER, known=True
        ),
        _hopper_unsupported,
        _hopper_absent,
        "gpu",
        lambda call: not call.log_decay and call.length > decode.SHORT,
    ),
    "triton": Implementation(
        implementation(triton.forward, triton.backward, "cuda", lambda: triton.absent() is None, triton.NO_DEVICE),
        _triton_unsupported,
        triton.absent,
        "gpu",
    ),
    "pallas_tpu": Implementation(
        implementation(tpu.forward, tpu.backward, "tpu", lambda: tpu.absent() is None, tpu.NO_DEVICE, choices=True),
        _tpu_unsupported,
        tpu.absent,
        "tpu",
    ),
    "xla": Implementation(chunkwise_delta_rule, lambda call: None),
    "scan": Implementation(scan_delta_rule, lambda call: None),
}

# Of a single token, which has no chunks.
STEPS: dict[str, Implementation] = {
    "pallas_gpu": Implementation(
        step_implementation(decode.decode, single_step, "cuda", lambda: _hopper_absent() is None, _NO_HOPPER),
        lambda call: decode.unsupported(call.dtypes, call.key_dim, call.value_dim),
        _hopper_absent,
        "gpu",
    ),
    "pallas_tpu": Implementation(
        step_implementation(tpu_decode.decode, single_step, "tpu", lambda: tpu.absent() is None, tpu.NO_DEVICE),
        lambda call: tpu_decode.unsupported(call.dtypes, call.key_dim, call.value_dim),
        tpu.absent,
        "tpu",
    ),
    "xla": Implementation(single_step, lambda call: None),
    "scan": Implementation(single_step, lambda call: None),
}


def step_name(name: str | None, dtypes: tuple[jnp.dtype, ...], key_dim: int, value_dim: int) -> str | None:
    """The implementation of single tokens that goes with one of sequences: its own where it has one for such heads,
    else None, the choice of `choose`."""
    if name not in STEPS:
        return None
    call = Call(
        batch=1, length=1, key_heads=1, heads=1, key_dim=key_dim, value_dim=value_dim, dtypes=dtypes, log_decay=False,
        segments=False, chunk_size=None, precision=None, backend=jax.default_backend(),
    )  # fmt: skip
    return None if STEPS[name].supported(call) else name


def _reason(registry: dict[str, Implementation], name: str, call: Call, must_run: bool) -> str | None:
    """Why `name` cannot serve the call, or None. A kernel for another backend than this one may still be exported;
    must_run rules that out."""
    check_choice("implementation", name, NAMES)
    if name not in registry:
        return "this version of efla_jax has no such kernel"
    candidate = registry[name]
    absent = candidate.absent() if must_run or candidate.backend == call.backend else None
    return absent or candidate.supported(call)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def choose(
    names: str | Sequence[str] | None, call: Call, registry: dict[str, Implementation] = REGISTRY
) -> Implementation:
    """The implementation for this call.

    A name is served or raises (where its kernels are for another backend: when it is lowered for this one); a sequence
    is tried in order with a warning on each fallback; None takes the first of NAMES that serves the call and warns,
    once, only if this backend has kernels and each of them declined.

    Raises:
        ValueError: an unknown name or an empty sequence.
        NotImplementedError: nothing named serves the call; the message has every reason.
    """
    if names is None:
        declined = []
        for name in NAMES:
            candidate = registry.get(name)
            if candidate is None or candidate.backend not in (None, call.backend):
                continue
            reason = _reason(registry, name, call, must_run=True)
            if reason is None:
                if declined and candidate.backend is None:  # where one GPU's kernel declines, another's may serve
                    _warn_once("; ".join(declined))
                return candidate
            declined.append(f"implementation {name!r} declined a call, taking the next: {reason}")
    names = (names,) if isinstance(names, str) else tuple(names or ())
    if not names:
        raise ValueError(f"implementation is {names!r}; it must be a name, a sequence of names or None")
    reasons = []
    for name in names:
        reason = _reason(registry, name, call, must_run=len(names) > 1)
        if reason is None:
            for passed in reasons:
                warnings.warn(f"implementation falls back to {name!r}: {passed}", stacklevel=4)
            return registry[name]
        reasons.append(f"{name!r} cannot serve this call: {reason}")
    raise NotImplementedError("; ".join(f"implementation {reason}" for reason in reasons))
