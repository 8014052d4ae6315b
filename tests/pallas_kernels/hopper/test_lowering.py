"""Every kind of kernel lowers for CUDA without a GPU, alone and through the op; what is exported comes back."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from efla_jax import delta_rule_attention, efla_attention
from pallas_kernels import hopper

pytestmark = pytest.mark.cpu("lowering needs no GPU")

CUDA = ("cuda",)
IN_PIECES = dict(forward=("prepare", "summaries", "chain", "scan"), backward=("reverse", "chain", "backward"))
FEW_IN_PIECES = (*IN_PIECES["forward"][:-1], "few_heads")
FUSED_IN_PIECES = (*IN_PIECES["forward"][:-1], "forward")
REPRESENTATIVE = (
    "64x64",
    "128x128-tied-save",
    "64x64-tied-decay-documents",
    "128x128-decay-save",
    "64x128-tied",
    "64x64-pieces-untied",
)


def kernels(text: str) -> dict[str, int]:
    """How often each kernel is called in StableHLO."""
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    names = [re.search(r"(efla_\w+)_mosaic_gpu", line) for line in calls]
    return dict(Counter(name[1] for name in names if name))


def lowered(fn: Callable, *args: Any) -> dict[str, int]:
    return kernels(jax.jit(fn).trace(*args).lower(lowering_platforms=CUDA).as_text())


def expected(name: str, kind: str) -> tuple[str, ...]:
    """The kernels of a variant."""
    if "apart" in name:
        return ("few_heads",) if name.endswith("-1") else FEW_IN_PIECES
    if kind == "forward" and re.search("pieces-(full-)?(exact|documents$)", name):  # documents that are not saved
        return FUSED_IN_PIECES
    return IN_PIECES[kind] if "pieces" in name else (kind,)


VARIANTS = [
    pytest.param(
        expected(name, kind),
        fn,
        args,
        id=name,
        marks=() if name.partition("-")[2] in REPRESENTATIVE else pytest.mark.slow,
    )
    for name, kind, fn, args in hopper.variants()
    if not name.startswith("decode")  # test_decode.py has them
]


@pytest.mark.parametrize(("names", "fn", "args"), VARIANTS)
def test_variant(names, fn, args):
    assert lowered(fn, *args) == {f"efla_{name}": 1 for name in names}


def shapes(
    batch=2, length=130, heads=4, key_heads=2, key_dim=64, value_dim=64, decay=False, ids=False, dtype=jnp.bfloat16
):
    """Inputs of `efla_attention` as shapes."""
    shape = jax.ShapeDtypeStruct
    keys = shape((batch, length, key_heads, key_dim), dtype)
    numbers = shape((batch, length, heads), jnp.float32)
    found = dict(
        query=keys,
        key=keys,
        value=shape((batch, length, heads, value_dim), dtype),
        beta=numbers,
        initial_state=shape((batch, heads, key_dim, value_dim), jnp.float32),
    )
    if decay:
        found["log_decay"] = numbers
    if ids:
        found["segment_ids"] = shape((batch, length), jnp.int32)
    return found


def loss(inputs):
    """Its gradient needs output and state."""
    call = delta_rule_attention if "erase" in inputs else efla_attention
    output, state = call(**inputs, implementation="pallas_gpu")
    return jnp.sum(jnp.square(output.astype(jnp.float32))) + jnp.sum(jnp.square(state))


def training(loss):
    """Loss and the gradients of all floating inputs."""

    def step(inputs):
        floats = {name: x for name, x in inputs.items() if name != "segment_ids"}
        ids = {name: x for name, x in inputs.items() if name == "segment_ids"}
        return jax.value_and_grad(lambda floats: loss(floats | ids))(floats)

    return step


@pytest.mark.parametrize(
    ("inputs", "in_pieces"),
    [
        (shapes(), False),
        (shapes(decay=True, ids=True, key_dim=96, value_dim=40, length=1, dtype=jnp.float16), False),
        pytest.param(
            shapes(batch=1, length=2**20, heads=1, key_heads=1, key_dim=128, value_dim=128),
            True,
            marks=pytest.mark.slow,
        ),
        pytest.param(shapes(batch=4096, length=64, heads=32, key_heads=32, decay=True), False, marks=pytest.mark.slow),
    ],
    ids=["plain", "padded", "a million tokens", "131072 sequences and heads"],
)
def test_op(inputs, in_pieces):
    names = FUSED_IN_PIECES + IN_PIECES["backward"] if in_pieces else ("forward", "backward")
    assert lowered(training(loss), inputs) == Counter(f"efla_{name}" for name in names)


@pytest.mark.slow
def test_delta_rule():
    inputs = shapes()
    inputs["erase"] = inputs["write"] = inputs.pop("beta")
    assert lowered(training(loss), inputs) == dict(efla_forward=1, efla_backward=1)


NAMES = jax.checkpoint_policies.save_only_these_names("efla_output", "efla_residuals")
POLICIES = {
    "nothing": (jax.checkpoint_policies.nothing_saveable, 2),
    "dots": (jax.checkpoint_policies.dots_saveable, 2),
    "names": (NAMES, 1),
}


@pytest.mark.parametrize(("policy", "forwards"), POLICIES.values(), ids=POLICIES)
def test_remat(policy, forwards):
    """Under jax.checkpoint the forward kernel runs once more, unless its results are saved by name."""
    found = lowered(training(jax.checkpoint(loss, policy=policy)), shapes())
    assert found == dict(efla_forward=forwards, efla_backward=1)


def test_vmap():
    """One kernel of a larger batch, not a loop of kernels."""
    stacked = {name: jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for name, x in shapes().items()}
    assert lowered(jax.vmap(training(loss)), stacked) == dict(efla_forward=1, efla_backward=1)


def test_forward_keeps_nothing():
    """Not differentiated, the op calls the kernel that writes no residuals: output and final state alone."""
    inputs = shapes(length=128)
    run = lambda inputs: efla_attention(**inputs, implementation="pallas_gpu")
    text = jax.jit(run).trace(inputs).lower(lowering_platforms=CUDA).as_text()
    (call,) = (line for line in text.splitlines() if "custom_call @mosaic_gpu" in line)
    assert kernels(text) == dict(efla_forward=1)
    assert call.rsplit("->", 1)[1].count("tensor<") == 2


def test_export():
    """Through bytes and back: the same types, and the program of both kernels inside."""
    inputs = shapes(ids=True)
    exported = jax.export.export(jax.jit(training(loss)), platforms=CUDA)(inputs)
    returned = jax.export.deserialize(exported.serialize())
    assert returned.platforms == CUDA
    assert returned.in_avals == exported.in_avals
    assert returned.out_avals == exported.out_avals
    gradients = jax.tree.unflatten(returned.out_tree, returned.out_avals)[1]
    assert {name: (x.shape, x.dtype) for name, x in gradients.items()} == {
        name: (x.shape, x.dtype) for name, x in inputs.items() if name != "segment_ids"
    }
    again = jax.jit(returned.call).trace(inputs).lower(lowering_platforms=CUDA).as_text()
    assert kernels(again) == dict(efla_forward=1, efla_backward=1)
