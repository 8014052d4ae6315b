"""What the tests of the Hopper kernels share: 16-bit inputs and the bounds on error.

Of bfloat16 a kernel may make FACTOR times the error of the `xla` path, which rounds much the same intermediates to
bfloat16 too. An array of few numbers, or one that few numbers dominate (gradients of beta where keys are long: all but
those of the smallest betas vanish), has an error that scatters from draw to draw. So the bound of an array is taken
from the median over the arrays that are bfloat16 themselves where that is larger, up to SCATTER times `xla`'s error.
A float16 product has no such path beside it, as `xla` multiplies float16 in float32: there the bound is a number of
roundings. A wrong term costs 0.1 to 1 in every case here.
"""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efla_jax import delta_rule_attention, efla_attention
from tests.ops.helpers import cotangents, draw, errors, evaluate

LOW = ("query", "key", "value")
FACTOR, SCATTER = 1.5, 4
ROUNDINGS = 8  # of 2^-11, relative


def rounded(seed=0, dtype=jnp.bfloat16, **sizes) -> tuple[dict[str, Any], tuple]:
    """Inputs with ‖k‖² about 1 and cotangents of output and state, of the types that the kernels take.

    Every other beta is made small where keys are long, so that gradients of beta are not all but 0.
    """
    sizes = dict(batch=2, length=130, heads=1, key_heads=1, key_dim=64, value_dim=64) | sizes
    inputs = draw(seed, **sizes)
    inputs["beta"][:, ::2] *= min(1, 3 / sizes.get("norm2", 1))
    d_output, d_state = cotangents(inputs, seed + 100)
    return low(inputs, dtype), (d_output.astype(dtype), d_state)


def low(inputs, dtype=jnp.bfloat16):
    return {name: x.astype(dtype) if name in LOW else x for name, x in inputs.items()}


def documents(starts, batch, length):
    """[B, T] ids: in the first row, documents that start there and at 0; other rows start theirs 3 tokens earlier."""
    shifted = np.arange(length) + 3 * (np.arange(batch) > 0)[:, None]
    return np.searchsorted(starts, shifted, side="right").astype(np.int32)


def counted(starts, length):
    """[1, T], documents that begin at these tokens as the kernels take them: 0 is what the chunk before ended with."""
    begins = jnp.zeros((1, length), bool).at[0, jnp.array(starts, int)].set(True)
    return jnp.cumsum(begins.reshape(1, -1, 64), -1, dtype=jnp.int32).reshape(1, -1)


def too_far(got, want, xla, factor=FACTOR) -> dict[str, tuple[float, float]]:
    """Arrays whose error is above the bound, with error and bound. xla: the results of `xla`, None for float16."""
    found = errors(got, want)
    if xla is None:
        limits = dict.fromkeys(found, ROUNDINGS * 2**-11)
    else:
        theirs = errors(xla, want)
        usual = float(np.median([theirs[name] for name, x in xla.items() if x.dtype == jnp.bfloat16]))
        limits = {name: factor * max(e, min(usual, SCATTER * e)) for name, e in theirs.items()}
    return {name: (e, limits[name]) for name, e in found.items() if not e <= limits[name]}


def assert_accurate(inputs, cotangent, factor=FACTOR, **options):
    """The kernels agree with the float64 token loop."""
    options = dict(cotangent=cotangent) | options
    got = evaluate(inputs, implementation="pallas_gpu", **options)
    want = evaluate(inputs, np.float64, implementation="scan", **options)
    half = inputs["key"].dtype == jnp.float16
    xla = None if half else evaluate(inputs, implementation="xla", **options)
    found = too_far(got, want, xla, factor)
    assert not found, f"errors and their bounds: {found}"
    for name, x in inputs.items():
        assert got[f"d_{name}"].dtype == x.dtype
        assert got[f"d_{name}"].shape == x.shape


def attend(inputs, ids, dtype=None, **options):
    """Output and state; of the float64 oracle on the CPU, where dtype says so."""
    arrays = inputs if dtype is None else {name: np.asarray(x, dtype) for name, x in inputs.items()}
    call = delta_rule_attention if "erase" in inputs else efla_attention
    with jax.enable_x64(dtype is not None), jax.default_device(None if dtype is None else jax.devices("cpu")[0]):
        found = jax.jit(partial(call, **options))(**arrays, segment_ids=ids)
        return {name: np.asarray(x) for name, x in zip(("output", "state"), found, strict=True)}


def assert_accurate_alone(inputs, ids=None, **options):
    """Output and state of the kernels that save nothing agree with the float64 token loop."""
    want = attend(inputs, ids, np.float64, implementation="scan", **options)
    half = inputs["key"].dtype == jnp.float16
    xla = None if half else attend(inputs, ids, implementation="xla", **options)
    found = too_far(attend(inputs, ids, implementation="pallas_gpu", **options), want, xla)
    assert not found, f"errors and their bounds: {found}"


def in_whole_rows(monkeypatch):
    """The fused kernel with all columns of a head in a block, however few heads there are."""
    for name in ("mosaic", "forward", "few_heads", "pieces"):
        monkeypatch.setattr(importlib.import_module(f"pallas_kernels.hopper.{name}"), "PROCESSORS", 1)
