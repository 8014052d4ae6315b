"""Runs every kind of Hopper kernel once on small shapes: what compute-sanitizer is pointed at.

compute-sanitizer --tool memcheck python -m experiments.kernels.sanitize [--only=REGEX] [--list]
compute-sanitizer --tool racecheck python -m experiments.kernels.sanitize [--only=REGEX]

Kernels are those of `pallas_kernels.hopper.variants`, compiled side by side, then run one after the other: 3 chunks,
the last of 2 tokens, of 67 rows, as many as keep the blocks of a kernel whole. Inputs are made on the host, so that
little else runs on the GPU; each array is allocated by itself, so that memcheck sees its end. Exits with 1 if a result
is not finite.
"""

import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def arguments(variant: Variant, run_forward: Callable) -> list:
    """Those of the variant's function; a backward one's residuals come from run_forward(*arguments)."""
    _, kind, _, shapes = variant
    if kind == "forward":
        return host_arrays(shapes)
    *inputs, _, output, state = shapes
    given = host_arrays(tuple(inputs))
    _, _, residuals = run_forward(*given)
    return [*given, residuals, *random_like((output, state))]


def forward_name(name: str) -> str:
    """The variant that makes the residuals of a backward one."""
    return f"forward-{name.removeprefix('backward-')}-save"


def _none(*given):
    raise KeyError("a backward kernel needs the forward one that saves")


def compiled(chosen: list[Variant]) -> dict[str, Callable]:
    """The variants' functions by name, compiled side by side."""

    def compile_one(variant):
        name, _, function, shapes = variant
        return name, jax.jit(function).lower(*shapes).compile()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(compile_one, chosen))


def run(variant: Variant, functions: dict[str, Callable]) -> list[str]:
    """Runs it once -> the types and shapes of results that are not finite."""
    name = variant[0]
    results = jax.block_until_ready(functions[name](*arguments(variant, functions.get(forward_name(name), _none))))
    finite = lambda x: bool(np.all(np.isfinite(np.asarray(x).astype(np.float32))))
    return [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(results) if not finite(x)]


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    every = list(variants(**SMALL))
    chosen = [variant for variant in every if re.search(_ONLY.value, variant[0])]
    if _LIST.value:
        print(*(variant[0] for variant in chosen), sep="\n")
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    if jax.default_backend() != "gpu":
        raise app.UsageError(f"the kernels need a GPU; this is {jax.devices()[0]}")
    begun = time.monotonic()
    names = {variant[0] for variant in chosen}
    names |= {forward_name(variant[0]) for variant in chosen if variant[1] == "backward"}
    functions = compiled([variant for variant in every if variant[0] in names])
    print(f"{len(functions)} kernels compiled in {time.monotonic() - begun:.0f} s", flush=True)
    bad = {}
    for variant in chosen:
        bad |= {variant[0]: found} if (found := run(variant, functions)) else {}
        print(variant[0], "NOT FINITE: " + ", ".join(found) if found else "ran", flush=True)
    print(f"{len(chosen)} kernels ran in {time.monotonic() - begun:.0f} s, {len(bad)} with numbers that are not finite")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    app.run(main)
