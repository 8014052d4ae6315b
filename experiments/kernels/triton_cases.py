"""Calls that the Triton kernels are checked with, what their results should be, and how far from it they may be.

The error model: a tensor's error is its Frobenius distance from the float64 token loop on the same inputs, relative to
that loop's norm. What rounding makes unavoidable is the error that float64 makes when every low-precision input moves
by up to half its last place. A chunkwise form rounds intermediates too, the inverse and the states among them; it may
make FACTOR times as much, and in bfloat16 no more than PLAIN times what the plain JAX form makes with bfloat16
products. In float32, where the algebra shows, the measure is the error of the float32 token loop.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efla_jax import delta_rule_attention
from efla_jax.ops.attention import ImplementationName

FACTOR, PLAIN = 12, 1.5
NAMES = ("output", "state", "d_query", "d_key", "d_value", "d_erase", "d_write", "d_log_decay", "d_initial_state")


@dataclass(frozen=True)
class Case:
    """Sizes, options and input ranges of one call."""

    dtype: str = "bfloat16"
    batch: int = 1
    length: int = 130
    key_heads: int = 1
    heads: int = 2
    key_dim: int = 64
    value_dim: int = 64
    decay: bool = False
    borders: tuple[int, ...] | None = None  # tokens that begin a document, in even rows; one earlier in odd rows
    norm2: float = 1.0  # of keys
    scale: float = 0.5
    capability: int = 80  # whose tiles
    special: str | None = None  # "bare": one coefficient, erase, and no initial state

    def __str__(self):
        heads = f"{self.key_heads}/{self.heads}"
        text = f"{self.dtype} B{self.batch} T{self.length} H{heads} K{self.key_dim} V{self.value_dim}"
        text += f" sm_{self.capability} |k|²={self.norm2:g} scale={self.scale:g}"
        text += " decay" * self.decay + (f" borders={self.borders}" if self.borders is not None else "")
        return text + (f" {self.special}" if self.special else "")


CASES = (
    # the algebra, in float32
    Case("float32", length=130, decay=True, borders=(40, 64, 65), key_dim=16, value_dim=32),
    Case("float32", length=64, key_dim=32, value_dim=16, scale=1.0),
    Case("float32", length=150, batch=2, key_heads=2, heads=4, decay=True, key_dim=32, value_dim=32, capability=90),
    Case("float32", length=100, borders=(99,), key_dim=16, value_dim=16, heads=3, norm2=1e3),
    Case("float32", length=9, decay=True, key_dim=16, value_dim=16),
    Case("float32", length=1, key_dim=16, value_dim=16, decay=True, borders=()),
    Case("float32", length=100, key_dim=16, value_dim=16, special="zero keys"),
    Case("float32", length=100, key_dim=16, value_dim=16, special="one key", decay=True),
    Case("float32", length=100, key_dim=16, value_dim=16, special="no write"),
    Case("float32", length=100, key_dim=16, value_dim=32, decay=True, borders=(70,), special="bare"),
    # the types that run, with the tiles of both architectures
    Case(length=200, key_dim=128, value_dim=128),
    Case(length=200, key_dim=128, value_dim=128, capability=90, scale=1.0),
    Case(length=130, decay=True, borders=(1, 64, 100), batch=2),
    Case(length=130, decay=True, borders=(1, 64, 100), batch=2, capability=90),
    Case(length=65, key_dim=128, value_dim=64, key_heads=2, heads=4, borders=(10, 11, 12)),
    Case(length=130, key_dim=128, value_dim=256, key_heads=1, heads=2, decay=True, capability=90),
    Case(length=63, key_dim=64, value_dim=128, capability=90, borders=()),
    Case(length=17, key_dim=32, value_dim=16, heads=1),
    Case(length=130, norm2=1e3, decay=True),
    Case(length=130, norm2=1e-4),
    Case(length=100, key_dim=128, value_dim=128, capability=90, special="bare"),
    Case("float16", length=130, decay=True, borders=(70,)),
    Case("float16", length=130, key_dim=128, value_dim=128, heads=1, capability=90),
    Case("float16", length=100, norm2=1e3),
    Case("float16", length=100, norm2=1e-4, key_heads=2),
)


@dataclass(frozen=True)
class Variant:
    """Sizes and options that make a kernel of their own; 4 value heads, and chunks of full length. Which coefficients
    are given makes none: a kernel always reads erase and write."""

    capability: int
    dtype: str
    key_dim: int
    value_dim: int
    key_heads: int
    decay: bool
    documents: bool

    def __str__(self):
        text = f"sm_{self.capability} {self.dtype} K{self.key_dim} V{self.value_dim} H{self.key_heads}/4"
        return text + " decay" * self.decay + " documents" * self.documents


# All options at the sizes that models have, and where they meet at the edges of what is supported
VARIANTS = tuple(
    Variant(capability, dtype, *sizes, heads, *options)
    for capability in (80, 89, 90)
    for dtype in ("bfloat16", "float16")
    for sizes in (*itertools.product((64, 128), (64, 128)), (16, 16), (32, 128), (128, 256))
    for heads in (4, 2)
    for options in itertools.product((False, True), (False, True))
    if (min(sizes) >= 64 and max(sizes) <= 128) or all(options)
)


def draw(case: Case, seed=0) -> dict[str, Any]:
    """Arguments of the kernels' `forward` by name, and the cotangents d_output and d_state."""
    rng = np.random.default_rng(seed)
    tokens = (case.batch, case.length)
    low = lambda x: x.astype(case.dtype)
    key = rng.normal(size=(*tokens, case.key_heads, case.key_dim))
    if case.special == "one key":
        key[:] = key[:, :1]
    key *= np.sqrt(case.norm2 * rng.uniform(0.5, 1, key.shape[:3]) / np.sum(key**2, -1))[..., None]
    if case.special == "zero keys":
        key[:, ::2] = 0
    coefficient = lambda most: (most * rng.uniform(size=(*tokens, case.heads))).astype(np.float32)
    value = low(rng.normal(size=(*tokens, case.heads, case.value_dim)))
    bare = case.special == "bare"
    state = rng.normal(size=(case.batch, case.heads, case.key_dim, case.value_dim)).astype(np.float32)
    return dict(
        query=low(rng.normal(size=key.shape)),
        key=low(key),
        value=value,
        erase=coefficient(1.2 / case.norm2),
        write=None if bare else coefficient(0 if case.special == "no write" else 1 / np.sqrt(case.norm2)),
        log_decay=-0.3 * coefficient(1) if case.decay else None,
        initial_state=None if bare else state,
        documents=_documents(case),
        d_output=low(rng.normal(size=value.shape)),
        d_state=rng.normal(size=state.shape).astype(np.float32),
    )


