"""Every kind of kernel that the op asks for, with shapes: lowered by the tests, compiled for every TPU."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.decode import decode
from pallas_kernels.tpu.op import backward, forward

Variant = tuple[str, str, Callable, tuple]

BF16, F32 = jnp.bfloat16, jnp.float32
HIGH = jax.lax.Precision.HIGH


def variants() -> Iterator[Variant]:
    """(name, "forward", "backward" or "decode", function, its arguments as shapes)."""
    for tied, decay, documents in product((True, False), (False, True), (False, True)):
        options = dict(tied=tied, decay=decay, documents=documents)
        name = "128x128-bfloat16" + "".join(f"-{option}" for option, on in options.items() if on)
        yield from _both_ways(name, _arrays(BF16, **options))
    full = dict(tied=False, decay=True, documents=True)
    yield from _both_ways("128x128-float32-tied", _arrays(F32))
    yield from _both_ways("128x128-float32-full", _arrays(F32, **full))
    yield from _both_ways("64x64-bfloat16-tied", _arrays(BF16, key_dim=64, value_dim=64))
    yield from _both_ways(
        "64x64-float32-decay-documents", _arrays(F32, key_dim=64, value_dim=64, tied=False, decay=True, documents=True)
    )
    yield from _both_ways("64x128-bfloat16-grouped", _arrays(BF16, key_dim=64, key_heads=2))
    yield from _both_ways("192x64-bfloat16-odd-heads", _arrays(BF16, key_dim=192, value_dim=64, heads=9, key_heads=3))
    yield from _both_ways("256x256-bfloat16-full", _arrays(BF16, key_dim=256, value_dim=256, **full))
    yield from _both_ways("256x256-float32-full", _arrays(F32, key_dim=256, value_dim=256, **full))
    for chunk, dtype in product((64, 256), (BF16, F32)):
        name = f"128x128-{jnp.dtype(dtype).name}-full-chunk{chunk}"
        yield from _both_ways(name, _arrays(dtype, **full), chunk_size=chunk)
    yield from _both_ways("128x128-bfloat16-full-high", _arrays(BF16, **full), precision=HIGH)
    yield from _both_ways("128x128-float32-full-high", _arrays(F32, **full), precision=HIGH)
    yield from _both_ways("128x128-bfloat16-one-head", _arrays(BF16, heads=1, key_heads=1, length=64))
    yield from _both_ways("128x128-bfloat16-one-key-head", _arrays(BF16, heads=12, key_heads=1))
    yield from _decode_variants()


def _both_ways(name, arrays, **options) -> Iterator[Variant]:
    for save in (False, True):
        yield f"forward-{name}" + "-save" * save, "forward", partial(forward, scale=0.5, save=save, **options), arrays
    output, state, residuals = jax.eval_shape(partial(forward, scale=0.5, save=True, **options), *arrays)
    cotangents = residuals, output, state
    yield f"backward-{name}", "backward", partial(backward, scale=0.5, **options), (*arrays, *cotangents)


def _decode_variants() -> Iterator[Variant]:
    for dim, full in product((64, 128, 256), (False, True)):
        arrays = _arrays(F32 if full else BF16, key_dim=dim, value_dim=dim, length=1, tied=not full, decay=full)[:-1]
        state = jax.ShapeDtypeStruct((*arrays[2].shape[::2], dim, dim), F32)
        name = f"decode-{dim}x{dim}" + "-full" * full
        yield name, "decode", partial(decode, scale=0.5), (*arrays[:-1], state)


def _arrays(
    dtype,
    *,
    key_dim=128,
    value_dim=128,
    tied=True,
    decay=False,
    documents=False,
    batch=1,
    length=512,
    heads=8,
    key_heads=None,
):
    """The arguments of `forward`."""
    shape = jax.ShapeDtypeStruct
    key = shape((batch, length, heads if key_heads is None else key_heads, key_dim), dtype)
    value = shape((batch, length, heads, value_dim), dtype)
    number = shape((batch, length, heads), F32)
    state = shape((batch, heads, key_dim, value_dim), F32) if documents else None
    begins = shape((batch, length), jnp.bool)
    return (
        key, key, value, number, None if tied else number, number if decay else None, state,
        begins if documents else None,
    )  # fmt: skip
