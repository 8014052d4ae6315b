"""What looks for races finds one, in every kernel that ran and not in the last alone."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import pytest

from tests.pallas_kernels.tpu.interpreting import interpreting

pytestmark = pytest.mark.cpu("interpreted as a TPU kernel")


def copied(x, wait: bool):
    """A kernel that reads what a copy brings, before or after it is there."""

    def kernel(x_ref, out_ref, buffer, semaphore):
        copy = pltpu.make_async_copy(x_ref, buffer, semaphore)
        copy.start()
        if wait:
            copy.wait()
        out_ref[...] = buffer[...]
        if not wait:
            copy.wait()

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    )(x)


def raced(monkeypatch, waits: tuple[bool, ...]) -> list[bool]:
    """Of each kernel in turn, whether it had a race: JAX 0.11 keeps that, 0.12 raises."""
    with interpreting(monkeypatch, detect_races=True) as states:
        for wait in waits:
            try:
                jax.block_until_ready(copied(jnp.ones((8, 128), jnp.float32), wait))
            except jax.errors.JaxRuntimeError as error:
                if "RACE DETECTED" not in str(error):
                    raise
                states[-1].races_found = True
    return [state.races_found for state in states]


def test_found(monkeypatch):
    assert raced(monkeypatch, (True,)) == [False]
    assert raced(monkeypatch, (False,)) == [True]
    if jax.__version_info__ < (0, 12):  # a kernel after one that raised finds the interpreter as that left it
        assert raced(monkeypatch, (False, True)) == [True, False]
