"""Tile sizes of the kernels, by architecture, type and K; which devices and which calls they serve.

The tables were made from what each candidate compiles to: no spills in the forward, few in the backward, shared memory
within the smallest card of the architecture. In the gradients, of those the most columns of K a program, for parts of K
repeat the products of a chunk's pairs; and 4 warps where products are a warp's: each takes 16 of a chunk's 64 rows, and
8 would compute every row twice.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

KEY_DIMS = (16, 32, 64, 128)
VALUE_DIMS = (16, 32, 64, 128, 256)
DTYPES = ("bfloat16", "float16")
MAX_CHUNK = 64  # tokens; fewer where all fit into one chunk
OLDEST = 80  # sm_80: bfloat16 and TF32 tensor cores, asynchronous copies


class Tile(NamedTuple):
    """Columns of K and of V that a program holds at a time (at most), its warps, the stages of its loop's loads."""

    key_columns: int
    columns: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """`scan` is the reverse scan's too."""

    prepare: Tile
    scan: Tile
    gradients: Tile


_ALL = 1 << 30
# By (sm_90, bytes of what products take, K > 64). Whatever is not sm_90 has the warp-level instructions of sm_80.
_SCAN = {
    (False, 2, False): Tile(_ALL, 32, 4, 2),
    (False, 2, True): Tile(_ALL, 32, 8, 2),
    (False, 4, False): Tile(_ALL, 16, 8, 2),
    (False, 4, True): Tile(_ALL, 16, 8, 2),
    (True, 2, False): Tile(_ALL, 64, 4, 2),
    (True, 2, True): Tile(_ALL, 32, 8, 3),
    (True, 4, False): Tile(_ALL, 16, 4, 2),
    (True, 4, True): Tile(_ALL, 16, 8, 1),
}
# By (sm_90, bytes of what products take, whether value heads share a key head: sums over them are held too).
_GRADIENTS = {
    (False, 2, False): Tile(32, 32, 4, 2),
    (False, 2, True): Tile(16, 16, 4, 2),
    (False, 4, False): Tile(32, 16, 4, 1),
    (False, 4, True): Tile(16, 16, 4, 1),
    (True, 2, False): Tile(64, 64, 8, 2),
    (True, 2, True): Tile(64, 32, 8, 2),
    (True, 4, False): Tile(64, 64, 8, 1),
    (True, 4, True): Tile(32, 32, 8, 1),
}


def tiles(capability, itemsize, key_dim, value_dim, grouped):
    """The tiles for a device (90 for sm_90), the bytes of what products take, K, V and whether value heads share key
    heads."""
    hopper, wide = 90 <= capability < 100, key_dim > 64
    prepare = Tile(_ALL, _ALL, 8 if wide and not hopper else 4, 1)
    fit = lambda tile: tile._replace(key_columns=min(tile.key_columns, key_dim), columns=min(tile.columns, value_dim))
    return Tiles(fit(prepare), fit(_SCAN[hopper, itemsize, wide]), fit(_GRADIENTS[hopper, itemsize, grouped]))


def capability() -> int | None:
    """80 for sm_80 and so on, of the default device; None where it is no NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return None
    number = re.fullmatch(r"(\d+)\.(\d)", str(getattr(jax.devices()[0], "compute_capability", None)))
    return int(number[1] + number[2]) if number else None  # a GPU of another make has a name there


def unsupported(dtypes, key_dim, value_dim, chunk_size):
    """Why the kernels cannot serve a call of this kind, or None; dtypes are those of query, key and value."""
    names = [jnp.dtype(dtype).name for dtype in dtypes]
    if len(set(names)) > 1 or names[0] not in DTYPES:
        return f"query, key and value are {', '.join(names)}; the kernels take all bfloat16 or all float16"
    if key_dim not in KEY_DIMS:
        return f"K is {key_dim}; the kernels take {', '.join(map(str, KEY_DIMS))}"
    if value_dim not in VALUE_DIMS:
        return f"V is {value_dim}; the kernels take {', '.join(map(str, VALUE_DIMS))}"
    if chunk_size not in (None, MAX_CHUNK):
        return f"chunk_size={chunk_size}; the kernels' chunks are of {MAX_CHUNK} tokens"
    return None
