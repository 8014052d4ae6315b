"""Random calls of the op, and how far what a program gives for them is from the token loop in float64.

Results go by name: "output", "state", and "d_NAME" for the gradient of the input NAME.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from efla_jax import delta_rule_attention, efla_attention
from efla_jax.evaluation import EvaluationError
from efla_jax.ops.coefficients import Integrator

DTYPES = ("bfloat16", "float16", "float32")
DELTA_RULE = "delta_rule"  # the rule whose erase and write are inputs; the others are integrators

# Of the token loop on one core: about 2e-4 s a token, forward and backward, at 128 × 128.
_STATE_ELEMENTS = 1 << 28  # tokens × heads × K × V that a reference may have
_PIECE = 64  # tokens whose states the reference's gradient holds at once


@dataclass(frozen=True)
class Case:
    """Sizes of a call. `documents` of about equal length are packed in every row, where they begin `known` when tracing
    or only by the call's ids; `state` gives an initial state and a cotangent of the final one."""

    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int
    key_heads: int = 0  # 0: as many as heads
    documents: int = 1
    known: bool = False
    log_decay: bool = False
    state: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("batch", "length", "heads", "key_dim", "value_dim")}
        for name, size in (sizes | {"documents": self.documents}).items():
            if size < 1:
                raise EvaluationError(f"{name} is {size}; it must be at least 1")
        if self.key_heads < 0 or self.heads % self.groups:
            raise EvaluationError(f"key_heads is {self.key_heads}; it must divide heads={self.heads}")
        if self.documents > self.length:
            raise EvaluationError(f"{self.documents} documents do not fit into length={self.length}")
        if self.known and self.documents == 1:
            raise EvaluationError("known is True; documents must be more than 1 then")
        if self.dtype not in DTYPES:
            raise EvaluationError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")

    @property
    def groups(self) -> int:
        """Heads of query and key."""
        return self.key_heads or self.heads

    @property
    def borders(self) -> list[int]:
        """Where documents begin, and the end of the last."""
        return [-(-self.length * n // self.documents) for n in range(self.documents + 1)]

    def __str__(self) -> str:
        dims = [self.key_dim] if self.key_dim == self.value_dim else [self.key_dim, self.value_dim]
        text = "×".join(map(str, (self.batch, self.length, self.heads, *dims)))
        text += f", {self.groups} key heads" if self.groups < self.heads else ""
        text += f", {self.documents} documents" if self.documents > 1 else ""
        text += " known when tracing" if self.known else ""
        return text + (", log-decay" if self.log_decay else "")


class Draw(NamedTuple):
    """inputs by the names of `efla_attention`, and cotangents of output and (if the case has states) final state."""

    inputs: dict[str, jax.Array]
    cotangents: dict[str, jax.Array]


@partial(jax.jit, static_argnums=0)
def draw(case: Case, seed: int) -> Draw:
    """Random tokens. Keys are unit vectors in case.dtype, each times ½, 1 or 2; beta lies in [0, ½].

    So key / its power of two is exact, and so is value / it: the unit-key form of the rule, which other libraries
    compute, has the same numbers. β‖k‖² ≤ 2 keeps the Euler step stable too.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 10))
    normal = lambda *shape: jax.random.normal(next(keys), shape, jnp.float32)
    tokens, dtype = (case.batch, case.length), case.dtype
    state = (case.batch, case.heads, case.key_dim, case.value_dim)
    unit = normal(*tokens, case.groups, case.key_dim)
    unit = (unit / jnp.linalg.norm(unit, axis=-1, keepdims=True)).astype(dtype)
    power = jax.random.randint(next(keys), (*tokens, case.groups, 1), -1, 2)
    query = normal(*tokens, case.groups, case.key_dim) * case.key_dim**-0.5
    inputs = {
        "query": query.astype(dtype),
        "key": (unit * jnp.exp2(power.astype(jnp.float32))).astype(dtype),
        "value": normal(*tokens, case.heads, case.value_dim).astype(dtype),
        "beta": jax.random.uniform(next(keys), (*tokens, case.heads), jnp.float32, 0, 0.5),
    }
    cotangents = {"output": normal(*tokens, case.heads, case.value_dim).astype(dtype)}
    if case.log_decay:
        inputs["log_decay"] = -jax.random.uniform(next(keys), (*tokens, case.heads), jnp.float32, 0, 0.2)
    if case.state:
        inputs["initial_state"], cotangents["state"] = normal(*state), normal(*state)
    if case.documents > 1:
        ids = jnp.searchsorted(jnp.asarray(case.borders[1:]), jnp.arange(case.length), side="right")
        inputs["segment_ids"] = jnp.broadcast_to(ids.astype(jnp.int32), tokens)
    return Draw(inputs, cotangents)


# ---- what is computed ----


def attention(rule: str) -> Callable[..., Any]:
    """The public call for a rule: an integrator, or DELTA_RULE."""
    return delta_rule_attention if rule == DELTA_RULE else partial(efla_attention, integrator=cast(Integrator, rule))


def forward(run: Callable[..., Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Results of run(**inputs) -> (output, state)."""
    return dict(zip(("output", "state"), run(**inputs), strict=True))


def forward_backward(
    run: Callable[..., Any], inputs: Mapping[str, jax.Array], cotangents: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Those of the results that have a cotangent, and the gradients of all floating inputs."""
    fixed = {name: x for name, x in inputs.items() if name == "segment_ids"}
    free = {name: x for name, x in inputs.items() if name not in fixed}
    chosen = lambda free: {name: x for name, x in forward(run, free | fixed).items() if name in cotangents}
    results, pullback = jax.vjp(chosen, free)
    (gradients,) = pullback(dict(cotangents))
    return results | {f"d_{name}": x for name, x in gradients.items()}


# ---- the reference ----


class Sample(NamedTuple):
    """Rows and key heads, with their value heads, that are compared: none reads another."""

    rows: list[int]
    key_heads: list[int]
    groups: int  # value heads of a key head

    def take(self, results: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Their part of inputs, cotangents or results."""
        shared = range(self.groups)
        value_heads = [head * self.groups + n for head in self.key_heads for n in shared]
        taken = {}
        for name, x in results.items():
            of_key = name.removeprefix("d_") in ("query", "key")
            part = jnp.take(jnp.asarray(x), jnp.asarray(self.rows), 0)
            if name != "segment_ids":
                axis = 1 if name.endswith("state") else 2
                part = jnp.take(part, jnp.asarray(self.key_heads if of_key else value_heads), axis)
            taken[name] = np.asarray(part)
        return taken


def sample(case: Case) -> Sample:
    """The first and last rows and heads, and those evenly between, as many as the float64 loop can take in seconds."""
    shared = case.heads // case.groups
    most = max(1, _STATE_ELEMENTS // (case.length * case.key_dim * case.value_dim * shared))
    heads = min(case.groups, max(1, int(most**0.5)))
    rows = min(case.batch, max(1, most // heads))
    spaced = lambda size, count: np.unique(np.linspace(0, size - 1, count).round().astype(int)).tolist()
    return Sample(spaced(case.batch, rows), spaced(case.groups, heads), shared)


def _token_loop(rule: str, **inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The reference `scan`, a piece of the tokens after another, so that its gradient holds the states of one."""
    state = inputs.pop("initial_state")
    batch, length = inputs["key"].shape[:2]
    count = -(-length // _PIECE)
    missing = ((0, 0), (0, count * _PIECE - length))
    starts = jnp.zeros((count, batch), bool)

    def cut(name, x):  # what is added has beta or erase and write 0: the state stays
        pad = missing + ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, pad, mode="edge") if name == "segment_ids" else jnp.pad(x, pad)
        return jnp.moveaxis(x.reshape(batch, count, _PIECE, *x.shape[2:]), 1, 0)

    pieces = {name: cut(name, x) for name, x in inputs.items()}
    if "segment_ids" in pieces:
        ids = pieces["segment_ids"]
        starts = starts.at[1:].set(ids[1:, :, 0] != ids[:-1, :, -1])

    @jax.checkpoint
    def step(state, piece):
        start, tokens = piece
        state = jnp.where(start[:, None, None, None], 0, state)
        out, state = attention(rule)(**tokens, initial_state=state, implementation="scan")
        return state, out

    state, out = jax.lax.scan(step, state, (starts, pieces))
    return jnp.moveaxis(out, 0, 1).reshape(batch, count * _PIECE, *out.shape[3:])[:, :length], state


@functools.cache
def _reference(rule: str, backward: bool) -> Callable[..., dict[str, jax.Array]]:
    run = partial(_token_loop, rule)
    return jax.jit(partial(forward_backward if backward else forward, run))


def exact(
    part: Mapping[str, np.ndarray], cotangents: Mapping[str, np.ndarray] | None, rule: str = "exact"
) -> dict[str, np.ndarray]:
    """Results for sampled inputs by the token loop in float64 on the CPU; gradients too if cotangents are given."""
    wide = lambda tree: {
        name: x if np.issubdtype(x.dtype, np.integer) else np.asarray(x, np.float64) for name, x in tree.items()
    }
    batch, _, heads, value_dim = part["value"].shape
    state = np.zeros((batch, heads, part["key"].shape[-1], value_dim))
    inputs = {"initial_state": state} | wide(part)
    arguments = (inputs,) if cotangents is None else (inputs, {"state": state} | wide(cotangents))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return {name: np.asarray(x) for name, x in _reference(rule, cotangents is not None)(*arguments).items()}


def differences(found: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """By result: "error", ‖found - right‖ / ‖right‖, and "norm_ratio", ‖found‖ / ‖right‖."""
    norm = lambda x: float(np.linalg.norm(x))  # of all its elements
    report = {}
    for name, x in found.items():
        x = np.asarray(x, np.float64)
        report[name] = {
            "error": norm(x - right[name]) / norm(right[name]),
            "norm_ratio": norm(x) / norm(right[name]),
        }
    return report


def suspects(report: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Results whose norm is wrong, as where products were silently zero, or that are not numbers."""
    return [name for name, result in report.items() if not 0.97 <= result["norm_ratio"] <= 1.03]
