"""Runs the Triton kernels on NumPy arrays in Triton's interpreter: a `call` for `pallas_kernels.triton.launch`.

Import it before any kernel: Triton decides when a kernel is defined whether it will be interpreted. The interpreter is
mended here to round as tensor cores do: on its own it truncates float32 to bfloat16, multiplies bfloat16's bit patterns
and takes TF32 products in float32. It is taught, too, to loop over a number of the kernel's with a new NumPy.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import jax.numpy as jnp
import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_GUARD = 1 << 14  # elements before and behind every array, NaN: what reads or writes there is found


class HostArray:
    """An array between guards, with the little of torch's tensors that the interpreter asks for."""

    def __init__(self, shape, dtype, values=None):
        size = int(np.prod(shape))
        self.dtype = str(jnp.dtype(dtype))
        self._whole = np.full(size + 2 * _GUARD, np.nan if dtype != np.int32 else -(1 << 20), dtype)
        self.array = self._whole[_GUARD : _GUARD + size].reshape(shape)
        if values is not None:
            self.array[...] = values

    def guards(self):
        """The bytes around the array."""
        return self._whole[:_GUARD].tobytes() + self._whole[-_GUARD:].tobytes()

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        del other  # the same memory

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        return self

    def storage_offset(self):
        return 0

    size = stride = storage_offset


def call(launch, /):
    """Launches one kernel; every output must be written whole, and nothing around any array."""
    inputs = [HostArray(x.shape, x.dtype, x) for x in map(np.asarray, launch.inputs)]
    outputs = [HostArray(x.shape, x.dtype) for x in launch.outputs]
    before = [x.guards() for x in (*inputs, *outputs)]
    arguments = (*inputs, *launch.sizes, *outputs)
    launch.kernel[(launch.programs,)](*arguments, **launch.constants)
    name = launch.kernel.__name__
    if before != [x.guards() for x in (*inputs, *outputs)]:
        raise AssertionError(f"{name} wrote outside an array")
    for x, given in zip(inputs, launch.inputs, strict=True):
        if x.array.tobytes() != np.asarray(given).tobytes():
            raise AssertionError(f"{name} wrote to an input")
    for x in outputs:
        if x.array.shape != (1,) and not np.all(np.isfinite(x.array.astype(np.float32))):
            raise AssertionError(f"{name} left NaN or nothing in an output of shape {x.array.shape}")
    return tuple(x.array for x in outputs)


def _values(handle):
    """What a handle's data stand for: bfloat16 lies in uint16."""
    if handle.dtype.scalar == tl.bfloat16:
        return handle.data.view(jnp.bfloat16).astype(np.float32)
    return handle.data


def _as_tf32(x):
    """float32 without the 13 bits that a TF32 product does not read."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    del builder, max_num_imprecise_acc
    left, right = _values(a), _values(b)
    if left.dtype == np.float32 and a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
        left, right = _as_tf32(np.ascontiguousarray(left)), _as_tf32(np.ascontiguousarray(right))
    return TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _cast(original):
    def cast(builder, src, dst_type, *rounding):
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16:
            return TensorHandle(_values(src).astype(jnp.bfloat16).view(np.uint16), target)
        if source == tl.bfloat16:
            return (
                TensorHandle(_values(src), tl.float32)
                if target == tl.float32
                else original(builder, TensorHandle(_values(src), tl.float32), dst_type, *rounding)
            )
        return original(builder, src, dst_type, *rounding)

    return cast


def _with_index(original):
    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)
InterpreterBuilder.create_dot = _dot
InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
InterpreterBuilder.create_fp_to_fp = _cast(InterpreterBuilder.create_fp_to_fp)
