"""Cross-entropy of a language model's head that never holds [B, T, vocab]: logits exist for a chunk of T at a time."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Logits of one chunk, in elements: 256 MiB of float32.
_CHUNK_ELEMENTS = 2**26
_WHOLE = 128  # a chunk of more tokens of T is a multiple of it


def _chunk_size(targets_BT, kernel_EV) -> int:
    batch, length = targets_BT.shape
    most = _CHUNK_ELEMENTS // max(batch * kernel_EV.shape[1], 1)
    if most > _WHOLE:  # tiles of the products are filled, and usual lengths need no padding
        most -= most % _WHOLE
    return max(1, min(length, most))


def _sum_dtype(hidden: jax.Array) -> jnp.dtype:
    """float32, or float64 for float64 inputs."""
    return jnp.promote_types(hidden.dtype, jnp.float32)


def _chunks(hidden_BTE, targets_BT, chunk):
    """Number of chunks, and a function from a chunk's number to (hidden, targets); what pads the last has target -1."""
    length = targets_BT.shape[1]
    padding = -length % chunk
    hidden_BTE = jnp.pad(hidden_BTE, ((0, 0), (0, padding), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, padding)), constant_values=-1)
    cut = lambda x, number: jax.lax.dynamic_slice_in_dim(x, number * chunk, chunk, axis=1)
    return (length + padding) // chunk, lambda number: (cut(hidden_BTE, number), cut(targets_BT, number))


def _join(parts_NBC, length):
    """[N, B, chunk, ...] -> [B, T, ...]."""
    joined = jnp.moveaxis(parts_NBC, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


def _loss_terms(hidden_BCE, kernel_EV, targets_BC):
    """-> logits in float32, their log-sum-exp, the mask of the targets' columns, and -log p of each target, 0 at -1."""
    logits_BCV = jnp.matmul(hidden_BCE, kernel_EV, preferred_element_type=_sum_dtype(hidden_BCE))
    lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    # a comparison instead of a gather, so that a vocabulary that is split over devices stays so
    hit_BCV = targets_BC[..., None] == jnp.arange(kernel_EV.shape[1])[None, None]
    nll_BC = jnp.where(targets_BC >= 0, lse_BC - jnp.sum(jnp.where(hit_BCV, logits_BCV, 0), -1), 0)
    return logits_BCV, lse_BC, hit_BCV, nll_BC


def token_losses(
    hidden_BTE: Float[Array, "B T E"],
    kernel_EV: Float[Array, "E V"],
    targets_BT: Int[Array, "B T"],
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """-log p(target) in nats, float32, 0 where the target is -1. For evaluation: not meant to be differentiated.

    chunk: tokens of T whose logits are held at a time; None by size. Products are in hidden's type.
    """
    return _forward(hidden_BTE, kernel_EV, targets_BT, chunk)[0]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def summed_loss(
    hidden_BTE: Float[Array, "B T E"],
    kernel_EV: Float[Array, "E V"],
    targets_BT: Int[Array, "B T"],
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(objective, loss): Σ -log p(target) + z_loss · logsumexp², and Σ -log p alone, over targets that are not -1.

    Only the objective has a gradient. Its forward pass computes the gradients of hidden and kernel with the logits at
    hand, so that they are never computed twice (z-loss: arXiv 2204.02311).
    """
    loss_BT, lse_BT = _forward(hidden_BTE, kernel_EV, targets_BT, chunk)
    z = jnp.sum(jnp.where(targets_BT >= 0, jnp.square(lse_BT), 0))
    return jnp.sum(loss_BT) + z_loss * z, jnp.sum(loss_BT)


def _forward(hidden_BTE, kernel_EV, targets_BT, chunk):
    """-> -log p(target) and log-sum-exp, both [B, T]."""
    chunk = chunk or _chunk_size(targets_BT, kernel_EV)
    kernel_EV = kernel_EV.astype(hidden_BTE.dtype)
    count, cut = _chunks(hidden_BTE, targets_BT, chunk)

    def terms(number):
        hidden, targets = cut(number)
        _, lse, _, loss = _loss_terms(hidden, kernel_EV, targets)
        return loss, lse

    losses, lses = jax.lax.map(terms, jnp.arange(count))
    return _join(losses, targets_BT.shape[1]), _join(lses, targets_BT.shape[1])


def _summed_loss_forward(hidden_BTE, kernel_EV, targets_BT, z_loss, chunk):
    chunk = chunk or _chunk_size(targets_BT, kernel_EV)
    dtype, total = hidden_BTE.dtype, _sum_dtype(hidden_BTE)
    compute_EV = kernel_EV.astype(dtype)
    count, cut = _chunks(hidden_BTE, targets_BT, chunk)

    def add_chunk(carry, number):
        objective, loss, d_kernel_EV = carry
        hidden, targets = cut(number)
        logits, lse, hit, nll = _loss_terms(hidden, compute_EV, targets)
        valid = targets >= 0
        z = z_loss * jnp.where(valid, jnp.square(lse), 0)
        # d nll = softmax - one hot; d lse² = 2 lse softmax
        d_lse = jnp.where(valid, 1 + 2 * z_loss * lse, 0)
        d_logits = jnp.exp(logits - lse[..., None]) * d_lse[..., None] - jnp.where(hit, 1.0, 0.0)
        d_logits = d_logits.astype(dtype)
        d_hidden = jnp.einsum("bcv,ev->bce", d_logits, compute_EV, preferred_element_type=total)
        d_kernel_EV += jnp.einsum("bce,bcv->ev", hidden, d_logits, preferred_element_type=total)
        return (objective + jnp.sum(nll + z), loss + jnp.sum(nll), d_kernel_EV), d_hidden

    start = (jnp.zeros((), total), jnp.zeros((), total), jnp.zeros(kernel_EV.shape, total))
    (objective, loss, d_kernel_EV), d_hidden = jax.lax.scan(add_chunk, start, jnp.arange(count))
    d_hidden_BTE = _join(d_hidden, targets_BT.shape[1])
    types = (hidden_BTE[:0], kernel_EV[:0])  # of no elements: residuals are arrays
    return (objective, loss), (d_hidden_BTE, d_kernel_EV, types)


def _summed_loss_backward(z_loss, chunk, gradients, cotangents):
    # scaled before it is rounded: one over the number of targets, itself in bfloat16, would be off by up to 0.4 %
    d_hidden_BTE, d_kernel_EV, types = gradients
    d_objective, _ = cotangents
    pairs = zip((d_hidden_BTE, d_kernel_EV), types, strict=True)
    return *((gradient * d_objective).astype(like.dtype) for gradient, like in pairs), None


summed_loss.defvjp(_summed_loss_forward, _summed_loss_backward)
