"""What looks for races finds one, in every kernel that ran and not in the last alone."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import pytest

from tests.pallas_kernels.tpu.conftest import _interpreting

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


def test_found(monkeypatch):
    x = jnp.ones((8, 128), jnp.float32)
    with _interpreting(monkeypatch, detect_races=True) as states:
        for wait in (False, True):
            jax.block_until_ready(copied(x, wait))
    assert [state.races_found for state in states] == [True, False]
