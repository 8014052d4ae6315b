"""Sampling of the next token: greedy, temperature, top-k, top-p, each row by its own settings and seed."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from efla_jax.inference import InferenceError

Host = Array | np.ndarray  # on the host until they are filled in


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn, see `truncate`. temperature 0: the likeliest. top_k 0, top_p 1: from all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise InferenceError(f"temperature is {self.temperature}; it must be finite and at least 0 (greedy)")
        if not 0 <= self.top_k < 2**31:
            raise InferenceError(f"top_k is {self.top_k}; it must be at least 0 (all tokens)")
        if not 0 < self.top_p <= 1:
            raise InferenceError(f"top_p is {self.top_p}; it must be in (0, 1]")
        if not 0 <= self.seed < 2**32:
            raise InferenceError(f"seed is {self.seed}; it must be in [0, 2^32)")


class Rows(NamedTuple):
    """What sampling knows of each row: its settings, its last token and how many it has drawn."""

    token: Int[Host, "B 1"]
    drawn: Int[Host, "B"]
    temperature: Float[Host, "B"]
    top_k: Int[Host, "B"]
    top_p: Float[Host, "B"]
    seed: UInt32[Host, "B"]


def fresh_rows(batch: int) -> Rows:
    """Greedy rows that have drawn nothing, as NumPy arrays to be filled in."""
    return Rows(
        token=np.zeros((batch, 1), np.int32),
        drawn=np.zeros(batch, np.int32),
        temperature=np.zeros(batch, np.float32),
        top_k=np.zeros(batch, np.int32),
        top_p=np.ones(batch, np.float32),
        seed=np.zeros(batch, np.uint32),
    )


def truncate(
    logits_BV: Float[Array, "B V"], temperature: Float[Host, "B"], top_k: Int[Host, "B"], top_p: Float[Host, "B"]
) -> tuple[Float[Array, "B V"], Int[Array, "B V"]]:
    """(logits of the distribution to draw from, the tokens they belong to), each row by falling logit.

    The logits are divided by the temperature (> 0); all but the top_k most likely tokens (0: none) are dropped, then
    all but the fewest whose probabilities, of those left, sum to at least top_p. What is dropped has logit -inf. Of
    equally likely tokens the one of lower id comes first.
    """
    token_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, token_BV, axis=-1)
    temperature = jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)  # what is below counts as zero on CPU
    sorted_BV = (sorted_BV - sorted_BV[:, :1]) / temperature[:, None]  # the first is 0: no infinity less another
    vocabulary = logits_BV.shape[-1]
    most = jnp.where(top_k > 0, top_k, vocabulary)
    sorted_BV = jnp.where(jnp.arange(vocabulary)[None] < most[:, None], sorted_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    kept_BV = (before_BV < top_p[:, None]) | (top_p[:, None] >= 1)  # a sum may round to 1 before the last token
    return jnp.where(kept_BV, sorted_BV, -jnp.inf), token_BV


@partial(jax.jit, static_argnames=("vocabulary", "drawing"))
def sample(logits_BV: Float[Array, "B V"], rows: Rows, vocabulary: int, drawing: bool | None = None) -> Rows:
    """rows with the next token of each.

    Temperature 0 takes the likeliest token. Else the draw's key is fold_in(key(seed), drawn): it depends on nothing
    but the request. Only the first `vocabulary` ids are drawn; those behind are padding of the model's head.
    drawing: whether some temperature is above 0; None lets the device find out, for which a GPU waits for the host.
    """
    logits_BV = logits_BV[:, :vocabulary]

    def draw(logits_BV):
        kept_BV, token_BV = truncate(logits_BV, rows.temperature, rows.top_k, rows.top_p)
        choose = lambda seed, drawn, logits: jax.random.categorical(
            jax.random.fold_in(jax.random.key(seed), drawn), logits
        )
        place_B = jax.vmap(choose)(rows.seed, rows.drawn, kept_BV)
        return jnp.take_along_axis(token_BV, place_B[:, None], axis=-1)[:, 0].astype(jnp.int32)

    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if drawing is None:
        drawn_B = jax.lax.cond(jnp.any(rows.temperature > 0), draw, lambda _: greedy_B, logits_BV)
    else:
        drawn_B = draw(logits_BV) if drawing else greedy_B
    token_B1 = jnp.where(rows.temperature > 0, drawn_B, greedy_B)[:, None]
    return rows._replace(token=token_B1, drawn=rows.drawn + 1)
