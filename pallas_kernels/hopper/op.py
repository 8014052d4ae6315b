"""The delta rule on a Hopper GPU: from the arrays of the op to those of the kernels, and back.

What XLA does here besides: transposes per-token numbers, but β of the forward pass, to [B, H, T] (4 bytes a token and
head against 1024 of q, k, v and o at K = V = 128), sums log-decays within chunks, pads K and V to 64 or 128 and T to a
multiple of 8, and, where write differs from erase, multiplies the values by write.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hopper import decode, few_heads, pieces
from pallas_kernels.hopper.backward import backward as backward_kernel
from pallas_kernels.hopper.chain import chain, chain_back
from pallas_kernels.hopper.forward import forward as forward_kernel
from pallas_kernels.hopper.mosaic import CHUNK, PROCESSORS
from pallas_kernels.hopper.prepare import prepare
from pallas_kernels.hopper.reverse import reverse
from pallas_kernels.hopper.scan import scan
from pallas_kernels.hopper.summaries import summaries

DTYPES = (jnp.bfloat16, jnp.float16)
LARGEST = 128  # of K and V
LOG2E = 1.4426950408889634


def unsupported(dtypes, key_dim, value_dim, chunk_size):
    """Why the kernels cannot serve a call of this kind, or None."""
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        names = ", ".join(jnp.dtype(dtype).name for dtype in dtypes)
        return f"query, key and value are {names}; the kernels take all bfloat16 or all float16"
    if key_dim > LARGEST or value_dim > LARGEST:
        return f"K={key_dim} and V={value_dim}; the kernels take at most {LARGEST} of both"
    if chunk_size not in (None, CHUNK):
        return f"chunk_size={chunk_size}; the kernels' chunks are of {CHUNK} tokens"
    return None


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
    exact=False,
    plan=None,
    begun=None,
):
    """Output, final state and the residuals of `backward`.

    Args:
        query, key: [B, T, Hk, K] bfloat16 or float16, K ≤ 128; value [B, T, H, V] of the same type, V ≤ 128.
        erase: [B, T, H] float32, or beta if exact. write: likewise, or None where it is erase.
        log_decay: [B, T, H] float32 or None.
        initial_state: [B, H, K, V] float32 or None for zeros.
        begins: [B, T] bool or None, whether a document begins with the token; not with token 0.
        save: whether to return residuals; else ().
        exact: erase and write are (1 - e^{-βλ})/λ with λ = ‖k‖², made in the kernel; in XLA that reads the keys once
            more, and its gradient reads them and writes theirs again. No log_decay then: write would be another number.
        plan: which kernels, and pieces of which size; None leaves that to `pieces.plan`.
        begun: begins where it is known when tracing, as an array of [B or a part of B, T]: each row stands for as many
            of begins. Then no kernel has to find out that no document is long.

    A few tokens after a given state go one by one, with the state in registers (speculative decoding), unless they are
    to be differentiated.
    """
    length, key_dim, value_dim = key.shape[1], key.shape[-1], value.shape[-1]
    few = length <= decode.SHORT and not exact and initial_state is not None and begins is None and not save
    if few and not decode.unsupported((query.dtype, key.dtype, value.dtype), key_dim, value_dim):
        output, state = decode.decode(query, key, value, erase, write, log_decay, initial_state, scale=scale)
        return output, state, ()
    tied = write is None
    if not tied:
        value = (write[..., None] * value).astype(value.dtype)
    query, key, value = _padded(query, key, value)
    vectors, documents = _vectors(erase, log_decay, begins)
    if plan is None:
        plan = _plan(save, value, key, vectors, tied)
    initial = _transposed(initial_state, key.shape[-1], value.shape[-1])
    options = dict(scale=scale, tied=tied, save=save)
    if documents is not None and log_decay is None and not save:
        known = None if begun is None else _repeated(begun, begins.shape[0])
        out = _by_documents(query, key, value, vectors, documents, initial, options, exact, known)
    else:
        out = _by_plan(query, key, value, vectors, documents, initial, plan, options, exact)
    residuals = ()
    if save:
        residuals = tuple(out[name] for name in (*_saved(exact), "maps") if name in out)
    return out["output"][:, :length, :, :value_dim], out["final"][:, :, :key_dim, :value_dim], residuals


def _plan(save, value, key, vectors, tied):
    batch, length, heads, value_dim = value.shape
    few = few_heads.serves(batch * heads, value_dim, vectors, tied=tied, save=save)
    kind = dict(decayed="left" in vectors, few=few)
    return pieces.plan("both" if save else "forward", batch * heads, length, key.shape[-1], value_dim, **kind)


def _by_plan(query, key, value, vectors, documents, initial, plan, options, exact):
    """The forward pass in one kernel, or of pieces side by side, for which what is before each of them is found first;
    the scan needs the inverse of all chunks, too."""
    tied, save, scanned = options["tied"], options["save"], plan.kernel == "scan"
    chunks, scale = -(-key.shape[1] // CHUNK), options["scale"]
    starts, made, found = _of_one_piece(initial), {}, {}
    if scanned or plan.forward < chunks:
        whole = dict(chunks=chunks) if scanned else {}
        starts, made, found = _starts(key, value, vectors, documents, initial, plan, options, exact, **whole)
    if plan.kernel == "apart":
        return few_heads.forward(key, query, value, vectors, starts, scale=scale, exact=exact, share=plan.forward)
    if not scanned:
        share = min(plan.forward, chunks)
        out = forward_kernel(key, query, value, vectors, documents, starts, exact=exact, share=share, **options)
        return out | found
    solve, vectors = made.pop("solve"), _of_chunks(vectors, made, tied and not save)
    out = scan(key, query, value, solve, vectors, documents, starts, share=plan.forward, **options)
    inverse = made if tied or not save else dict(inverse=solve)
    return out | made | inverse | found


def _starts(key, value, vectors, documents, initial, plan, options, exact, chunks=None):
    """The state before every piece of the forward pass, [B, H, P, V, K]; what `prepare` made, of so many chunks or of
    those that are summed up; and, where there are any, the maps of the pieces as `backward` wants them."""
    tied, keep = options["tied"], options["save"] and chunks is not None
    batch, length, heads, value_dim = value.shape
    key_dim, decayed = key.shape[-1], "left" in vectors
    even = not options["save"] and documents is None and key_dim == value_dim
    blocks = LARGEST // key_dim * PROCESSORS // (batch * heads) if even else 0  # narrow values and maps are one block's
    twice = key_dim == LARGEST and not decayed
    parts = pieces.parts(plan.backward, -(-length // CHUNK), blocks=blocks, twice=twice)
    kind = dict(tied=tied, save=keep, exact=exact)
    made = prepare(key, vectors, documents, value.dtype, chunks=chunks or parts.bounds[-1], **kind)
    if not parts.bounds[-1]:
        return _of_one_piece(initial), made, {}
    leads = None if documents is None else _borders(documents, parts.bounds)[0]
    numbers = _of_chunks(vectors, made, tied and not keep)
    summed = summaries(key, value, made["solve"], numbers, initial, tied=tied, parts=parts, leads=leads)
    wanted = [n for n, chunk in enumerate(parts.bounds) if chunk % plan.forward == 0]
    return chain(initial, summed["maps"], summed["ends"], wanted, parts.walks), made, dict(maps=summed["maps"])


def _of_chunks(vectors, made, folded):
    """Vectors as those take them to whom `prepare` gives the inverse, which has erase if folded."""
    numbers = {name: x for name, x in vectors.items() if name != "gain"}
    return numbers if folded else numbers | dict(erase=made.get("erase", _by_head(vectors["gain"])))


def _by_documents(query, key, value, vectors, documents, initial, options, exact, begun=None):
    """The forward pass of rows of documents without decay, in as many pieces as fill the card. A piece is walked from
    where the document begins that it cuts; only what lies before pieces with longer documents is summed up.

    begun: [B, T] bool where it is known.
    """
    batch, length, heads, _ = value.shape
    chunks, gain = -(-length // CHUNK), dict(gain=vectors["gain"])
    share = -(-chunks // pieces.fill(batch * heads, length))
    options = options | dict(exact=exact)
    if share >= chunks:
        leads = jnp.full((batch, 1), -1, jnp.int32)
        return forward_kernel(key, query, value, gain, documents, _of_one_piece(initial), leads=leads, **options)
    parts = pieces.parts(share, chunks)
    if begun is None:
        leads = _leads(documents, share, chunks, initial is not None)
    else:
        with jax.ensure_compile_time_eval():
            documents = _counted(jnp.asarray(begun))
            leads = _leads(documents, share, chunks, initial is not None)
        if not np.any(np.asarray(leads)[:, 1:] < 0):  # each piece but the first begins with a document, or soon after
            starts = _of_one_piece(initial)
            if starts is not None:  # nobody reads those of later pieces
                starts = jnp.pad(starts, ((0, 0), (0, 0), (0, leads.shape[1] - 1), (0, 0), (0, 0)))
            return forward_kernel(key, query, value, gain, documents, starts, share=share, leads=leads, **options)
    kind = dict(tied=options["tied"], leads=leads)
    made = prepare(key, vectors, documents, value.dtype, chunks=parts.bounds[-1], save=False, exact=exact, **kind)
    rest = {name: x.reshape(batch, 1, -1).astype(jnp.float32) for name, x in _first_and_last(documents).items()}
    rest = _of_chunks(rest | gain, made, options["tied"])
    summed = summaries(key, value, made["solve"], rest, initial, parts=parts, **kind)
    starts = chain(initial, summed["maps"], summed["ends"], range(len(parts.bounds)), leads=leads)
    return forward_kernel(key, query, value, gain, documents, starts, share=share, leads=leads, **options)


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
    exact=False,
    plan=None,
):
    """Gradients of the eight inputs of `forward` but begins, in order; None where the input is None."""
    length, key_heads, key_dim = key.shape[1:]
    value_dim = value.shape[-1]
    tied = write is None
    saved = dict(zip((*_saved(exact), "maps"), residuals, strict=False))  # maps where pieces were summed up
    padded_query, padded_key, d_output = _padded(query, key, d_output.astype(value.dtype))
    tokens = padded_query, padded_key, d_output
    vectors, documents = _vectors(erase, log_decay, begins)
    vectors = _backward_vectors(vectors, saved, exact)
    d_final = _transposed(d_state, padded_key.shape[-1], d_output.shape[-1])
    share = (_plan(True, d_output, padded_key, vectors, tied) if plan is None else plan).backward
    behind = _of_one_piece(d_final)
    if share * CHUNK < length:
        chunks = -(-length // CHUNK)
        bounds = *range(0, chunks, share), chunks
        stops = None if documents is None else _borders(documents, bounds)[1]
        ends = reverse(*tokens, saved["inverse"], vectors, documents, stops, d_final, scale=scale, share=share)
        behind = _behind(d_final, saved.get("maps"), ends)
    options = dict(scale=scale, tied=tied, exact=exact, share=share)
    out = backward_kernel(*tokens, saved, vectors, documents, behind, **options)
    per_token = lambda x: jnp.swapaxes(x[..., :length], 1, 2)
    d_query, d_key = (_per_key_head(out[name][:, :length, :, :key_dim], key_heads) for name in ("d_query", "d_key"))
    d_value = out["d_value"][:, :length, :, :value_dim]
    d_write = None
    if not tied:
        d_write = jnp.sum(d_value.astype(jnp.float32) * value, -1)
        d_value = (write[..., None] * d_value).astype(value.dtype)
    d_log_decay = None
    if log_decay is not None:
        d_log_decay = per_token(_log_decay_gradient(out, documents))
    d_initial = None if initial_state is None else _state(out["d_initial"], key_dim, value_dim)
    return d_query, d_key, d_value, per_token(out["d_erase"]), d_write, d_log_decay, d_initial


def _backward_vectors(vectors, saved, exact):
    """The vectors of the forward kernel as those of the backward one."""
    rest = {name: x for name, x in vectors.items() if name != "gain"}
    if exact:
        return rest | dict(beta=_by_head(vectors["gain"]), erase=saved["erase"], square=saved["square"])
    return rest | dict(erase=_by_head(vectors["gain"]))


def _borders(documents, bounds):
    """For P parts, of bounds[p] to bounds[p + 1] chunks: [B, P + 1] int32, leads as `summaries` takes them, to look at
    all parts; and [B, P], chunks of each up to the first in which a document begins, or all."""
    begins = documents[:, None, CHUNK - 1 :: CHUNK] > 0
    first, end = (jnp.array(x, jnp.int32)[None, :, None] for x in (bounds[:-1], bounds[1:]))
    chunk = jnp.arange(begins.shape[2], dtype=jnp.int32)[None, None]
    begins &= (first <= chunk) & (chunk < end)  # [B, P, N]
    last = jnp.max(jnp.where(begins, chunk - first, 0), -1)
    return -1 - jnp.pad(last, ((0, 0), (1, 0))), jnp.min(jnp.where(begins, chunk - first + 1, end - first), -1)


def _leads(documents, share, chunks, given):
    """How each piece of `share` chunks begins, [B, P] int32, of documents [B, N·64] as the kernels take them.

    n ≥ 0: with the document that begins n chunks before the piece, and zeros. -1 - n: with the state before it, for
    which the piece before is summed up from its chunk n on, where that one's last document begins, or throughout if
    none does. given: the first piece begins with a state.
    """
    count = -(-chunks // share)
    behind = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)))  # of the piece before
    chunk = jnp.arange(chunks, dtype=jnp.int32)[None] % share
    last = jnp.where(documents[:, CHUNK - 1 :: CHUNK] > 0, chunk, -1)  # in which a document begins
    last = jnp.pad(last, ((0, 0), (0, -chunks % share)), constant_values=-1).reshape(-1, count, share).max(-1)
    unbroken, before = last < 0, behind(last)
    piece = jnp.arange(count, dtype=jnp.int32)[None]
    cut = documents[:, :: share * CHUNK] == 0  # is a document before the piece
    through = unbroken & jnp.pad(cut[:, 1:], ((0, 0), (0, 1)))  # goes one document, to the next piece
    far = behind(through) | through | (share - before > pieces.LEAD)
    leads = jnp.where(cut & far, -1 - jnp.maximum(before, 0), jnp.where(cut, share - before, 0))
    return jnp.where(piece == 0, -int(given), leads)


def _behind(d_final, maps, ends):
    """The cotangents of the states behind all pieces; of two, the first one's is what the last one makes."""
    if ends.shape[2] > 2:
        return chain_back(d_final, maps, ends)
    last = jnp.zeros_like(ends[:, :, 1]) if d_final is None else d_final
    return jnp.stack([ends[:, :, 1], last], 2)


