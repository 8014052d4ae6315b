"""Every kind of kernel lowers for a TPU without libtpu, alone and through the op; what is exported comes back."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from efla_jax import delta_rule_attention, efla_attention, efla_step
from pallas_kernels import tpu
from tests.pallas_kernels.hopper.test_lowering import shapes, training

pytestmark = pytest.mark.cpu("lowering needs no TPU")

TPU = ("tpu",)
BOTH = dict(efla_forward=1, efla_backward=1)
REPRESENTATIVE = ("128x128-bfloat16-tied", "64x64-float32-decay-documents", "64x128-bfloat16-grouped")


def kernels(text: str) -> dict[str, int]:
    """How often each kernel is called in StableHLO."""
    calls = [line for line in text.splitlines() if "custom_call @tpu_custom_call" in line]
    names = [re.search(r'kernel_name = "(efla_\w+)"', line) for line in calls]
    return dict(Counter(name[1] for name in names if name))


def lowered(fn: Callable, *args: Any) -> dict[str, int]:
    return kernels(jax.jit(fn).trace(*args).lower(lowering_platforms=TPU).as_text())


VARIANTS = [
    pytest.param(kind, fn, args, id=name, marks=() if name.partition("-")[2] in REPRESENTATIVE else pytest.mark.slow)
    for name, kind, fn, args in tpu.variants()
]


@pytest.mark.parametrize(("kind", "fn", "args"), VARIANTS)
def test_variant(kind, fn, args):
    assert lowered(fn, *args) == {f"efla_{kind}": 1}


def loss(inputs):
    """Its gradient needs output and state."""
    call = delta_rule_attention if "erase" in inputs else efla_attention
    output, state = call(**inputs, implementation="pallas_tpu")
    return jnp.sum(jnp.square(output.astype(jnp.float32))) + jnp.sum(jnp.square(state))


@pytest.mark.parametrize(
    "inputs",
    [
        shapes(),
        shapes(decay=True, ids=True, key_dim=96, value_dim=40, length=1, dtype=jnp.float32),
        pytest.param(
            shapes(batch=1, length=2**20, heads=1, key_heads=1, key_dim=128, value_dim=128), marks=pytest.mark.slow
        ),
        pytest.param(shapes(batch=4096, length=64, heads=32, key_heads=32, decay=True), marks=pytest.mark.slow),
    ],
    ids=["plain", "padded", "a million tokens", "131072 sequences and heads"],
)
def test_op(inputs):
    assert lowered(training(loss), inputs) == BOTH


@pytest.mark.slow
def test_delta_rule():
    inputs = shapes()
    inputs["erase"] = inputs["write"] = inputs.pop("beta")
    assert lowered(training(loss), inputs) == BOTH


NAMES = jax.checkpoint_policies.save_only_these_names("efla_output", "efla_residuals")
POLICIES = {"nothing": (jax.checkpoint_policies.nothing_saveable, 2), "names": (NAMES, 1)}


@pytest.mark.parametrize(("policy", "forwards"), POLICIES.values(), ids=POLICIES)
def test_remat(policy, forwards):
    """Under jax.checkpoint the forward kernel runs once more, unless its results are saved by name."""
    found = lowered(training(jax.checkpoint(loss, policy=policy)), shapes())
    assert found == dict(efla_forward=forwards, efla_backward=1)


def test_vmap():
    """One kernel of a larger batch, not a loop of kernels."""
    stacked = {name: jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for name, x in shapes().items()}
    assert lowered(jax.vmap(training(loss)), stacked) == BOTH


def test_forward_keeps_nothing():
    """Not differentiated, the op calls the kernel that writes no residuals: output and final state alone."""
    run = lambda inputs: efla_attention(**inputs, implementation="pallas_tpu")
    text = jax.jit(run).trace(shapes(length=128)).lower(lowering_platforms=TPU).as_text()
    (call,) = (line for line in text.splitlines() if "custom_call @tpu_custom_call" in line)
    assert call.rsplit("->", 1)[1].count("tensor<") == 2


def test_export():
    """Through bytes and back: the same types, and the program of both kernels inside."""
    inputs = shapes(ids=True)
    exported = jax.export.export(jax.jit(training(loss)), platforms=TPU)(inputs)
    returned = jax.export.deserialize(exported.serialize())
    assert returned.platforms == TPU
    assert returned.in_avals == exported.in_avals
    assert returned.out_avals == exported.out_avals
    again = jax.jit(returned.call).trace(inputs).lower(lowering_platforms=TPU).as_text()
    assert kernels(again) == BOTH


def test_step():
    """The decoding step, which overwrites a state that is donated."""
    inputs = {name: jax.ShapeDtypeStruct(x.shape[:1] + x.shape[2:], x.dtype) for name, x in shapes().items()}
    inputs["state"] = shapes()["initial_state"]
    del inputs["initial_state"]
    call = jax.jit(lambda state, inputs: efla_step(**inputs, state=state, implementation="pallas_tpu"))
    text = call.trace(inputs.pop("state"), inputs).lower(lowering_platforms=TPU).as_text()
    assert kernels(text) == dict(efla_decode=1)
    assert "output_operand_alias" in text
