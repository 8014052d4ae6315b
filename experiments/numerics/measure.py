"""Runs an implementation and the float64 oracle on the same numbers; the error of every result.

The oracle is `xla`, the chunkwise form, in float64 on the same device: the token loop would take minutes for a million
tokens. `oracle_error` measures it against that loop where the loop is affordable.

Rules with one coefficient a token (exact and euler without decay have erase = write) differ for `xla` only in what
makes the coefficient. So its program takes the coefficient, and is compiled once for all rules; what makes the
coefficient, and takes its cotangent back to key and β, is a small program of its own: the numbers are those of
`efla_attention(implementation="xla")`.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from efla_jax import delta_rule_attention, efla_attention
from efla_jax.evaluation.op_accuracy import differences, exact, forward_backward
from efla_jax.ops.attention import ImplementationName
from efla_jax.ops.coefficients import Integrator, erase_and_write
from experiments.numerics.draws import Sizes, held_in

BINS = 16  # of positions
ORACLE = "oracle"

Results = dict[str, jax.Array]


@dataclass(frozen=True)
class Program:
    """What is compiled: an implementation (or ORACLE) for a type that arrays have and a number of tokens. rule is
    empty where the program serves every rule."""

    implementation: str
    dtype: str
    sizes: Sizes
    rule: str = ""


def program(implementation: str, kind: str, rule: str, sizes: Sizes) -> Program:
    """The program that serves this call; kind is the type that inputs are rounded to."""
    if implementation == ORACLE:
        return Program(ORACLE, "float64", sizes)
    dtype = held_in(kind).name
    return Program(implementation, dtype, sizes, "" if implementation == "xla" else rule)


# ---- programs ----


def _by_coefficient(implementation: ImplementationName) -> Callable:
    """(query, key, value, erase, cotangents) -> results with d_erase, which counts for the write too."""

    def call(query, key, value, erase):
        return delta_rule_attention(query, key, value, erase, erase, implementation=implementation)

    return lambda inputs, cotangents: forward_backward(call, inputs, cotangents)


def _shapes(what: Program) -> tuple[dict, dict]:
    sizes, shape = what.sizes, jax.ShapeDtypeStruct
    tokens = (1, sizes.length, sizes.heads)
    features = shape((*tokens, sizes.dim), what.dtype)
    numbers = jnp.dtype("float64" if what.dtype == "float64" else "float32")
    gain = "beta" if what.rule else "erase"
    inputs = dict(query=features, key=features, value=features) | {gain: shape(tokens, numbers)}
    return inputs, dict(output=features, state=shape((1, sizes.heads, sizes.dim, sizes.dim), numbers))


@functools.cache
def compiled(what: Program) -> Callable[..., Results]:
    """Raises NotImplementedError where the implementation does not serve the call on this device."""
    name = cast(ImplementationName, "xla" if what.implementation == ORACLE else what.implementation)
    if what.rule:
        call = partial(efla_attention, integrator=cast(Integrator, what.rule), implementation=name)
        run = lambda inputs, cotangents: forward_backward(call, inputs, cotangents)
    else:
        run = _by_coefficient(name)
    with jax.enable_x64(what.dtype == "float64"):
        return jax.jit(run).lower(*_shapes(what)).compile()


def compile_ahead(programs: list[Program], threads: int) -> None:
    """Side by side, as one takes seconds; what is declined is left for the call to tell."""

    def attempt(what):
        try:
            compiled(what)
        except NotImplementedError:
            return

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(attempt, programs))


@partial(jax.jit, static_argnums=0)
def _coefficient(rule, key, beta):
    return erase_and_write(key, beta, None, rule)[0]


@partial(jax.jit, static_argnums=0)
def _coefficient_gradients(rule, key, beta, d_erase):
    _, pullback = jax.vjp(lambda key, beta: erase_and_write(key, beta, None, rule)[0], key, beta)
    return pullback(d_erase)


def evaluate(implementation: str, kind: str, rule: str, sizes: Sizes, inputs: dict, cotangents: dict) -> Results:
    """Output, state and d_query, d_key, d_value, d_beta for inputs of one type."""
    what = program(implementation, kind, rule, sizes)
    with jax.enable_x64(what.dtype == "float64"):
        if what.dtype == "float64":
            inputs, cotangents = jax.tree.map(lambda x: x.astype(jnp.float64), (inputs, cotangents))
        if what.rule:
            return compiled(what)(inputs, cotangents)
        key, beta = inputs["key"], inputs["beta"]
        features = {name: inputs[name] for name in ("query", "key", "value")}
        found = compiled(what)(features | dict(erase=_coefficient(rule, key, beta)), cotangents)
        d_key, d_beta = _coefficient_gradients(rule, key, beta, found.pop("d_erase"))
        return found | dict(d_key=found["d_key"] + d_key, d_beta=d_beta)


# ---- errors ----


@jax.jit
def _sums(x: jax.Array, right: jax.Array) -> dict[str, jax.Array]:
    """By bin, of places in x's first axes: squares of the error, of the true numbers, of x, of what rounding the true
    numbers to x's type changes; and how many numbers are not finite."""
    bins = lambda x: jnp.sum(x.reshape(BINS, -1), -1)
    wide = x.astype(jnp.float64)
    nearest = jax.lax.optimization_barrier(right.astype(x.dtype))  # else XLA on a GPU leaves the rounding out
    squares = {"error": wide - right, "right": right, "found": wide, "floor": nearest.astype(jnp.float64) - right}
    return {name: bins(jnp.square(y)) for name, y in squares.items()} | {"bad": bins(~jnp.isfinite(wide))}


def errors(found: Results, right: Results) -> dict[str, dict[str, Any]]:
    """By result: "error", relative and root mean square; "floor", the same of the true numbers rounded to the type;
    "norm_ratio"; "by_position", the error in BINS equal parts of the tokens, each relative to that part; "nonfinite",
    how many numbers are not. None where it is not a number itself."""
    report: dict[str, dict[str, Any]] = {}
    for name, x in found.items():
        with jax.enable_x64(True):
            sums: dict[str, np.ndarray] = {
                key: np.asarray(value, np.float64) for key, value in _sums(x, right[name]).items()
            }
        with np.errstate(all="ignore"):
            ratio = lambda part, whole: np.sqrt(part / whole)
            total = {key: value.sum() for key, value in sums.items()}
            report[name] = {
                "error": _number(ratio(total["error"], total["right"])),
                "floor": _number(ratio(total["floor"], total["right"])),
                "norm_ratio": _number(ratio(total["found"], total["right"])),
                "nonfinite": int(total["bad"]),
            }
            if name != "state":
                report[name]["by_position"] = [_number(value) for value in ratio(sums["error"], sums["right"])]
    return report


def _number(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None


@jax.jit
def _bad_tokens(output):
    return jnp.any(~jnp.isfinite(output), axis=(0, 2, 3))


def first_nonfinite(results: Results) -> int | None:
    """The first token whose output is not finite."""
    with jax.enable_x64(results["output"].dtype == jnp.float64):
        bad = np.asarray(_bad_tokens(results["output"]))
    return int(np.argmax(bad)) if bad.any() else None


def oracle_error(rule: str, sizes: Sizes, inputs: dict, cotangents: dict) -> dict[str, float]:
    """Relative error of the oracle against the float64 token loop, by result."""
    found = evaluate(ORACLE, "float64", rule, sizes, inputs, cotangents)
    host = lambda tree: {name: np.asarray(x) for name, x in tree.items()}
    right = exact(host(inputs), host(cotangents), rule)
    return {name: result["error"] for name, result in differences(host(found), right).items()}
