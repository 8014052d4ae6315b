"""Runs every kind of Hopper kernel once on small shapes: what compute-sanitizer is pointed at.

compute-sanitizer --target-processes application-only --tool memcheck --padding 262144 \\
    python -m experiments.kernels.sanitize [--only=REGEX] [--list]

Kernels are those of `pallas_kernels.hopper.variants`: 3 chunks, the last of 2 tokens, of 67 rows, as many as keep the
blocks of a kernel whole. They run one after the other and not as parts of a larger program, and memory is not pooled:
each array is allocated by itself and to the byte. XLA tries out nothing. Exits with 1 if an output, a state or a
gradient is not finite.

application-only: kernels are assembled by processes of their own; followed into these, compute-sanitizer hangs.
padding: bytes between arrays; without them what lies behind one is another, in which memcheck sees no fault.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import jax
import numpy as np
from absl import app, flags

from pallas_kernels.hopper import variants
from pallas_kernels.hopper.variants import Variant

_ONLY = flags.DEFINE_string("only", "", "regular expression that a kernel's name must contain")
_LIST = flags.DEFINE_bool("list", False, "print the names and stop")

SMALL = dict(batch=67, length=130, heads=1)
# The arguments of `forward`: in this order, None where a variant has none.
_NAMES = ("query", "key", "value", "erase", "write", "log_decay", "initial_state", "begins")


def host_arrays(shapes: tuple, seed: int = 0) -> list[np.ndarray | None]:
    """Valid arguments of `forward`, or of `decode`, which has no documents: keys of norm about 1, gains in [0, 1],
    log-decays in [-0.3, 0], documents that begin every 50 tokens."""
    rng = np.random.default_rng(seed)

    def make(name, like):
        if like is None:
            return None
        if name == "begins":
            token = np.arange(like.shape[1])
            return np.broadcast_to((token > 0) & (token % 50 == 0), like.shape)
        if name in ("erase", "write", "log_decay"):
            return (rng.uniform(size=like.shape) * (-0.3 if name == "log_decay" else 1)).astype(like.dtype)
        scale = like.shape[-1] ** -0.5 if name in ("query", "key") else 1
        return (scale * rng.normal(size=like.shape)).astype(like.dtype)

    return [make(name, like) for name, like in zip(_NAMES, shapes, strict=False)]


def random_like(tree: Any, seed: int = 1) -> Any:
    """Normal numbers of these shapes, for cotangents."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), tree)


def arguments(variant: Variant, run_forward: Callable | None) -> list:
    """Those of the variant's function; a backward one's residuals come from run_forward(*arguments)."""
    _, kind, _, shapes = variant
    if kind == "forward":
        return jax.device_put(host_arrays(shapes))
    *inputs, _, output, state = shapes
    given = jax.device_put(host_arrays(tuple(inputs)))
    assert run_forward is not None, "a backward kernel needs the forward one that saves"
    _, _, residuals = run_forward(*given)
    return [*given, residuals, *jax.device_put(random_like((output, state)))]


def forward_name(name: str) -> str:
    """The variant that makes the residuals of a backward one."""
    return f"forward-{name.removeprefix('backward-')}-save"


def run(variant: Variant, function: Mapping[str, Callable]) -> list[str]:
    """Runs it once, function being that of each variant by name -> types and shapes of what is not finite.

    Residuals, the third result of a forward kernel, have places that nobody writes or reads.
    """
    name, kind = variant[:2]
    results = jax.block_until_ready(function[name](*arguments(variant, function.get(forward_name(name)))))
    results = results[:2] if kind == "forward" else results
    finite = lambda x: bool(np.all(np.isfinite(np.asarray(x).astype(np.float32))))
    return [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(results) if not finite(x)]


def set_environment(environment: MutableMapping[str, str]) -> None:
    """What XLA reads when the first device is looked at, which listing the variants does."""
    environment.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    set_environment(os.environ)
    every = {variant[0]: variant for variant in variants(**SMALL)}
    chosen = [variant for name, variant in every.items() if re.search(_ONLY.value, name)]
    if _LIST.value:
        print(*(variant[0] for variant in chosen), sep="\n")
        return
    if jax.default_backend() != "gpu":
        raise app.UsageError(f"the kernels need a GPU; this is {jax.devices()[0]}")

    functions = {name: variant[2] for name, variant in every.items()}
    begun, bad = time.monotonic(), {}
    for variant in chosen:
        bad |= {variant[0]: found} if (found := run(variant, functions)) else {}
        print(variant[0], "NOT FINITE: " + ", ".join(found) if found else "ran", flush=True)
    print(f"{len(chosen)} kernels ran in {time.monotonic() - begun:.0f} s, {len(bad)} with numbers that are not finite")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    app.run(main)
