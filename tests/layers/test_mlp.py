"""The feed-forward block against its equation."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from efla_jax.layers import SwiGLU


def test_is_its_equation():
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    layer = SwiGLU(6, 9, rngs=nnx.Rngs(0))
    gate, up, down = (np.asarray(part.kernel[...], np.float64) for part in (layer.gate, layer.up, layer.down))
    assert (gate.shape, up.shape, down.shape) == ((6, 9), (6, 9), (9, 6))
    assert sum(leaf.size for leaf in nnx.to_flat_state(nnx.state(layer, nnx.Param)).leaves) == 3 * 6 * 9  # no biases
    want = (x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down
    np.testing.assert_allclose(layer(jnp.asarray(x)), want, rtol=1e-5, atol=1e-6)


def test_computes_in_its_dtype():
    assert SwiGLU(6, 9, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)(jnp.ones((1, 2, 6))).dtype == jnp.bfloat16
