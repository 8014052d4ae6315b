"""Block sizes that were measured on a card: `blocks.json`, written by experiments/kernels/tune.py, read when tracing.

A table belongs to one kind of device and one direction. Its rows are keyed by K, V, B·H and T; a shape between two
measured ones takes the nearer, by the ratio. What is not in it, the kernels choose by their own rule.
"""

import functools
import json
import math
from pathlib import Path

import jax

PATH = Path(__file__).with_name("blocks.json")
# A measurement says nothing about shapes that are further away than this factor, in B·H or in T. Pieces fill the card:
# as many of twice the heads would take two rounds.
FURTHEST = dict(decode=4.0, forward=1.5, both=1.5)


@functools.cache
def tables() -> dict[str, dict[str, dict]]:
    """device kind -> direction -> {"provenance": …, "rows": [{K, V, BH, T, choice}, …]}."""
    return json.loads(PATH.read_text())


def lookup(direction: str, key_dim: int, value_dim: int, heads: int, length: int, *, device: str | None = None) -> dict:
    """The measured choice for B·H = heads and T = length; {} where nothing near enough was measured.

    device: its kind as JAX names it; None for that of the default backend.
    """
    device = jax.devices()[0].device_kind if device is None else device
    rows = tables().get(device, {}).get(direction, {}).get("rows", ())
    ratio = lambda have, want: abs(math.log2(have / want))
    near = []
    for row in rows:
        if (row["K"], row["V"]) == (key_dim, value_dim):
            away = ratio(row["BH"], heads), ratio(row["T"], length)
            if max(away) <= math.log2(FURTHEST[direction]):
                near.append((sum(away), row["BH"], row["T"], row["choice"]))
    return min(near, key=lambda found: found[:3])[-1] if near else {}