def _saved(exact):
    """Names of the residuals."""
    return ("states", "inverse", "solved", "erase", "square")[: 5 if exact else 3]


def _padded(*arrays):
    """[B, T, H, D] with T a multiple of 8, which TMA asks for, and D 64 or 128."""
    result = []
    for x in arrays:
        size = CHUNK if x.shape[-1] <= CHUNK else LARGEST
        missing = -x.shape[1] % 8, size - x.shape[-1]
        result.append(jnp.pad(x, ((0, 0), (0, missing[0]), (0, 0), (0, missing[1]))) if any(missing) else x)
    return result


def _transposed(state, key_dim, value_dim):
    """[B, H, K, V] or None -> [B, H, V, K], both padded."""
    if state is None:
        return None
    state = jnp.swapaxes(state.astype(jnp.float32), 2, 3)
    missing = value_dim - state.shape[2], key_dim - state.shape[3]
    return jnp.pad(state, ((0, 0), (0, 0), (0, missing[0]), (0, missing[1]))) if any(missing) else state


def _of_one_piece(state):
    """[B, H, V, K] or None as that of the only piece, [B, H, 1, V, K]."""
    return None if state is None else state[:, :, None]


def _state(transposed, key_dim, value_dim):
    return jnp.swapaxes(transposed[:, :, :value_dim, :key_dim], 2, 3)


