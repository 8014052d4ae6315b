"""Feed-forward block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class SwiGLU(nnx.Module):
    """down(silu(gate x) ∘ up x) (Shazeer, arXiv 2002.05202), no biases."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        options = dict(use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate = nnx.Linear(features, hidden, **options)
        self.up = nnx.Linear(features, hidden, **options)
        self.down = nnx.Linear(hidden, features, **options)

    def __call__(self, x_BTE: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        return self.down(jax.nn.silu(self.gate(x_BTE)) * self.up(x_BTE))
