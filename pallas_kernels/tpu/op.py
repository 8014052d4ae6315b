"""The delta rule on a TPU: from the arrays of the op to those of the kernels, and back.

The kernels read [B, T, H·D], which is how a projection gives it, so that no head is moved in memory. What XLA does
here besides: lays numbers of tokens out as rows, 4 bytes a token and head, sums log-decays within chunks, pads K and V
to multiples of 64 and T to one of the chunk.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import plan
from pallas_kernels.tpu.backward import backward as backward_kernel
from pallas_kernels.tpu.config import Config
from pallas_kernels.tpu.forward import forward as forward_kernel

DTYPES = (jnp.bfloat16, jnp.float32)
LARGEST = 256  # of K and V
PIECES = {
    None: None,
    jax.lax.Precision.DEFAULT: 1,
    jax.lax.Precision.HIGH: 2,
    jax.lax.Precision.HIGHEST: 3,
}


def unsupported(dtypes, key_heads, heads, length, key_dim, value_dim, chunk_size, precision):
    """Why the kernels cannot serve a call of this kind, or None."""
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        names = ", ".join(jnp.dtype(dtype).name for dtype in dtypes)
        return f"query, key and value are {names}; the kernels take all bfloat16 or all float32"
    if key_dim > LARGEST or value_dim > LARGEST:
        return f"K={key_dim} and V={value_dim}; the kernels take at most {LARGEST} of both"
    if chunk_size not in (None, *plan.CHUNKS):
        return f"chunk_size={chunk_size}; the kernels' chunks are of {', '.join(map(str, plan.CHUNKS))} tokens"
    wide = pieces_of(dtypes[0], precision) > 1 or dtypes[0] == jnp.float32
    sizes = plan.Sizes(key_heads, heads // key_heads, key_dim, value_dim, wide)
    if plan.fitted(sizes, length, chunk_size) is None:
        return (
            f"Hk={key_heads}, H={heads}, K={key_dim}, V={value_dim}; the fewest heads that a step of the kernels can "
            f"take would need more than {plan.VMEM >> 20} MiB of VMEM"
        )
    return None


def pieces_of(dtype, precision) -> int:
    """Pieces of a float32 operand: as asked for, else one for bfloat16 inputs and all three for float32 ones."""
    return PIECES[precision] or (1 if dtype == jnp.bfloat16 else 3)


def forward(
    query,
    key,
    value,
    erase,
    write,
    log_decay,
    initial_state,
    begins,
    *,
    scale,
    save,
    chunk_size=None,
    precision=None,
):
    """Output, final state and the residuals of `backward`.

    Args:
        query, key: [B, T, Hk, K]; value [B, T, H, V] of the same type, bfloat16 or float32; K, V ≤ 256.
        erase: [B, T, H] float32. write: likewise, or None where it is erase.
        log_decay: [B, T, H] float32 or None.
        initial_state: [B, H, K, V] float32 or None for zeros.
        begins: [B, T] bool or None, whether a document begins with the token; not with token 0.
        save: whether to return residuals; else ().
        chunk_size: 64, 128, 256 or None. precision: of the products, `jax.lax.Precision` or None.
    """
    with jax.enable_x64(False):  # indices are 32 bits wide, also where a program has enabled x64
        documents = _numbered(begins)
        call = _Call("forward", query, key, value, write, log_decay, documents, scale, chunk_size, precision)
        numbers = call.numbers(erase, write, log_decay, documents)
        query, key, flat_value = (call.flat(x) for x in (query, key, value))
        initial = call.padded_state(initial_state)
        out = forward_kernel(call.config, query, key, flat_value, numbers, initial, save=save)
        residuals = (out["states"], out["inverse"]) if save else ()
        return call.whole(out["output"], value), call.state(out["final"]), residuals


def backward(
    query,
    key,
    value,
    erase,
    write,
    log_decay,
    initial_state,
    begins,
    residuals,
    d_output,
    d_state,
    *,
    scale,
    chunk_size=None,
    precision=None,
):
    """Gradients of the eight inputs of `forward` but begins, in order; None where the input is None."""
    with jax.enable_x64(False):
        documents = _numbered(begins)
        call = _Call("backward", query, key, value, write, log_decay, documents, scale, chunk_size, precision)
        numbers = call.numbers(erase, write, log_decay, documents)
        tokens = [call.flat(x) for x in (query, key, value, d_output.astype(value.dtype))]
        out = backward_kernel(call.config, tokens, numbers, residuals, call.padded_state(d_state))
        d_write = None if write is None else call.per_token(out["d_numbers"], "write")
        d_log_decay = None
        if log_decay is not None:
            d_log_decay = call.summed_back(call.padded_tokens(out["d_numbers"], "sums"), documents)
        return (
            call.whole(out["d_query"], query),
            call.whole(out["d_key"], key),
            call.whole(out["d_value"], value),
            call.per_token(out["d_numbers"], "erase"),
            d_write,
            d_log_decay,
            None if initial_state is None else call.state(out["d_initial"]),
        )


def _numbered(begins):
    """[B, T] int32, how many documents began in the row up to the token; None of None."""
    return None if begins is None else jnp.cumsum(begins, axis=1, dtype=jnp.int32)


class _Call:
    """Sizes of one call in one direction, and the ways between the op's arrays and the kernel's."""

    def __init__(self, direction, query, key, value, write, log_decay, documents, scale, chunk_size, precision):
        self.batch, self.length, key_heads, self.key_dim = key.shape
        self.heads, self.value_dim = value.shape[2:]
        pieces = pieces_of(key.dtype, precision)
        wide = pieces > 1 or key.dtype == jnp.float32
        sizes = plan.Sizes(key_heads, self.heads // key_heads, self.key_dim, self.value_dim, wide)
        sizes = plan.fitted(sizes, self.length, chunk_size)
        assert sizes is not None, "what does not fit was declined"
        self.chunks = -(-self.length // sizes.chunk)
        step = plan.step_of(direction, sizes, self.chunks)
        assert step is not None
        self.groups = key_heads // step.key_heads
        self.config = Config(
            chunk=sizes.chunk, span=step.span, key_heads=step.key_heads, group=sizes.group, key_dim=sizes.key_dim,
            value_dim=sizes.value_dim, scale=scale, pieces=pieces, tied=write is None, decay=log_decay is not None,
            documents=documents is not None,
        )  # fmt: skip

    @property
    def missing(self) -> int:
        return self.chunks * self.config.chunk - self.length

    def _dim(self, dim: int) -> int:
        return self.config.key_dim if dim == self.key_dim else self.config.value_dim

    def flat(self, x):
        """[B, T, H, D] -> [B, T, H·D], padded: tokens that are 0 neither erase, write nor decay."""
        extra = self._dim(x.shape[-1]) - x.shape[-1]
        if self.missing or extra:
            x = jnp.pad(x, ((0, 0), (0, self.missing), (0, 0), (0, extra)))
        return x.reshape(*x.shape[:2], -1)

    def whole(self, x, like):
        """Inverse of `flat`."""
        x = x.reshape(*x.shape[:2], like.shape[2], -1)
        return x[:, : self.length, :, : like.shape[-1]]

    def padded_state(self, state):
        if state is None:
            return None
        extra = self.config.key_dim - self.key_dim, self.config.value_dim - self.value_dim
        state = state.astype(jnp.float32)
        return jnp.pad(state, ((0, 0), (0, 0), (0, extra[0]), (0, extra[1]))) if any(extra) else state

    def state(self, padded):
        return padded[:, :, : self.key_dim, : self.value_dim]

    def _chunked(self, x, mode="constant"):
        """[B, T, ...] -> [B, N, C, ...]."""
        x = jnp.pad(x, ((0, 0), (0, self.missing)) + ((0, 0),) * (x.ndim - 2), mode=mode)
        return x.reshape(self.batch, self.chunks, self.config.chunk, *x.shape[2:])

    def _reach(self, documents):
        """[B or 1, N or 1, C, C]: j ≤ i in one document. Sums run along its rows, so that they restart exactly."""
        size = self.config.chunk
        reach = jnp.tril(jnp.ones((1, 1, size, size), bool))
        if documents is None:
            return reach
        documents = self._chunked(documents, "edge")
        return reach & (documents[..., :, None] == documents[..., None, :])

    def numbers(self, erase, write, log_decay, documents):
        """[B, G, N, rows, C] float32, rows as `Config.rows` has them."""
        rows = [self._chunked(erase)]
        if write is not None:
            rows.append(self._chunked(write))
        if log_decay is not None:
            log_decay = self._chunked(log_decay)[:, :, None]
            rows.append(jnp.sum(jnp.where(self._reach(documents)[..., None], log_decay, 0), 3))
        rows = [x.astype(jnp.float32).reshape(*x.shape[:3], self.groups, -1) for x in rows]  # B N C G heads
        if documents is not None:
            chunked = self._chunked(documents, "edge")  # padding belongs to the last document
            before = jnp.pad(chunked[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
            relative = (chunked - before).astype(jnp.float32)[..., None, None]
            rows.append(jnp.broadcast_to(relative, (*relative.shape[:3], self.groups, 1)))
        return jnp.concatenate(rows, -1).transpose(0, 3, 1, 4, 2)

    def padded_tokens(self, numbers, name):
        """The rows of that name as [B, N·C, H]."""
        x = numbers[..., self.config.rows[name], :].transpose(0, 2, 4, 1, 3)
        return x.reshape(self.batch, -1, self.heads)

    def per_token(self, numbers, name):
        """The rows of that name as [B, T, H]."""
        return self.padded_tokens(numbers, name)[:, : self.length]

    def summed_back(self, d_sums, documents):
        """Cotangent of log-decays from that of their sums [B, N·C, H]: each collects what lies behind it in chunk and
        document, padding too, where the last sum counts for the state."""
        d_sums = d_sums.reshape(self.batch, self.chunks, self.config.chunk, 1, self.heads)
        gathered = jnp.sum(jnp.where(self._reach(documents)[..., None], d_sums, 0), 2)
        return gathered.reshape(self.batch, -1, self.heads)[:, : self.length]