def _documents(case):
    if case.borders is None:
        return None
    starts = np.zeros((case.batch, case.length), np.int32)
    for border in case.borders:
        starts[::2, border] = 1
        starts[1::2, max(border - 1, 1)] = 1
    return np.cumsum(starts, -1, dtype=np.int32)


def evaluate(inputs, scale, dtype, implementation: ImplementationName = "scan", low=None) -> dict[str, np.ndarray]:
    """NAMES by implementation of efla_jax, everything cast to dtype, query, key and value to `low` if given."""
    with jax.enable_x64(dtype == np.float64):
        cast = lambda name, x: x.astype(low if low is not None and name in ("query", "key", "value") else dtype)
        given = {
            name: jnp.asarray(cast(name, x)) for name, x in inputs.items() if name != "documents" and x is not None
        }
        cotangents = (given.pop("d_output"), given.pop("d_state"))

        def op(given):
            return delta_rule_attention(
                **{"write": given["erase"]} | given, segment_ids=inputs["documents"], scale=scale,
                implementation=implementation, chunk_size=64,
            )  # fmt: skip

        @jax.jit
        def run(given, cotangents):
            results, pullback = jax.vjp(op, given)
            return results, pullback(tuple(c.astype(x.dtype) for c, x in zip(cotangents, results, strict=True)))[0]

        (output, state), gradients = run(given, cotangents)
        results = dict(output=output, state=state) | {f"d_{name}": x for name, x in gradients.items()}
        return {name: np.asarray(results[name]) for name in NAMES if name in results}


def errors(got, want) -> dict[str, float]:
    """Relative Frobenius error by name; absolute where the true tensor is zero."""
    norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64).ravel()))
    return {name: norm(got[name].astype(np.float64) - x) / (norm(x) or 1.0) for name, x in want.items()}


def allowed(case: Case, inputs, want) -> dict[str, float]:
    """The largest error of each tensor that the model admits."""
    if case.dtype == "float32":
        loop = errors(evaluate(inputs, case.scale, np.float32), want)
        return {name: 8 * max(e, 2 * float(np.finfo(np.float32).eps)) for name, e in loop.items()}
    half = float(jnp.finfo(case.dtype).eps) / 2
    rng = np.random.default_rng(5)
    nudge = lambda x: x.astype(np.float64) * (1 + half * rng.uniform(-1, 1, x.shape))
    nudged = inputs | {name: nudge(inputs[name]) for name in ("query", "key", "value", "d_output")}
    model = errors(evaluate(nudged, case.scale, np.float64), want)
    limits = {name: FACTOR * max(e, half) for name, e in model.items()}
    if case.dtype == "bfloat16":
        plain = errors(evaluate(inputs, case.scale, np.float32, "xla", jnp.bfloat16), want)
        limits = {name: min(limit, PLAIN * max(plain[name], half)) for name, limit in limits.items()}
    return limits
