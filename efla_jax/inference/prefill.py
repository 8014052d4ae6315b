"""Prefill: prompts of any lengths through programs of a few lengths."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efla_jax.inference.programs import Cache, Programs, write_slot
from efla_jax.inference.state import State


def prefill(
    programs: Programs, params: Any, tokens: Sequence[np.ndarray], states: Sequence[State | None]
) -> tuple[jax.Array, Cache]:
    """Reads tokens int32 [N], of any N each, each behind its state or the beginning.

    Returns (logits float32 [B, vocab] after each row's last token, cache) for the least batch size that holds the
    rows; further rows are empty. N may be 0 where there is a state.
    """
    batch = next(size for size in programs.batch_sizes if size >= len(tokens))
    slots = (jnp.zeros((batch, programs.vocab_size), jnp.float32), programs.empty_cache(batch))
    structure = jax.tree.structure(slots)
    for row, state in enumerate(states):
        if state is not None:
            slots = write_slot(slots, jax.tree.unflatten(structure, (state.logits, *state.cache)), row)
    return _feed(programs, params, [*tokens, *[np.zeros(0, np.int32)] * (batch - len(tokens))], *slots)


def pieces(length: int, lengths: Sequence[int]) -> list[int]:
    """Which of the ascending lengths to feed one after the other to hold `length` tokens."""
    whole, rest = divmod(length, lengths[-1])
    return [lengths[-1]] * whole + ([next(size for size in lengths if size >= rest)] if rest else [])


def _feed(
    programs: Programs, params: Any, tokens: Sequence[np.ndarray], logits_BV: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Long rows are fed in pieces; short ones end in an earlier piece, and are left alone by those after it."""
    start = 0
    for size in pieces(max(map(len, tokens)), programs.lengths):
        parts = [row[start : start + size] for row in tokens]
        tokens_BL = np.stack([np.pad(part, (0, size - len(part))) for part in parts])
        lengths_B = np.array([len(part) for part in parts], np.int32)
        new_BV, cache = programs.forward(params, tokens_BL, lengths_B, cache)
        logits_BV = _keep(logits_BV, new_BV, lengths_B)
        start += size
    return logits_BV, cache


@partial(jax.jit, donate_argnums=0)
def _keep(logits_BV: jax.Array, new_BV: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """The new logits of the rows that had tokens."""
    return jnp.where(lengths_B[:, None] > 0, new_BV, logits_BV)
