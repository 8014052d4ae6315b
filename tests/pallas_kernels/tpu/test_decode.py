"""The decode kernel, interpreted, against the float64 recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax import efla_step
from pallas_kernels.tpu.decode import decode
from tests.pallas_kernels.hopper.test_decode import SCALE, draw, error, recurrence

pytestmark = [pytest.mark.usefixtures("interpreted"), pytest.mark.cpu("interpreted as a TPU kernel")]

BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((2, 1, 2, 4, 64, 128, F32), dict(decay=True)),
        ((1, 1, 3, 3, 128, 64, BF16), dict(decay=False, tied=True)),
        ((1, 1, 2, 2, 192, 256, BF16), dict(decay=True, tied=True)),
        ((3, 1, 1, 2, 64, 64, F32), dict(decay=False)),
    ],
    ids=str,
)
def test_right(sizes, options):
    """Float32 throughout: a few roundings, of a sum over K, and one more of the output in value's type."""
    inputs = draw(*sizes, **options)
    output, state = jax.jit(lambda *x: decode(*x, scale=SCALE))(*inputs)
    want_output, want_state = recurrence(*inputs)
    value = inputs[2]
    assert (output.dtype, state.dtype) == (value.dtype, jnp.float32)
    rounding = float(jnp.finfo(jnp.float32).eps)
    assert error(state, want_state) < 4 * rounding
    assert error(output, want_output) < 4 * rounding + float(jnp.finfo(value.dtype).eps) / 2


def step(key, implementation, **options):
    """Of the public call: output, state and a gradient."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), F32)
    query, value, beta, state = normal(2, 2, 64), normal(2, 4, 64), normal(2, 4) ** 2, normal(2, 4, 64, 64)
    call = lambda key: efla_step(query, key, value, beta, state, implementation=implementation, **options)
    return *call(key), jax.grad(lambda key: jnp.sum(jnp.sin(call(key)[0])))(key)


@pytest.mark.parametrize("options", [{}, dict(log_decay=-jnp.ones((2, 4)), scale=0.3, integrator="split")], ids=str)
def test_step(options):
    key = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 64)) / 8, F32)
    for x, y in zip(step(key, "pallas_tpu", **options), step(key, "xla", **options), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_step_under_vmap():
    keys = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 2, 64)) / 8, F32)
    got = jax.vmap(lambda key: step(key, "pallas_tpu"))(keys)
    for x, y in zip(jax.tree.leaves(got), zip(*(step(key, "xla") for key in keys), strict=True), strict=True):
        np.testing.assert_allclose(x, jnp.stack(y), rtol=2e-5, atol=2e-5)
