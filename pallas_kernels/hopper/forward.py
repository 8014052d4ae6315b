"""The forward pass in one kernel: q, k, v are read once, o is written once, the inverse never leaves the chip.

One block of threads walks the chunks of one sequence and value head. With the docstring of `efla_jax.ops.chunkwise`,
a = decay from the chunk's start, e = decay to its end, d = decay of the whole chunk:

- the helper warpgroups issue all copies and work ahead, each on a chunk of its own: K Kᵀ, the triangular inverse,
  P = tril(D∘Q Kᵀ). One chunk takes a helper far longer than the state warpgroups; several of them keep up;
- each state warpgroup holds 64 columns of the state as Sᵀ [64, K] in registers and chains the products with the left
  operand in registers: Rᵀ from Sᵀ Kᵀ, then Uᵀ, Oᵀ = a∘Sᵀ Qᵀ + Uᵀ Pᵀ, Sᵀ ← d Sᵀ + (e∘U)ᵀ K. Warpgroups of one head
  share nothing but what the helpers made, and P where these do not make it.

Where heads are few, the state warpgroups of a head are in blocks of their own; what such blocks can share is used by
`pallas_kernels.hopper.few_heads`, which serves the plainest of these calls.

Two state warpgroups make P themselves, half of it each, if there is no decay. If nothing is saved either, helpers are
ahead: they make the inverse of a chunk and keep it in registers until the chunk whose place it takes is done with. Had
they to have the place first, the state warpgroups would wait for all that is made after that. These send for values
themselves, write outputs where values were, and multiply the state with keys and queries at a time.

Of documents without decay, the helpers say of each chunk in which one begins which of its tokens see the state before
it, and which are of the document that it ends with. Of such a chunk the state warpgroups multiply what the state
recalls by the former, empty the state, and multiply its updates by the latter or, where helpers are ahead, make the
keys of all others zeros.

Rows can be walked in pieces side by side, each from a given state or, of such documents, from where the one begins that
it cuts.

The state warpgroups: `pallas_kernels.hopper.forward_state`; the helpers: `pallas_kernels.hopper.forward_helper`.

Where erase and write are the same number c per token ("tied": every rule but the exact one with decay) the kernel
solves for the prediction error E = V - a∘K S - M U, which is what the backward pass wants, and U = c∘E:

    tied:   R = V - a∘K S         E = (I + M diag(c))⁻¹ R        U = c∘E
    untied: R = V - c∘a∘K S       U = (I + diag(c) M)⁻¹ R        (V has been multiplied by write)

The triangular inverse: `pallas_kernels.hopper.inverse`.
"""

from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.hopper.forward_helper import helper
from pallas_kernels.hopper.forward_state import state
from pallas_kernels.hopper.mosaic import CHUNK, F32, PROCESSORS, SQUARE, Ring, check_registers, launch, smem, stage
from pallas_kernels.hopper.scan_state import in_piece
from pallas_kernels.hopper.unit_inverse import WORKSPACE


def _crew(writers, key_dim, save, decayed, tied, mixing):
    """(helpers, registers of a thread of state warpgroups, and of helpers); None for as many as a launch gives.

    As many helpers as shared memory and registers hold. A launch gives 168 to each of three warpgroups, 128 of four.
    """
    if writers == 1:
        if save or decayed:
            return (2, 176, 160) if key_dim == 128 and save and (decayed or not tied) else (2, None, None)
        return (3, 176, 112) if key_dim == 128 else (3, 152, 112) if mixing else (3, None, None)
    if save or decayed:
        if key_dim == 64:
            return 2, None, None
        return (1, 176, 152) if save and (decayed or not tied) else (1, None, None)
    return 2, 176, 80


