"""cost_estimate against what the kernels' own programs hold, and what is planned against what VMEM has."""

import math
from itertools import product

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from pallas_kernels import tpu
from pallas_kernels.tpu import plan
from pallas_kernels.tpu.decode import BLOCK, key_heads_of

pytestmark = pytest.mark.cpu("nothing is run")


def equations(jaxpr):
    """All of a program, of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def pallas_calls(fn, args):
    return [e for e in equations(jax.make_jaxpr(fn)(*args).jaxpr) if e.primitive.name == "pallas_call"]


def products(equation):
    """FLOPs of the products in the kernel, times its grid."""
    total = 0
    for inner in equations(equation.params["jaxpr"]):
        if inner.primitive.name == "dot_general":
            (contracting, _), _ = inner.params["dimension_numbers"]
            left = inner.invars[0].aval.shape
            total += 2 * math.prod(inner.outvars[0].aval.shape) * math.prod(left[i] for i in contracting)
    return total * math.prod(equation.params["grid_mapping"].grid)


def exponentials(equation):
    found = [e for e in equations(equation.params["jaxpr"]) if e.primitive.name == "exp"]
    return sum(e.outvars[0].aval.size for e in found) * math.prod(equation.params["grid_mapping"].grid)


def moved(equation):
    """Bytes of inputs and outputs."""
    arrays = [x.aval for x in (*equation.invars, *equation.outvars)]
    return sum(x.size * x.dtype.itemsize for x in arrays)


CASES = ("64x128-bfloat16-grouped", "128x128-bfloat16-full-high", "256x256-float32-full", "64x64-bfloat16-tied")


@pytest.mark.parametrize(
    ("kind", "fn", "args"),
    [pytest.param(*rest, id=name) for name, *rest in tpu.variants() if name.partition("-")[2] in CASES],
)
def test_estimate(kind, fn, args):
    (call,) = pallas_calls(fn, args)
    estimate = call.params["cost_estimate"]
    assert estimate.bytes_accessed == moved(call)
    assert estimate.flops == products(call)
    assert estimate.transcendentals == exponentials(call)


def test_estimate_of_a_step():
    """Of its six operations for each number of the states two are sums; they are counted as the formula has them."""
    for name, kind, fn, args in tpu.variants():
        if kind == "decode":
            (call,) = pallas_calls(fn, args)
            estimate = call.params["cost_estimate"]
            assert estimate.flops == 6 * args[-1].size, name
            assert estimate.bytes_accessed == moved(call), name


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_steps_fit(direction):
    """Whatever is served has a step within VMEM that divides the heads and fills whole registers."""
    for heads, group, dims, wide in product((1, 2, 3, 8, 13, 32), (1, 2, 4), ((64, 64), (128, 64), (20, 256)), (0, 1)):
        sizes = plan.fitted(plan.Sizes(heads, group, *dims, bool(wide)), 1000, None)
        assert sizes is not None
        step = plan.step_of(direction, sizes, 8)
        assert step is not None
        assert heads % step.key_heads == 0
        assert plan.vmem(direction, sizes, step.key_heads * group, step.span) <= plan.VMEM
        for count, all_of_them, dim in (
            (step.key_heads, heads, sizes.key_dim),
            (step.key_heads * group, heads * group, sizes.value_dim),
        ):
            assert count == all_of_them or count * dim % 128 == 0


def test_chunks():
    sizes = plan.Sizes(8, 1, 128, 128, False)
    chunk = lambda *how: getattr(plan.fitted(sizes, *how), "chunk", None)
    assert [chunk(64, None), chunk(65, None), chunk(10**6, None)] == [64, 128, 128]
    assert [chunk(10, size) for size in (64, 128, 256)] == [64, 128, 256]
    assert getattr(plan.fitted(plan.Sizes(1, 12, 128, 128, False), 1000, None), "chunk", None) == 64


def test_precision_decides_on_passes():
    """bfloat16 in one pass unless asked for more, float32 in six unless asked for fewer."""
    from pallas_kernels.tpu.op import pieces_of

    precisions = (None, *jax.lax.Precision)
    assert [pieces_of(jnp.dtype(jnp.bfloat16), p) for p in precisions] == [1, 1, 2, 3]
    assert [pieces_of(jnp.dtype(jnp.float32), p) for p in precisions] == [3, 1, 2, 3]


@pytest.mark.parametrize("heads", [1, 7, 8, 12, 64])
def test_states_of_a_step_fit(heads):
    together = key_heads_of(heads, 1, 128, 128)
    assert heads % together == 0
    assert together * 128 * 128 * 4 <= BLOCK
