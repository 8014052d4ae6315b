"""Prefill in pieces and decoding token by token equal one forward pass."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax import efla_attention, efla_step
from efla_jax.ops.coefficients import INTEGRATORS
from tests.ops.helpers import EPS, draw, errors

LENGTH = 40


@functools.cache
def attend(**options):
    return jax.jit(lambda inputs: efla_attention(**inputs, **options))


@functools.cache
def step(**options):
    return jax.jit(lambda inputs, state: efla_step(**inputs, state=state, **options))


def pieces(inputs, splits, options):
    """Output and state: prefill up to each split, then `efla_step` for every token after the last."""
    state, outs = inputs["initial_state"], []
    tokens = {name: x for name, x in inputs.items() if name != "initial_state"}
    for start, stop in itertools.pairwise((0, *splits)):
        out, state = attend(**options)({n: x[:, start:stop] for n, x in tokens.items()} | dict(initial_state=state))
        outs.append(out)
    options = {name: x for name, x in options.items() if name != "implementation"}
    for t in range(splits[-1], LENGTH):
        out, state = step(**options)({name: x[:, t] for name, x in tokens.items()}, state)
        outs.append(out[:, None])
    return dict(output=np.concatenate(outs, 1), state=np.asarray(state))


@pytest.mark.parametrize("implementation", ["scan", "xla"])
@pytest.mark.parametrize("splits", [(37,), (20, 37), (1, 36), (0,), (40,)], ids=str)
def test_pieces(splits, implementation):
    inputs = draw(length=LENGTH, decay=True)
    options = dict(implementation=implementation, scale=0.5)
    want = dict(zip(("output", "state"), attend(**options)(inputs), strict=True))
    assert max(errors(pieces(inputs, splits, options), want).values()) < 20 * EPS


@pytest.mark.parametrize("decay", [False, True], ids=["no decay", "decay"])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_every_integrator(integrator, decay):
    inputs = draw(length=LENGTH, decay=decay)
    options = dict(implementation="scan", integrator=integrator)
    want = dict(zip(("output", "state"), attend(**options)(inputs), strict=True))
    assert max(errors(pieces(inputs, (38,), options), want).values()) < 10 * EPS


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float64])
def test_types(dtype):
    """The output has value's type; the state stays float32, float64 for float64 inputs, however low the inputs."""
    inputs = draw(length=LENGTH, decay=True, dtype=dtype)
    accumulator = np.float64 if dtype == np.float64 else np.float32
    inputs["initial_state"] = inputs["initial_state"].astype(accumulator)
    with jax.enable_x64(dtype == np.float64):
        want = dict(zip(("output", "state"), map(np.asarray, attend(implementation="scan")(inputs)), strict=True))
        got = pieces(inputs, (38,), dict(implementation="scan"))
    assert got["output"].dtype == dtype
    assert got["state"].dtype == accumulator
    assert errors(got, want)["output"] < 4 * float(jnp.finfo(dtype).eps)
    assert errors(got, want)["state"] < 10 * float(jnp.finfo(accumulator).eps)


def test_numpy_float64():
    """Float32 unless x64 is on, without a warning."""
    inputs = draw(length=1, decay=True)
    tokens = {name: x[:, 0] for name, x in inputs.items() if name != "initial_state"}
    want = efla_step(**tokens, state=inputs["initial_state"])
    wide = {name: x.astype(np.float64) for name, x in tokens.items()}
    got = efla_step(**wide, state=inputs["initial_state"].astype(np.float64))
    assert all(x.dtype == np.float32 for x in got)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_gradient_of_a_step():
    """Decoding is differentiable: the gradient of a step is that of a sequence of one token."""
    inputs = draw(length=1, decay=True)
    tokens = {name: x for name, x in inputs.items() if name != "initial_state"}

    def by_step(tokens, state):
        out, state = efla_step(**{name: x[:, 0] for name, x in tokens.items()}, state=state)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(state))

    def by_sequence(tokens, state):
        out, state = efla_attention(**tokens, initial_state=state, implementation="scan")
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(state))

    got, want = (jax.jit(jax.grad(f, (0, 1)))(tokens, inputs["initial_state"]) for f in (by_step, by_sequence))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)