def forward(key, query, value, vectors, documents, starts, *, scale, tied, save, exact=False, share=None, leads=None):
    """Output, final state and what the backward pass needs, for chunked vectors.

    Args:
        query, key: [B, T, Hk, K], K 64 or 128, bfloat16 or float16.
        value: [B, T, H, V], V 64 or 128; multiplied by write if untied.
        vectors: name -> float32, 0 behind T. gain [B, N·64, H], which is erase or, if exact, beta. [B, H, N·64]: with
            decay, or documents of which something is saved, left (a) and right (e); with decay sums, the log2 of the
            decay from the chunk's or document's start.
        documents: [B, N·64] int32 or None, counted anew from chunk to chunk: 0 is what the chunk before ended with.
        starts: [B, H, P, V, K] float32, the state before each piece, or None for zeros.
        exact: erase is (1 - e^{-βλ})/λ, made here from λ = ‖k‖², which the diagonal of K Kᵀ holds anyway.
        share: chunks of a piece, of which the last may have fewer; None for all.
        leads: [B, P] int32, for those documents: as many chunks before the piece begins the document that it is walked
            from, with zeros before; where negative, it is walked from starts.

    Returns:
        output [B, T, H, V], state [B, H, K, V] float32; with save also the states at chunk starts [B, H, N, V, K], the
        inverse [B, H, N, C, C] of I + diag(c) M, and E (tied) or U (untied) [B, T, H, V], all in value's type, and, if
        exact, erase and square (λ) [B, H, N·64] float32.
    """
    batch, length, key_heads, key_dim = key.shape
    heads, value_dim = value.shape[2:]
    chunks = pl.cdiv(length, CHUNK)
    share = chunks if share is None else share
    pieces = pl.cdiv(chunks, share)
    splits = value_dim // 64 if batch * heads * pieces * (value_dim // 64) <= PROCESSORS else 1
    writers = value_dim // 64 // splits
    decayed, masked = "left" in vectors, documents is not None
    summed, mixing = "sums" in vectors, masked and not decayed
    helpers, state_registers, helper_registers = _crew(writers, key_dim, save, decayed, tied, mixing)
    dtype = value.dtype
    inputs = dict(query=query, key=key, value=value, gain=vectors["gain"])
    inputs |= {f"{name}_v": x for name, x in vectors.items() if name != "gain"}
    inputs |= {name: x for name, x in dict(documents=documents, starts=starts, leads=leads).items() if x is not None}
    outputs = dict(
        output=jax.ShapeDtypeStruct(value.shape, dtype),
        final=jax.ShapeDtypeStruct((batch, heads, key_dim, value_dim), F32),
    )
    if save:
        outputs |= dict(
            states=jax.ShapeDtypeStruct((batch, heads, chunks, value_dim, key_dim), dtype),
            inverse=jax.ShapeDtypeStruct((batch, heads, chunks, *SQUARE), dtype),
            solved=jax.ShapeDtypeStruct(value.shape, dtype),
        )
    if save and exact:
        per_token = jax.ShapeDtypeStruct((batch, heads, chunks * CHUNK), F32)
        outputs |= dict(erase=per_token, square=per_token)
    ahead = writers == 2 and not (save or decayed)
    # one in the state warpgroups, one in each helper, one on its way, one that was made ahead
    keys = Ring.of("keys", helpers + 2 + ahead, helpers)
    queries, values = Ring.of("queries", 2, helpers), Ring.of("values", 2, helpers)
    products = Ring.of("products", max(helpers, 2), helpers)
    crowded = key_dim == 128 and (writers == 1 or save)  # shared memory is
    causal = None if decayed or crowded else smem(SQUARE, dtype)  # 1 on and below the diagonal
    halving = writers == 2 and not decayed  # state warpgroups make half of P each
    if halving:  # transposed, a part for each state warpgroup; then of each chunk in which a document begins
        causal = smem((1 + mixing * products.slots, writers, CHUNK, 32), dtype)
    vector = plgpu.SMEM((keys.slots, CHUNK), F32)
    scratch = dict(
        k_s=smem((keys.slots, CHUNK, key_dim), dtype),
        q_s=smem((queries.slots, CHUNK, key_dim), dtype),
        v_s=smem((values.slots, writers, *SQUARE), dtype),
        solve_s=smem((products.slots, *SQUARE), dtype),
        # of chunks in which a document begins, 1 for tokens of that which they end with, and of that before them
        last_s=plgpu.SMEM((products.slots, CHUNK), F32) if mixing else None,
        seen_s=plgpu.SMEM((products.slots, CHUNK), F32) if mixing else None,
        scores_s=smem((products.slots, *SQUARE), dtype),
        erase_s=plgpu.SMEM((products.slots, CHUNK), F32),
        # the state, then the output, which ahead goes where values were
        stage_s=None if ahead else smem((writers, key_dim // 64 if save or decayed else 1, *SQUARE), dtype),
        causal_s=causal,
        left_s=vector if decayed else None,
        right_s=vector if decayed else None,
        # a copy to be read by rows and one by columns: of one, the compiler finds no layout in reasonable time
        sums_r=vector if summed else None,
        sums_c=vector if summed else None,
        documents_r=plgpu.SMEM((keys.slots, CHUNK), jnp.int32) if masked and not ahead else None,
        documents_c=plgpu.SMEM((keys.slots, CHUNK), jnp.int32) if masked else None,
        numbers_r=plgpu.SMEM((CHUNK,), jnp.int32),  # 0 … 63, to be read by rows and by columns
        numbers_c=plgpu.SMEM((CHUNK,), jnp.int32),
        **keys.barriers(1 + 2 * decayed + 2 * summed + masked * (2 - ahead), writers),
        **queries.barriers(1),
        **values.barriers(writers),
        **products.barriers(1),
        scores_full=plgpu.Barrier(num_arrivals=writers, num_barriers=products.slots) if halving else None,
        forgotten=plgpu.Barrier(num_arrivals=writers) if ahead and mixing else None,
        scale_s=None if ahead else plgpu.SMEM((writers, CHUNK), F32),
        state_stage=stage(dtype, writers),
    )
    own = dict(  # a place for each helper
        cosines_s=smem((helpers, *SQUARE), jnp.float16) if save and tied else None,
        inverse_s=smem((helpers, *SQUARE), dtype) if save and tied else None,
        work_s=plgpu.SMEM((helpers, WORKSPACE), F32),
        square_s=plgpu.SMEM((helpers, CHUNK), F32) if save and exact else None,
        keys_s=plgpu.SMEM((helpers, 4, CHUNK), F32),  # numbers of each key, as `write_inverse` orders them
        helper_stage=stage(jnp.float16, helpers),
    )
    config = SimpleNamespace(
        chunks=chunks, group=heads // key_heads, key_dim=key_dim, writers=writers, helpers=helpers, dtype=dtype,
        scale=scale, tied=tied, save=save, staged=save or decayed, masked=masked, decayed=decayed, summed=summed,
        mixing=mixing, given=starts is not None, share=share, pieces=pieces, blocks=splits, exact=exact, keys=keys,
        queries=queries, values=values, products=products, own=tuple(own),
        state_registers=state_registers, helper_registers=helper_registers, folded=False, warpgroups=writers + helpers,
        streams=helpers, fed=False, shared=False, ahead=ahead, halving=halving,
    )  # fmt: skip
    check_registers((writers, state_registers), (helpers, helper_registers))
    roles = (writers, in_piece(state)), (helpers, in_piece(helper))
    return launch("efla_forward", config, inputs, outputs, scratch | own, (batch, heads * pieces, splits), *roles)
