"""Causal depthwise convolution over a few tokens, which keeps documents apart."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from efla_jax.ops.scan import segment_starts


class ShortConvolution(nnx.Module):
    """y_t = Σ_{i<width} kernel_i ∘ x_{t-i}, without reaching before the start of t's document."""

    def __init__(self, features: int, width: int, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        if width < 1:
            raise ValueError(f"width is {width}; it must be at least 1")
        init = nnx.initializers.uniform(2 / width**0.5)  # shifted to ±1/√width, as for a dense layer of `width` inputs
        self.kernel = nnx.Param(init(rngs.params(), (width, features), param_dtype) - 1 / width**0.5)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        history: Float[Array, "B W D"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B W D"]]:
        """history is the last W = width - 1 inputs before token 0, of its document; returns (y, the new history).

        lengths: how many tokens of each row count, the first ones; the new history is that behind the last of them.
        """
        kernel = self.kernel[...].astype(x_BTD.dtype)
        batch, length, features = x_BTD.shape
        past = kernel.shape[0] - 1
        if history is None:
            history = jnp.zeros((batch, past, features), x_BTD.dtype)
        padded = jnp.concatenate([history.astype(x_BTD.dtype), x_BTD], axis=1)
        document = jnp.zeros((batch, past + length), jnp.int32)
        if segment_ids is not None:
            document = jnp.pad(jnp.cumsum(segment_starts(segment_ids), axis=1), ((0, 0), (past, 0)))
        y = jnp.zeros_like(x_BTD)
        for lag in range(past + 1):
            window = slice(past - lag, past - lag + length)
            same = document[:, window] == document[:, past:]
            y = y + jnp.where(same[..., None], padded[:, window], 0) * kernel[lag][None, None]
        # what a later call may reach: inputs of the last document alone
        reachable = document == document[:, -1:]
        last = slice(length, None)
        if lengths is not None:
            rows = lengths[:, None] + jnp.arange(past)[None]
            reachable = document == jnp.take_along_axis(document, lengths[:, None] + past - 1, axis=1)
            at = lambda x: jnp.take_along_axis(x, rows.reshape(rows.shape + (1,) * (x.ndim - 2)), axis=1)
        else:
            at = lambda x: x[:, last]
        return y, jnp.where(at(reachable)[..., None], at(padded), 0)
