"""Hardware kernels as implementations of the op: custom_vjp, vmap by folding into the batch, refusal of other devices.

A kernel package offers, on the arrays of the op,
    forward(query, key, value, erase, write, log_decay, initial_state, documents, *, scale, save)
        -> (output, state, residuals)
    backward(query, key, value, erase, write, log_decay, initial_state, documents, residuals, d_output, d_state, *, scale)
        -> gradients of the first seven, None where the input is None
where write None means erase and initial_state None zeros. documents [B, T] int32 counts the documents that began in
the row up to the token, not counting token 0.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from efla_jax.ops.coefficients import accumulator_dtype
from efla_jax.ops.scan import segment_starts


def folded_vmap(fn: Callable) -> Callable:
    """fn of arrays that all have a leading batch axis, vmapped by folding the new axis into it.

    As its minor part: an axis that a mesh splits stays split, as the major part it would be gathered.
    """
    folded = jax.custom_batching.custom_vmap(fn)

    @folded.def_vmap
    def rule(size, batched, *arrays):
        arrays = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(arrays, batched, strict=True)]
        out = folded(*(jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]) for x in arrays))
        unfold = lambda y: jnp.moveaxis(y.reshape(-1, size, *y.shape[1:]), 1, 0)
        return jax.tree.map(unfold, out), jax.tree.map(lambda _: True, out)

    return folded


def _on_arrays(fn: Callable, tree) -> tuple[Callable, list]:
    """fn(*tree) as a function of the arrays in tree, and these arrays."""
    arrays, structure = jax.tree.flatten(tree)
    return lambda *leaves: fn(*jax.tree.unflatten(structure, leaves)), arrays


def implementation(forward: Callable, backward: Callable, platform: str, here: Callable[[], bool], reason: str):
    """The `run` of a kernel package for the registry.

    Args:
        platform: what the kernels are lowered for, "cuda" or "tpu".
        here: whether what is traced now can run them; else it can only be exported for `platform`, and lowering it
            for another raises NotImplementedError with `reason`.
    """

    def call(fn, *tree):
        kernel, arrays = _on_arrays(fn, tree)
        if here():
            return folded_vmap(kernel)(*arrays)
        refuse = lambda *arrays: _refuse(jax.eval_shape(kernel, *arrays), reason)
        return folded_vmap(partial(jax.lax.platform_dependent, **{platform: kernel}, default=refuse))(*arrays)

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(scale, inputs, documents):
        return call(partial(forward, scale=scale, save=False), *inputs, documents)[:2]

    def attend_forward(scale, inputs, documents):
        *out, residuals = call(partial(forward, scale=scale, save=True), *inputs, documents)
        return tuple(out), (inputs, documents, residuals)

    def attend_backward(scale, saved, cotangents):
        inputs, documents, residuals = saved
        gradients = call(partial(backward, scale=scale), *inputs, documents, residuals, *cotangents)
        typed = lambda gradient, x: None if x is None else gradient.astype(x.dtype)
        return tuple(map(typed, gradients, inputs)), None

    attend.defvjp(attend_forward, attend_backward)

    def run(query, key, value, erase, write, log_decay, initial_state, segment_ids, *, scale, chunk_size, precision):
        del chunk_size, precision  # declined where they are not the kernels' own
        acc = accumulator_dtype(query, key, value)
        accumulated = lambda x: None if x is None else x.astype(acc)
        inputs = (query, key, value, *map(accumulated, (erase, write, log_decay, initial_state)))
        documents = None
        if segment_ids is not None:
            documents = jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32)
        return attend(scale, inputs, documents)

    return run


_refuse_p = Primitive("efla_refuse")
_refuse_p.multiple_results = True


def _refuse(shapes, reason):
    """Arrays of these shapes, never computed: lowering it raises NotImplementedError with the reason."""
    leaves, structure = jax.tree.flatten(shapes)
    avals = tuple(jax.core.ShapedArray(x.shape, x.dtype) for x in leaves)
    return jax.tree.unflatten(structure, _refuse_p.bind(avals=avals, reason=reason))


@_refuse_p.def_abstract_eval
def _refuse_shapes(*, avals, reason):
    del reason
    return avals


def _refuse_lowering(context, *, avals, reason):
    del context, avals
    raise NotImplementedError(reason)


mlir.register_lowering(_refuse_p, _refuse_lowering)
