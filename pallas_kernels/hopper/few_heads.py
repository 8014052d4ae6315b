"""The forward pass of few heads in one kernel, with nothing kept: every warpgroup has one thing to do.

Each half of a head's columns has a block of threads. With the letters of `pallas_kernels.hopper.forward`:

- the state warpgroup does only what the next chunk waits for, and the output warpgroup follows; both are those of
  `pallas_kernels.hopper.scan`;
- two helpers make inverse and scores ahead of them, as in `forward`; the loader sends for what is read.

The two blocks of a head are a cluster. Each makes every other chunk's inverse and scores, and writes them to the shared
memory of both: four helpers work for a head, and nothing is made twice. The interpreter knows no such writes; there,
each block makes all for itself.
"""

from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.hopper.forward_helper import LOADER_REGISTERS, helper, loader
from pallas_kernels.hopper.inverse import BLOCK
from pallas_kernels.hopper.mosaic import (
    CHUNK,
    F32,
    PROCESSORS,
    SQUARE,
    Ring,
    check_registers,
    interpreting,
    launch,
    set_registers,
    smem,
    stage,
)
from pallas_kernels.hopper.scan import output_warpgroup
from pallas_kernels.hopper.scan_state import state_warpgroup

HELPERS = 2
# Of a thread. A launch gives five warpgroups 96 each.
REGISTERS = dict(loader=LOADER_REGISTERS, state=168, output=80, helper=104)


def serves(heads, value_dim, vectors, *, tied, save):
    """Whether a call is one for this kernel. heads: B·H. vectors: as `forward` takes them."""
    return value_dim == 128 and 2 * heads <= PROCESSORS and tied and not save and set(vectors) == {"gain"}


def forward(key, query, value, vectors, initial, *, scale, exact=False):
    """Output [B, T, H, V] and final [B, H, V, K] float32; arguments as of `forward`, for a call that `serves`."""
    batch, length, key_heads, key_dim = key.shape
    heads, value_dim = value.shape[2:]
    dtype, chunks, shared = value.dtype, pl.cdiv(length, CHUNK), not interpreting()
    inputs = dict(query=query, key=key, value=value, gain_v=vectors["gain"])
    inputs |= dict(starts=initial[:, :, None]) if initial is not None else {}
    outputs = dict(
        output=jax.ShapeDtypeStruct(value.shape, dtype),
        final=jax.ShapeDtypeStruct((batch, heads, value_dim, key_dim), F32),
    )
    streams = HELPERS * (1 + shared)  # that a head's chunks are dealt out to
    # a key waits for four helpers; shared memory is full, and a second place for values would be the least of it
    keys, queries, values = Ring.of("keys", 5, streams), Ring.of("queries", 2, streams), Ring.of("values", 1, streams)
    products = Ring.of("products", 3 if shared else HELPERS, streams)
    states, updates = Ring.of("states", 1, 1), Ring.of("updates", 1, 1)
    own = dict(  # a place for each helper
        blocks_s=smem((HELPERS, 1, BLOCK + CHUNK, BLOCK), jnp.float16),
        ladder_s=smem((HELPERS, 2, CHUNK, BLOCK), jnp.float16),
        keys_s=plgpu.SMEM((HELPERS, 4, CHUNK), F32),
        helper_stage=stage(jnp.float16, HELPERS),
    )
    absent = ("causal_s", "erase_s", "left_s", "right_s", "sums_r", "sums_c", "documents_r", "documents_c")
    scratch = dict.fromkeys(absent) | dict(
        k_s=smem((keys.slots, CHUNK, key_dim), dtype),
        q_s=smem((queries.slots, CHUNK, key_dim), dtype),
        v_s=smem((values.slots, 1, *SQUARE), dtype),
        solve_s=smem((products.slots, *SQUARE), dtype),
        scores_s=smem((products.slots, *SQUARE), dtype),
        states_s=smem((states.slots, 64, key_dim), dtype),
        updates_s=smem((updates.slots, *SQUARE), dtype),
        output_s=smem(SQUARE, dtype),
        gain_s=plgpu.SMEM((keys.slots, CHUNK), F32),
        numbers_r=plgpu.SMEM((CHUNK,), jnp.int32),  # 0 … 63, to be read by rows and by columns
        numbers_c=plgpu.SMEM((CHUNK,), jnp.int32),
        state_stage=stage(dtype, 1),
        **keys.barriers(2, 1),
        **queries.barriers(1, 1),
        **values.barriers(1, 1),
        **products.barriers(1 + shared, 2, shared),  # a tile at a time from the other block; for state and output
        **states.barriers(1, 1),
        **updates.barriers(1, 1),
    )
    config = SimpleNamespace(
        chunks=chunks, share=chunks, pieces=1, group=heads // key_heads, blocks=2, key_dim=key_dim, value_groups=2,
        writers=1, helpers=HELPERS, warpgroups=HELPERS + 3, streams=streams, helper_registers=REGISTERS["helper"],
        dtype=dtype, scale=scale, exact=exact, tied=True, folded=True, save=False, read=True, fed=True, shared=shared,
        given=initial is not None, decayed=False, summed=False, masked=False, skipping=False,
        keys=keys, queries=queries, values=values, products=products, scores=products, solves=products,
        states=states, updates=updates, own=tuple(own),
    )  # fmt: skip
    counts = dict(state=1, output=1, helper=HELPERS, loader=1)
    check_registers(*((count, REGISTERS[name]) for name, count in counts.items()))
    roles = (1, loader), (1, _state), (1, _output), (HELPERS, helper)
    return launch("efla_few_heads", config, inputs, outputs, scratch | own, (batch, heads, 2), *roles, clustered=shared)


def _state(config, r, w):
    set_registers(REGISTERS["state"], config.warpgroups)
    state_warpgroup(config, r, w)


def _output(config, r, w):
    set_registers(REGISTERS["output"], config.warpgroups)
    output_warpgroup(config, r, w)
