"""What the tests of the op share: inputs, one compiled call that gives every gradient, and the measure of error.

The error model, in this one place. A tensor's error is its Frobenius distance from the float64 token loop on the same
inputs, relative to that loop's norm. How much of it float32 makes unavoidable is what the float32 token loop itself
makes; it must stay below LOOP roundings. Another implementation sums in another order and may make FACTOR times as
much, or FACTOR times MINIMUM roundings where the loop is luckily almost exact. A wrong term costs thousands.

On a GPU (`make test-gpu`) the float64 loop still runs on the CPU, where it compiles sooner; what is judged runs there.
"""

import functools
from typing import Any

import jax
import numpy as np

from efla_jax import delta_rule_attention, efla_attention

EPS = float(np.finfo(np.float32).eps)
FACTOR, MINIMUM, LOOP = 8, 2, 64


def draw(
    seed=0,
    *,
    batch=2,
    length=65,
    heads=4,
    key_heads=2,
    key_dim=5,
    value_dim=7,
    norm2=1.0,
    decay=False,
    dtype=np.float32,
) -> dict[str, Any]:
    """Random inputs of `efla_attention` with ‖k‖² in [norm2/2, norm2], beta in [0, 1], log-decay in [-0.3, 0]."""
    rng = np.random.default_rng(seed)
    key = rng.normal(size=(batch, length, key_heads, key_dim))
    key *= np.sqrt(norm2 * rng.uniform(0.5, 1, key.shape[:3]) / np.sum(key**2, -1))[..., None]
    inputs = dict(
        query=rng.normal(size=key.shape),
        key=key,
        value=rng.normal(size=(batch, length, heads, value_dim)),
        beta=rng.uniform(size=(batch, length, heads)),
        initial_state=rng.normal(size=(batch, heads, key_dim, value_dim)),
    )
    if decay:
        inputs["log_decay"] = -0.3 * rng.uniform(size=(batch, length, heads))
    return {name: x.astype(dtype) for name, x in inputs.items()}


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def reordered() -> float:
    """How far float32 results of one function may be apart if two programs sum in another order: as far as a GPU's
    library chooses otherwise by shape."""
    return (LOOP if on_gpu() else FACTOR) * EPS


def cotangents(inputs, seed=1):
    """Random cotangents of (output, state)."""
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=inputs[name].shape).astype(np.float32) for name in ("value", "initial_state"))


@functools.cache
def _compiled(options, oracle):
    def run(inputs, segment_ids, cotangents):
        call = delta_rule_attention if "erase" in inputs else efla_attention
        op = lambda inputs: call(**inputs, segment_ids=segment_ids, **dict(options))
        results, pullback = jax.vjp(op, inputs)
        cotangents = (c.astype(x.dtype) for c, x in zip(cotangents, results, strict=True))
        (gradients,) = pullback(tuple(cotangents))
        return dict(zip(("output", "state"), results, strict=True)) | {f"d_{k}": x for k, x in gradients.items()}

    # The float64 oracle is compiled without optimization, which takes half the time.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0} if oracle else None)


def evaluate(inputs, dtype=None, *, segment_ids=None, cotangent=None, **options) -> dict[str, np.ndarray]:
    """Output, state and the gradient of every input by name, for random cotangents; inputs cast to dtype first.

    Inputs with erase are those of `delta_rule_attention`, others of `efla_attention`.
    """
    cotangent = cotangents(inputs) if cotangent is None else cotangent
    if dtype is not None:
        inputs = {name: np.asarray(x, dtype) for name, x in inputs.items()}
    oracle = dtype == np.float64 and options.get("implementation") == "scan"
    device = jax.devices("cpu")[0] if oracle else None
    with jax.enable_x64(dtype == np.float64), jax.default_device(device):
        results = _compiled(tuple(sorted(options.items())), oracle)(inputs, segment_ids, cotangent)
        return {name: np.asarray(x) for name, x in results.items()}


def errors(got, want) -> dict[str, float]:
    """Relative Frobenius error of each tensor; absolute where the true one is zero."""
    norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64).ravel()))
    return {name: norm(got[name].astype(np.float64) - x) / (norm(x) or 1.0) for name, x in want.items()}


def assert_accurate(inputs, *, implementation="xla", chunk_size=None, **options):
    """The float32 token loop, and `implementation` by its measure, agree with the float64 token loop."""
    want = evaluate(inputs, np.float64, implementation="scan", **options)
    loop = errors(evaluate(inputs, implementation="scan", **options), want)
    astray = {name: e / EPS for name, e in loop.items() if not e <= LOOP * EPS}
    assert not astray, f"roundings made by the token loop: {astray}"
    got = errors(evaluate(inputs, implementation=implementation, chunk_size=chunk_size, **options), want)
    too_far = {n: (e / EPS, loop[n] / EPS) for n, e in got.items() if not e <= FACTOR * max(loop[n], MINIMUM * EPS)}
    assert not too_far, f"roundings made, and made by the token loop: {too_far}"
