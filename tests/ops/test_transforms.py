"""vmap, remat, shard_map by the caller, empty inputs; what the chunkwise form keeps and calls."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from efla_jax import delta_rule_attention, efla_attention
from tests.ops.helpers import cotangents, draw, errors, evaluate, reordered

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["scan", "xla"])
IDS = np.repeat([[0, 1]], 20, 1)  # of one row; every row has the same


def attend(inputs, implementation):
    return efla_attention(
        **inputs, segment_ids=jnp.repeat(IDS, len(inputs["key"]), 0), implementation=implementation
    )  # fmt: skip


def gradients(op, inputs):
    """Gradients of sum(sin(output)) + sum(sin(state)) by every input."""
    loss = lambda inputs: sum(jnp.sum(jnp.sin(x)) for x in op(inputs))
    return {name: np.asarray(x) for name, x in jax.jit(jax.grad(loss))(inputs).items()}


@functools.cache
def plain(implementation):
    """Inputs of four rows and their gradients, untransformed."""
    inputs = draw(batch=4, length=40, decay=True)
    return inputs, gradients(functools.partial(attend, implementation=implementation), inputs)


@IMPLEMENTATIONS
def test_vmap(implementation):
    """Over a leading axis of every input."""
    inputs, want = plain(implementation)
    op = jax.vmap(functools.partial(attend, implementation=implementation))
    got = gradients(op, {name: x[:, None] for name, x in inputs.items()})
    assert max(errors({name: x[:, 0] for name, x in got.items()}, want).values()) < reordered()


@IMPLEMENTATIONS
def test_vmap_over_one_input(implementation):
    inputs, _ = plain(implementation)
    call = lambda beta: dict(zip("os", attend(inputs | dict(beta=beta), implementation), strict=True))
    betas = np.stack([inputs["beta"], inputs["beta"] / 2])
    got = jax.tree.map(np.asarray, jax.jit(jax.vmap(call))(betas))
    for i, beta in enumerate(betas):
        assert max(errors({name: x[i] for name, x in got.items()}, jax.jit(call)(beta)).values()) < reordered()


@IMPLEMENTATIONS
def test_remat(implementation):
    inputs, want = plain(implementation)
    got = gradients(jax.checkpoint(functools.partial(attend, implementation=implementation)), inputs)
    assert max(errors(got, want).values()) < reordered()


def by_rows(implementation):
    """The op in a caller's own shard_map, its checks on: an implementation sees one device's share."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    op, rows = functools.partial(attend, implementation=implementation), PartitionSpec("data")
    return jax.shard_map(op, mesh=mesh, in_specs=rows, out_specs=rows)


@pytest.mark.cpu("needs two devices")
@IMPLEMENTATIONS
def test_shard_map_by_the_caller(implementation):
    inputs, want = plain(implementation)
    assert max(errors(gradients(by_rows(implementation), inputs), want).values()) < reordered()


@pytest.mark.cpu("needs two devices")
@IMPLEMENTATIONS
def test_shard_map_without_state(implementation):
    """The zeros that stand for no initial state are the same on every device; what becomes of them is not."""
    inputs, _ = plain(implementation)
    inputs = {name: x for name, x in inputs.items() if name != "initial_state"}
    want = jax.jit(functools.partial(attend, implementation=implementation))(inputs)
    got = jax.jit(by_rows(implementation))(inputs)
    got, want = (dict(zip("os", map(np.asarray, x), strict=True)) for x in (got, want))
    assert max(errors(got, want).values()) < reordered()


@IMPLEMENTATIONS
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5), (0, 0)])
def test_empty(implementation, batch, length):
    """No tokens: the initial state comes back and its gradient goes through; every other gradient is empty."""
    inputs = draw(batch=batch, length=length, decay=True)
    got = evaluate(inputs, implementation=implementation, segment_ids=np.zeros((batch, length), np.int32))
    np.testing.assert_array_equal(got["state"], inputs["initial_state"])
    np.testing.assert_array_equal(got["d_initial_state"], cotangents(inputs)[1])
    assert all(got[f"d_{name}"].shape == x.shape for name, x in inputs.items())
    assert got["output"].shape == inputs["value"].shape


def test_no_initial_state_is_zeros():
    inputs = draw(length=20)
    inputs["initial_state"][:] = 0
    with_zeros = evaluate(inputs, implementation="xla")
    without = jax.jit(lambda x: efla_attention(**x, implementation="xla"))(
        {name: x for name, x in inputs.items() if name != "initial_state"}
    )
    np.testing.assert_array_equal(without[0], with_zeros["output"])
    np.testing.assert_array_equal(without[1], with_zeros["state"])


def long_inputs(length, heads=2, dim=32):
    """Arguments of `delta_rule_attention` as shapes only."""
    tokens = jax.ShapeDtypeStruct((1, length, heads, dim), jnp.float32)
    coefficients = jax.ShapeDtypeStruct((1, length, heads), jnp.float32)
    return (tokens,) * 3 + (coefficients,) * 2 + (jax.ShapeDtypeStruct((1, heads, dim, dim), jnp.float32),)


def chunkwise(query, key, value, erase, write, state):
    return delta_rule_attention(
        query, key, value, erase, write, initial_state=state, implementation="xla", chunk_size=32
    )


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_keeps_states_at_chunk_borders_only():
    """Residuals: the inputs and one state a chunk, to the byte."""
    inputs = long_inputs(1024)
    kept = jax.eval_shape(lambda *x: jax.vjp(chunkwise, *x)[1], *inputs)
    *tokens, state = inputs
    assert size(kept) == size(tokens) + 1024 // 32 * size(state)


def compiled_backward(length) -> Any:
    def backward(*inputs):
        results, pullback = jax.vjp(chunkwise, *inputs)
        return pullback(results)

    return jax.jit(backward).lower(*long_inputs(length)).compile()


@pytest.mark.cpu("a GPU works on larger blocks")
def test_backward_memory_is_linear():
    """Twice the tokens take twice the temporary memory, and that is but a few times what the inputs take."""
    memory = lambda length: compiled_backward(length).memory_analysis().temp_size_in_bytes
    short, long = memory(2048), memory(4096)
    assert long <= 2.1 * short
    assert long <= 4 * size(long_inputs(4096))


@pytest.mark.cpu("on a GPU every product is a custom call")
def test_no_triangular_solve():
    """No triangular solve, LAPACK's or other: those are XLA's own op or a custom call."""
    text = compiled_backward(256).as_text()
    assert " dot(" in text
    assert " triangular-solve(" not in text
    assert " custom-call(" not in text
