"""Hardware kernels as implementations of the op: custom_vjp, vmap by folding into the batch, refusal of other devices.

A kernel package offers, on the arrays of the op,
    forward(query, key, value, erase, write, log_decay, initial_state, begins, *, scale, save)
        -> (output, state, residuals)
    backward(query, key, value, erase, write, log_decay, initial_state, begins, residuals, d_output, d_state, *,
             scale) -> gradients of the first seven, None where the input is None
and either of them also chunk_size and precision, forward also begun, if `implementation` is told so;
where write None means erase and initial_state None zeros. begins [B, T] bool says of what tokens a document begins
with, of token 0 never; None never. begun is the same where segment_ids are a NumPy array, hence known when tracing;
under vmap it has fewer rows, of which each stands for as many in a row.

Names for policies of `jax.checkpoint`: "efla_output" (output and state) and "efla_residuals". With both saved a
backward pass does not run the forward kernel again; without, it does, and nothing but the inputs is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
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


@dataclass(frozen=True)
class Known:
    """An array of bool that is known when tracing, as an option that can be hashed."""

    shape: tuple[int, ...]
    bits: bytes

    @classmethod
    def of(cls, array: np.ndarray) -> "Known":
        return cls(array.shape, np.packbits(array).tobytes())

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        bits = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=int(np.prod(self.shape)))
        return bits.reshape(self.shape).astype(dtype or bool)


def _on_arrays(fn: Callable, tree) -> tuple[Callable, list]:
    """fn(*tree) as a function of the arrays in tree, and these arrays."""
    arrays, structure = jax.tree.flatten(tree)
    return lambda *leaves: fn(*jax.tree.unflatten(structure, leaves)), arrays


def _caller(platform: str, here: Callable[[], bool], reason: str) -> Callable:
    """call(fn, *tree): the kernel fn of a tree of arrays, or None, vmapped by folding; refused where it cannot run."""

    def call(fn, *tree):
        kernel, arrays = _on_arrays(fn, tree)
        if here():
            return folded_vmap(kernel)(*arrays)
        refuse = lambda *arrays: _refuse(jax.eval_shape(kernel, *arrays), reason)
        return folded_vmap(partial(jax.lax.platform_dependent, **{platform: kernel}, default=refuse))(*arrays)

    return call


def implementation(
    forward: Callable,
    backward: Callable,
    platform: str,
    here: Callable[[], bool],
    reason: str,
    *,
    choices: bool = False,
    known: bool = False,
):
    """The `run` of a kernel package for the registry.

    Args:
        platform: what the kernels are lowered for, "cuda" or "tpu".
        here: whether what is traced now can run them; else it can only be exported for `platform`, and lowering it
            for another raises NotImplementedError with `reason`.
        choices: whether the kernels take chunk_size and precision; else what is not their own is declined before.
        known: whether forward, where nothing is saved, takes begun.
    """

    call = _caller(platform, here, reason)
    always = lambda options: {name: option for name, option in options if name != "begun"}

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(options, inputs, begins):
        return call(partial(forward, save=False, **dict(options)), *inputs, begins)[:2]

    def attend_forward(options, inputs, begins):
        *out, residuals = call(partial(forward, save=True, **always(options)), *inputs, begins)
        # Named here: a policy of jax.checkpoint sees no name inside `call`, which is one custom_vmap to it.
        out = tuple(checkpoint_name(x, "efla_output") for x in out)
        residuals = tuple(checkpoint_name(x, "efla_residuals") for x in residuals)
        return out, (inputs, begins, residuals)

    def attend_backward(options, saved, cotangents):
        inputs, begins, residuals = saved
        gradients = call(partial(backward, **always(options)), *inputs, begins, residuals, *cotangents)
        typed = lambda gradient, x: None if x is None else gradient.astype(x.dtype)
        return tuple(map(typed, gradients, inputs)), None

    attend.defvjp(attend_forward, attend_backward)

    def run(
        query,
        key,
        value,
        erase,
        write,
        log_decay,
        initial_state,
        segment_ids,
        *,
        scale,
        chunk_size,
        precision,
        **options,
    ):
        if choices:
            options |= dict(chunk_size=chunk_size, precision=precision)
        numbers = _accumulated(query, key, value, erase, write, log_decay, initial_state)
        inputs = (query, key, value, *numbers)
        begins = None if segment_ids is None else segment_starts(segment_ids)
        if known and isinstance(begins, np.ndarray):
            options |= dict(begun=Known.of(begins))
        return attend((*dict(scale=scale, **options).items(),), inputs, begins)

    return run


def step_implementation(kernel: Callable, plain: Callable, platform: str, here: Callable[[], bool], reason: str):
    """The `run` of a decode kernel for the registry, of one token; platform, here and reason as in `implementation`.

    Derivatives, of either mode and any order, are those of `plain`, a `run` too, which then computes the result as
    well: what is trained are sequences, so a kernel for a step's gradient would serve nobody.

    Args:
        kernel: (query, key, value, erase, write, log_decay, state, *, scale) -> (output, state) on the op's arrays.
    """
    call = _caller(platform, here, reason)

    @partial(jax.custom_jvp, nondiff_argnums=(0,))
    def step(scale, inputs):
        return call(partial(kernel, scale=scale), *inputs)

    @step.defjvp
    def step_jvp(scale, primals, tangents):
        options = dict(scale=scale, chunk_size=None, precision=None)
        return jax.jvp(lambda inputs: plain(*inputs, None, **options), primals, tangents)

    def run(query, key, value, erase, write, log_decay, state, segment_ids, *, scale, chunk_size, precision):
        del segment_ids, chunk_size, precision  # one token; the kernel multiplies in float32
        inputs = (query, key, value, *_accumulated(query, key, value, erase, write, log_decay, state))
        if value.size == 0:  # nothing to launch a kernel for
            return plain(*inputs, None, scale=scale, chunk_size=None, precision=None)
        return step(scale, inputs)

    return run


def _accumulated(query, key, value, *arrays):
    """arrays, or None, in the type that results accumulate in."""
    dtype = accumulator_dtype(query, key, value)
    return tuple(None if x is None else x.astype(dtype) for x in arrays)


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
