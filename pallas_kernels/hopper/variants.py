"""Every kind of kernel that the op asks for, with shapes: compiled ahead of time to see registers and spills."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp

from pallas_kernels.hopper.decode import COLUMNS, ELEMENTS, decode
from pallas_kernels.hopper.op import backward, forward
from pallas_kernels.hopper.pieces import chosen, cut

Variant = tuple[str, str, Callable, tuple]


def variants(**small: int) -> Iterator[Variant]:
    """(name, "forward" or "backward", function, its arguments as shapes).

    small: other sizes than `_arrays` has, of batch, length and heads. B·H above half of the processors keeps the
    blocks of the kernels whole; those for few heads always have 16 rows.
    """
    sizes = (64, 64), (128, 128), (64, 128), (128, 64)
    for (key_dim, value_dim), tied, decay, documents in product(sizes, (True, False), (False, True), (False, True)):
        if key_dim != value_dim and (decay or documents):
            continue
        options = dict(tied=tied, decay=decay, documents=documents)
        name = f"{key_dim}x{value_dim}" + "".join(f"-{option}" for option, on in options.items() if on)
        arrays = _arrays(key_dim, value_dim, **options, **small)
        yield from _both_ways(name, arrays)
        if tied and not decay:
            yield from _both_ways(f"{name}-exact", arrays, exact=True)
    yield from _few_heads_variants(small)
    yield from _few_documents_variants(small)
    yield from _pieces_variants(small)
    yield from _decode_variants(small)


def _few_heads_variants(small) -> Iterator[Variant]:
    """Forward kernels that split the columns of the state over blocks of threads."""
    for key_dim, exact in product((64, 128), (True, False)):
        sizes = small | dict(batch=16)
        arrays = _arrays(key_dim, 128, tied=exact, decay=not exact, documents=not exact, **sizes)
        name = f"{key_dim}x128-few" + ("-tied-exact" if exact else "-decay-documents")
        length = arrays[0].shape[1]
        yield from _forward(name, arrays, exact=exact, plan=cut("forward", length, 128, 1))
        for count in (1, 2) if exact else ():
            long = count * length  # loops of a few turns are unrolled
            plan = chosen("forward", 64, long, 128, dict(apart=count), few=True)
            arrays = _arrays(key_dim, 128, tied=True, decay=False, documents=False, **sizes | dict(length=long))
            apart = partial(forward, scale=1.0, save=False, exact=True, plan=plan)
            yield f"forward-{name}-apart-{count}", "forward", apart, arrays


def _few_documents_variants(small) -> Iterator[Variant]:
    """Documents without decay in rows too short for pieces: again a block of threads for each half of the columns."""
    for key_dim, tied in product((64, 128), (True, False)):
        arrays = _arrays(key_dim, 128, tied=tied, decay=False, documents=True, **small | dict(batch=3, length=330))
        name = f"{key_dim}x128-few-documents" + "-tied" * tied
        yield f"forward-{name}", "forward", partial(forward, scale=1.0, save=False), arrays


def _pieces_variants(small) -> Iterator[Variant]:
    """Rows in pieces: the inverse, summaries, their chain, and what walks the pieces; the backward pass likewise."""
    kinds = dict(
        exact=(True, False, False), tied=(True, True, False), untied=(False, True, True), documents=(True, False, True)
    )
    for (key_dim, value_dim), (kind, (tied, decay, documents)) in product(
        ((64, 64), (128, 128), (64, 128), (128, 64)), kinds.items()
    ):
        if key_dim != value_dim and kind != "exact":
            continue
        options = dict(tied=tied, decay=decay, documents=documents)
        arrays = _arrays(key_dim, value_dim, **options, **small | dict(batch=4))
        plan = cut("both", arrays[0].shape[1], value_dim, 4, decayed=decay or documents)
        yield from _both_ways(f"{key_dim}x{value_dim}-pieces-{kind}", arrays, exact=kind == "exact", plan=plan)
    full = small | dict(batch=16)  # heads enough for a block to have all columns
    arrays = _arrays(128, 128, tied=True, decay=False, documents=False, **full)
    plan = cut("both", arrays[0].shape[1], 128, 4)
    yield from _both_ways("128x128-pieces-full-exact", arrays, exact=True, plan=plan)


def _forward(name, arrays, **options) -> Iterator[Variant]:
    for save in (False, True):
        fn = partial(forward, scale=1.0, save=save, **options)
        yield f"forward-{name}" + "-save" * save, "forward", fn, arrays


def _both_ways(name, arrays, **options) -> Iterator[Variant]:
    yield from _forward(name, arrays, **options)
    yield f"backward-{name}", "backward", partial(backward, scale=1.0, **options), _backward_arrays(arrays, **options)


def _decode_variants(small) -> Iterator[Variant]:
    """Every width of block that fits; one token and many; with as little to read as possible, and with all there is."""
    for dim, length, columns in product((64, 128, 256), (1, 16), COLUMNS):
        if columns > dim or dim * columns > ELEMENTS:
            continue
        sizes = small | dict(length=length)
        for full in (False, True):
            options = dict(tied=not full, decay=full, documents=False, dtype=jnp.float32 if full else jnp.bfloat16)
            arrays = _arrays(dim, dim, **sizes, **options)[:-1]
            name = f"decode-{dim}x{dim}-tokens{length}-columns{columns}" + "-full" * full
            yield name, "forward", partial(decode, scale=1.0, columns=columns), arrays


def _arrays(key_dim, value_dim, *, tied, decay, documents, batch=32, length=1024, heads=4, dtype=jnp.bfloat16):
    """The arguments of `forward`."""
    shape = jax.ShapeDtypeStruct
    key = shape((batch, length, heads, key_dim), dtype)
    value = shape((batch, length, heads, value_dim), dtype)
    number = shape((batch, length, heads), jnp.float32)
    state = shape((batch, heads, key_dim, value_dim), jnp.float32)
    begins = shape((batch, length), jnp.bool)
    return (
        key, key, value, number, None if tied else number, number if decay else None, state,
        begins if documents else None,
    )  # fmt: skip


def _backward_arrays(arrays, **options):
    """The arguments of `backward` for those of `forward`."""
    output, state, residuals = jax.eval_shape(partial(forward, scale=1.0, save=True, **options), *arrays)
    return *arrays, residuals, output, state
