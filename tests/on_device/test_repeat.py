"""A thousand runs of every kind of kernel give the bits of the first, all outputs of forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from efla_jax import efla_step
from efla_jax.evaluation.op_accuracy import Case, attention, draw, forward, forward_backward
from efla_jax.ops.attention import ImplementationName
from pallas_kernels import triton

pytestmark = pytest.mark.gpu

REPEATS = 1000

CASES = {
    "exact": (Case(8, 512, 16, 128, 128), "exact"),
    "exact, D = 64": (Case(8, 512, 16, 64, 64), "exact"),
    "decay, documents, state, float16": (
        Case(8, 500, 16, 128, 128, 8, documents=3, log_decay=True, state=True, dtype="float16"), "exact",
    ),
    "euler": (Case(8, 512, 16, 128, 128), "euler"),
    "few heads": (Case(1, 900, 4, 128, 128, documents=4, state=True), "exact"),
    "few heads, all in one kernel": (Case(2, 1100, 20, 128, 128, 10, state=True), "exact"),
    "in pieces": (Case(1, 8192, 2, 128, 128), "exact"),
}  # fmt: skip


def bits(x):
    return jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])


def different_runs(run, *arguments) -> dict[str, int]:
    """In how many of REPEATS further runs of run(*arguments) each result had other bits than in the first."""

    @jax.jit
    def again(count, first, arguments):
        results = run(*arguments)
        differ = {name: jnp.any(bits(x) != bits(first[name])) for name, x in results.items()}
        return {name: count[name] + differ[name] for name in count}, results

    shapes = jax.eval_shape(run, *arguments)
    nothing = {name: jnp.zeros((), jnp.int32) for name in shapes}
    empty = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    differ, first = again(nothing, empty, arguments)
    assert all(differ.values()), "a result is all zeros"
    count = nothing
    for _ in range(REPEATS):
        count, _ = again(count, first, arguments)
    return {name: int(x) for name, x in count.items() if x}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("case", "rule"), CASES.values(), ids=CASES)
def test_pallas_gpu(case, rule, direction):
    """`forward` is the kernel that saves nothing, `backward` the one that saves and its gradient kernel."""
    check("pallas_gpu", case, rule, direction)


@pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_triton(direction):
    case = Case(4, 500, 8, 64, 64, 4, documents=3, log_decay=True, state=True)
    check("triton", case, "exact", direction)


def check(implementation: ImplementationName, case, rule, direction):
    inputs, cotangents = draw(case, 0)
    run = partial(attention(rule), implementation=implementation)
    if direction == "forward":
        assert different_runs(partial(forward, run), inputs) == {}
    else:
        assert different_runs(partial(forward_backward, run), inputs, cotangents) == {}


def test_decode():
    inputs, _ = draw(Case(64, 1, 16, 128, 128, state=True), 0)
    tokens = {name: x[:, 0] for name, x in inputs.items() if name != "initial_state"}

    def step(tokens, state):
        return dict(
            zip(("output", "state"), efla_step(**tokens, state=state, implementation="pallas_gpu"), strict=True)
        )

    assert different_runs(step, tokens, inputs["initial_state"]) == {}
