"""Random calls of the op whose inputs are rounded to a type: what the error of an implementation is measured on.

q ~ N(0, 1/K), v ~ N(0, 1), β ~ U(0, 1), keys of random direction and a given squared norm; cotangents of output and
final state ~ N(0, 1). "float8" is float8_e4m3 under one power-of-two scale a tensor, held in bfloat16, which has room
for every such number: what the bfloat16 kernels make of fp8 activations. There are no initial states.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

TYPES = ("float32", "bfloat16", "float16", "float8")
_FLOAT8 = jnp.float8_e4m3fn
_ROUNDED = ("query", "key", "value", "output")


@dataclass(frozen=True)
class Keys:
    """‖k‖² of every token log-uniform in [low, high]; the two are equal where all keys are of one norm."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} … {self.high:g}"


@dataclass(frozen=True)
class Sizes:
    """One row of `length` tokens, `heads` heads of keys and values of `dim`."""

    length: int
    heads: int = 2
    dim: int = 128


def held_in(kind: str) -> jnp.dtype:
    """The type of arrays that hold numbers of this one."""
    return jnp.dtype("bfloat16" if kind == "float8" else kind)


@partial(jax.jit, static_argnums=1)
def rounded(x: jax.Array, kind: str) -> jax.Array:
    """x as `kind` has it, in `held_in(kind)`."""
    if kind != "float8":
        return x.astype(kind)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x)))
    scale = jnp.ldexp(jnp.float32(1), 8 - exponent)  # the largest number becomes 128 … 256, of at most 448
    narrow = jax.lax.optimization_barrier((x * scale).astype(_FLOAT8))  # else XLA on a GPU leaves the rounding out
    return (narrow.astype(jnp.float32) / scale).astype(jnp.bfloat16)


@partial(jax.jit, static_argnums=0)
def _numbers(sizes: Sizes, low: float, high: float, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(inputs, cotangents) in float32. Norms are no constants of the program, which is then compiled once a size."""
    random = iter(jax.random.split(jax.random.key(seed), 8))
    tokens = (1, sizes.length, sizes.heads)
    normal = lambda *shape: jax.random.normal(next(random), shape, jnp.float32)
    direction = normal(*tokens, sizes.dim)
    direction = direction / jnp.linalg.norm(direction, axis=-1, keepdims=True)
    place = jax.random.uniform(next(random), (*tokens, 1))
    norm = jnp.exp(0.5 * (jnp.log(low) + place * (jnp.log(high) - jnp.log(low))))
    inputs = {
        "query": normal(*tokens, sizes.dim) * sizes.dim**-0.5,
        "key": direction * norm,
        "value": normal(*tokens, sizes.dim),
        "beta": jax.random.uniform(next(random), tokens),
    }
    return inputs, {"output": normal(*tokens, sizes.dim), "state": normal(1, sizes.heads, sizes.dim, sizes.dim)}


def draw(sizes: Sizes, keys: Keys, kind: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(inputs, cotangents) by the names of `efla_attention`, β in float32. The same numbers for every kind but for
    their rounding."""
    inputs, cotangents = _numbers(sizes, keys.low, keys.high, seed)
    typed = lambda tree: {name: rounded(x, kind) if name in _ROUNDED else x for name, x in tree.items()}
    return typed(inputs), typed(cotangents)
