"""One token after a given state: S' = e^g S + k (w v - c e^g Sᵀ k)ᵀ, o = scale · S'ᵀ q, in float32 on the vector units.

Reading and writing the state is all that takes time: 8 bytes a number of it, against four operations.
"""

from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.tpu.config import like
from pallas_kernels.tpu.cost import decode_cost

DTYPES = (jnp.bfloat16, jnp.float32)
DIMS = (64, 128, 192, 256)  # of K and V
BLOCK = 1 << 20  # most bytes of states in a grid step, which VMEM holds four times


def unsupported(dtypes, key_dim, value_dim):
    """Why the kernel cannot serve a call of this kind, or None."""
    if any(dtype not in DTYPES for dtype in dtypes):
        names = ", ".join(jnp.dtype(dtype).name for dtype in dtypes)
        return f"query, key and value are {names}; the kernel takes bfloat16 and float32"
    if key_dim not in DIMS or value_dim not in DIMS:
        return f"K={key_dim} and V={value_dim}; the kernel takes {', '.join(map(str, DIMS))}"
    return None


def key_heads_of(key_heads: int, group: int, key_dim: int, value_dim: int) -> int:
    """Key heads of a grid step: as many as their states' block allows, at least one."""
    fits = lambda count: key_heads % count == 0 and count * group * key_dim * value_dim * 4 <= BLOCK
    return max(filter(fits, range(1, key_heads + 1)), default=1)


def decode(query, key, value, erase, write, log_decay, state, *, scale):
    """Output [B, 1, H, V] in value's type and the new state, which takes the place of a state that is donated.

    Args:
        query, key: [B, 1, Hk, K] bfloat16 or float32; value: [B, 1, H, V].
        erase, write, log_decay: [B, 1, H] float32; write None where it is erase, log_decay None for no decay.
        state: [B, H, K, V] float32.
    """
    (batch, heads, key_dim, value_dim), key_heads = state.shape, key.shape[2]
    group = heads // key_heads
    together = key_heads_of(key_heads, group, key_dim, value_dim)
    groups = key_heads // together
    by_group = lambda x: x.reshape(batch, groups, -1, x.shape[-1])
    numbers = [x for x in (erase, write, None if log_decay is None else jnp.exp(log_decay)) if x is not None]
    arrays = dict(
        query=by_group(query), key=by_group(key), value=by_group(value),
        numbers=by_group(jnp.stack(numbers, -1)), state=state,
    )  # fmt: skip
    block = lambda *shape: pl.BlockSpec((None, None, *shape), lambda b, g: (b, g, 0, 0))
    states = pl.BlockSpec((None, together * group, key_dim, value_dim), lambda b, g: (b, g, 0, 0))
    keys, values = block(together, key_dim), block(together * group, value_dim)
    tied, decay = write is None, log_decay is not None
    names = (*arrays, "output", "new_state")
    shapes = [like(arrays["value"].shape, value.dtype, value), like(state.shape, jnp.float32, value)]
    with jax.enable_x64(False):
        output, state = pl.pallas_call(
            lambda *refs: _step(SimpleNamespace(**dict(zip(names, refs, strict=True))), group, tied, decay, scale),
            grid=(batch, groups),
            in_specs=[keys, keys, values, block(together * group, len(numbers)), states],
            out_specs=[values, states],
            out_shape=shapes,
            input_output_aliases={4: 1},
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
            cost_estimate=decode_cost(arrays.values(), shapes, state),
            name="efla_decode",
        )(*arrays.values())
    return output.reshape(value.shape), state


def _step(r, group: int, tied: bool, decay: bool, scale: float) -> None:
    """The heads of one grid step; matrices of all heads have a row each, [h, V]."""
    float32 = lambda ref: ref[...].astype(jnp.float32)
    keys_Kh, queries_Kh = float32(r.key).T, float32(r.query).T
    numbers = r.numbers[...]
    column = lambda i: numbers[:, i : i + 1]
    erase, write = column(0), column(0 if tied else 1)
    heads = range(r.state.shape[0])
    of = lambda columns, head: columns[:, head // group : head // group + 1]
    recalled_hV = jnp.concatenate([jnp.sum(r.state[h] * of(keys_Kh, h), 0, keepdims=True) for h in heads], 0)
    if decay:
        recalled_hV = recalled_hV * column(numbers.shape[1] - 1)
    update_hV = write * float32(r.value) - erase * recalled_hV
    outputs = []
    for h in heads:
        state_KV = r.state[h]
        if decay:
            state_KV = state_KV * numbers[h : h + 1, -1:]
        state_KV = state_KV + of(keys_Kh, h) * update_hV[h : h + 1]
        r.new_state[h] = state_KV
        outputs.append(jnp.sum(state_KV * of(queries_Kh, h), 0, keepdims=True))
    r.output[...] = (scale * jnp.concatenate(outputs, 0)).astype(r.output.dtype)
