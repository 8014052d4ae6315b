"""The parts of the forward kernels that are timed alone wait for each other as the whole does: none waits for ever."""

import jax
import jax.numpy as jnp
import pytest

from efla_jax import efla_attention
from experiments.kernels import parts
from pallas_kernels.hopper import pieces
from tests.pallas_kernels.hopper.helpers import in_whole_rows
from tests.pallas_kernels.hopper.interpreting import interpreting

pytestmark = pytest.mark.cpu("interpreted as a GPU kernel")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "forward, ahead", "few heads"])
@pytest.mark.parametrize("part", parts.PARTS)
def test_ends(monkeypatch, part, kernel):
    plan = pieces.Plan("apart" if kernel == "few heads" else "fused", 4, 4)
    monkeypatch.setattr(pieces, "plan", lambda *call, **kind: plan)
    if kernel == "forward, ahead":
        in_whole_rows(monkeypatch)
    tokens = jnp.ones((1, 250, 1, 128), jnp.bfloat16) * 0.05
    call = lambda x: efla_attention(x, x, x, jnp.ones((1, 250, 1)), implementation="pallas_gpu")
    with parts.only(part), interpreting(monkeypatch, detect_races=False) as ran:
        output, state = jax.block_until_ready(jax.jit(call)(tokens))
    assert ran
    if part == "whole":
        assert jnp.any(output != 0)
        assert jnp.all(jnp.isfinite(state))