def _per_key_head(x, key_heads):
    """[B, T, H, K] summed over the value heads that share a key head."""
    batch, length, heads, dim = x.shape
    if heads == key_heads:
        return x
    grouped = x.reshape(batch, length, key_heads, heads // key_heads, dim)
    return jnp.sum(grouped, 3, dtype=jnp.float32).astype(x.dtype)


def _by_head(x):
    """[B, T, H] <-> [B, H, T]."""
    return jnp.swapaxes(x, 1, 2)


def _chunked(x):
    """[..., T] -> [..., N, C]."""
    missing = -x.shape[-1] % CHUNK
    x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),))
    return x.reshape(*x.shape[:-1], -1, CHUNK)


def _reach(documents):
    """[1 or B, 1, 1 or N, C, C]: j ≤ i in one document. Sums run along its rows, so that they restart exactly."""
    reach = jnp.tril(jnp.ones((1, 1, 1, CHUNK, CHUNK), bool))
    if documents is None:
        return reach
    documents = documents[:, None]
    return reach & (documents[..., :, None] == documents[..., None, :])


def _vectors(gain, log_decay, begins):
    """What the kernels read per token, float32, gain [B, N·64, H] and all else [B, H, N·64]; and documents [B, N·64]
    int32, how many of its chunk began up to the token: 0 is that which the chunk before ended with. None without
    begins."""
    by_head = lambda x: _chunked(_by_head(x.astype(jnp.float32)))
    gain = jnp.pad(gain.astype(jnp.float32), ((0, 0), (0, -gain.shape[1] % CHUNK), (0, 0)))
    vectors = {}
    first = last = jnp.ones((), bool)
    documents = None
    if begins is not None:
        documents = _counted(begins).reshape(begins.shape[0], -1, CHUNK)
        first, last = (x[:, None] for x in _first_and_last(documents).values())
        ones = jnp.ones_like(by_head(gain))
        vectors |= dict(left=jnp.where(first, ones, 0), right=jnp.where(last, ones, 0))
    if log_decay is not None:
        sums = jnp.sum(jnp.where(_reach(documents), by_head(log_decay)[..., None, :], 0), -1)
        vectors |= dict(
            sums=sums * LOG2E,
            left=jnp.where(first, jnp.exp(sums), 0),
            right=jnp.where(last, jnp.exp(jnp.where(last, sums[..., -1:] - sums, 0)), 0),
        )
    flat = lambda x: x.reshape(*x.shape[:-2], -1)
    vectors = dict(gain=gain) | {name: flat(x) for name, x in vectors.items()}
    return vectors, None if documents is None else flat(documents)


