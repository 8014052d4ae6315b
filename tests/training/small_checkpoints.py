"""Checkpoints of a small train state, each step's a function of its number."""

from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from efla_jax.training.checkpoint import Checkpoints, load_newest


def batches():
    """An endless shuffled iterator, whose values differ from one batch to the next."""
    return iter(grain.MapDataset.range(1000).shuffle(seed=3).repeat().batch(4).to_iter_dataset())


def build_state(step, width=16) -> dict[str, Any]:
    """A train state of the real kinds of leaves, each a function of `step`."""
    key = jax.random.fold_in(jax.random.key(7), step)
    params, rest = nnx.state(nnx.Linear(8, width, rngs=nnx.Rngs(params=key)), nnx.Param, ...)
    params["half"] = nnx.Param(jax.random.normal(key, (8, 4), jnp.bfloat16))
    return {
        "step": jnp.int32(step),
        "params": params,
        "rest": rest,
        "opt_state": optax.adam(1e-3).init(params),
        "key": key,
    }


def assert_same_bits(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


def save_steps(directory, steps, **options):
    """Saves `steps` with one batch of data consumed per step."""
    data = batches()
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            next(data)
            checkpoints.save(step, build_state(step), data)


def restore(directory, state, data):
    with Checkpoints(directory) as checkpoints:
        restored = checkpoints.restore(state, data)
        assert restored is not None
        assert checkpoints.latest == restored[1]
        return restored


def load(directory, state):
    loaded = load_newest(directory, state)
    assert loaded is not None
    return loaded


def assert_restores(directory, step):
    """The newest good checkpoint is that of `step`, bit for bit, its data position included."""
    data, untouched = batches(), batches()
    state, found = restore(directory, build_state(0), data)
    assert found == step
    assert_same_bits(state, build_state(step))
    for _ in range(step):
        next(untouched)
    np.testing.assert_array_equal(next(data), next(untouched))


def names(directory):
    return sorted(path.name for path in Path(directory).iterdir())
