"""What a kernel leaves unwritten nobody reads: memory that is full of NaNs before a call changes no bit of a result."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from efla_jax.evaluation.op_accuracy import Case, attention, draw, forward, forward_backward
from tests.on_device.test_repeat import CASES, bits

pytestmark = pytest.mark.gpu

PIECES = {
    "pieces, documents, state": (Case(1, 8192, 2, 128, 128, documents=3, state=True), "exact"),
    "pieces, long documents": (Case(1, 16384, 4, 64, 64, documents=2), "exact"),
    "pieces, decay": (Case(1, 4096, 1, 128, 128, log_decay=True), "exact"),
    "pieces, several parts a run": (Case(2, 8192, 16, 128, 128), "exact"),
}


def soil() -> None:
    """Fills what the pool of memory has free, in pieces of any size, and frees it: all bits set, a NaN of any type."""
    sizes = [2**exponent for exponent in (26, 22, 18, 14, 10) for _ in range(8)]
    blocks = jax.block_until_ready([jnp.full(size, 0xFFFFFFFF, jnp.uint32) for size in sizes])
    for block in blocks:
        block.delete()


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("case", "rule"), (CASES | PIECES).values(), ids=CASES | PIECES)
def test_unwritten_memory_is_not_read(case, rule, direction):
    given = draw(case, 0)
    run = partial(attention(rule), implementation="pallas_gpu")
    run = jax.jit(partial(forward, run)) if direction == "forward" else jax.jit(partial(forward_backward, run))
    given = given[: 1 if direction == "forward" else 2]
    clean = jax.block_until_ready(run(*given))
    soil()
    soiled = run(*given)
    differ = {name: int(jnp.sum(bits(x) != bits(clean[name]))) for name, x in soiled.items()}
    assert not any(differ.values()), f"numbers with other bits: {differ}"
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in clean.values())