def _counted(begins):
    """[B, T] bool, whether a document begins -> [B, N·64] int32, how many of its chunk have up to the token. Padding
    belongs to the last document."""
    begun = _chunked(begins)
    counts = jnp.sum(jnp.where(_reach(None)[:, 0], begun[..., None, :], False), -1, dtype=jnp.int32)
    return counts.reshape(counts.shape[0], -1)


def _repeated(begun, rows):
    """[B', T] -> [rows, T], each row as often as the others."""
    begun = np.asarray(begun)
    return np.repeat(begun, rows // begun.shape[0], 0)


def _first_and_last(documents):
    """[B, N, C] or [B, N·64] -> [B, N, C] bool, the tokens of the document that the chunk before ended with, and of the
    chunk's last one."""
    documents = documents.reshape(documents.shape[0], -1, CHUNK)
    return dict(left=documents == 0, right=documents == documents[..., -1:])


def _log_decay_gradient(out, documents):
    """[B, H, N·64]: a log-decay collects the cotangents of the sums that lie behind it in its chunk and document."""
    d_sums, ends = (x.reshape(*x.shape[:2], -1, CHUNK) for x in (out["d_decay"], out["ends"]))
    d_sums = d_sums.at[..., -1].add(jnp.sum(out["whole"], -1) + jnp.sum(ends, -1))
    reach = _reach(None if documents is None else documents.reshape(documents.shape[0], -1, CHUNK))
    gradient = jnp.sum(jnp.where(reach, d_sums[..., :, None], 0), -2)
    return gradient.reshape(*gradient.shape[:2], -1)
