"""The kernels, interpreted, against the float64 token loop: outputs, final state and the gradient of every input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax import efla_attention
from tests.ops.helpers import errors, evaluate
from tests.pallas_kernels.hopper.helpers import documents, low, rounded
from tests.pallas_kernels.hopper.test_interpreted import coefficients, special
from tests.pallas_kernels.tpu.helpers import assert_accurate

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.cpu("interpreted as TPU kernels"),
]

BF16, F32 = jnp.bfloat16, np.float32

# type, sizes, options of the call, where documents start
CASES = {
    "exact, documents": (BF16, dict(value_dim=128), dict(chunk_size=64), (1, 40, 64, 100)),
    "exact, decay, documents, float32": (F32, dict(decay=True), dict(chunk_size=64), (30, 70, 71, 128)),
    "split, decay, grouped": (
        BF16, dict(decay=True, heads=4, key_heads=2, batch=1), dict(integrator="split"), None,
    ),
    "euler, two chunks a step, float32": (
        F32, dict(length=128, batch=1), dict(integrator="euler", chunk_size=64), None,
    ),
    "padded": (F32, dict(key_dim=20, value_dim=40, length=65), dict(scale=-0.5), None),
}  # fmt: skip
SLOW_CASES = {
    "exact, decay": (BF16, dict(decay=True, key_dim=128), dict(scale=0.5, chunk_size=64), None),
    "exact, decay, whole chunk": (BF16, dict(decay=True, key_dim=128), dict(scale=0.5), None),
    "padded": (BF16, dict(key_dim=96, value_dim=72, decay=True, batch=1), dict(), (50,)),
    "long keys, float32": (F32, dict(key_dim=192, value_dim=256, batch=1), dict(chunk_size=64), None),
    "chunks of 256": (BF16, dict(length=300, decay=True), dict(chunk_size=256), (10, 100, 256)),
    "implicit, decay, documents": (BF16, dict(decay=True), dict(integrator="implicit", chunk_size=64), (10, 64, 100)),
    "rk2, float32": (F32, dict(), dict(integrator="rk2"), None),
    "rk4, decay": (BF16, dict(decay=True), dict(integrator="rk4"), None),
    "many heads": (BF16, dict(heads=12, key_heads=12, batch=1), dict(), None),
    "groups of 3, of odd heads": (F32, dict(heads=9, key_heads=3, batch=1), dict(chunk_size=64), (17,)),
    "all large": (
        BF16, dict(decay=True, key_dim=128, value_dim=128, heads=4, key_heads=2, length=250), dict(scale=0.1),
        (64, 90, 200),
    ),
}  # fmt: skip
PARAMETERS = [
    pytest.param(*case, id=name, marks=marks)
    for cases, marks in ((CASES, ()), (SLOW_CASES, pytest.mark.slow))
    for name, case in cases.items()
]


@pytest.mark.parametrize(("dtype", "sizes", "options", "starts"), PARAMETERS)
def test_accurate(dtype, sizes, options, starts):
    inputs, cotangent = rounded(dtype=dtype, **sizes)
    ids = None if starts is None else documents(starts, *inputs["key"].shape[:2])
    assert_accurate(inputs, cotangent, segment_ids=ids, **options)


slow = lambda *values: [pytest.param(*values, marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    ("dtype", "norm2"), [(BF16, 1e3), *slow(F32, 1e-8), *slow(F32, 1e3), *slow(BF16, 1e-8), *slow(BF16, 1.0)]
)
def test_norms(dtype, norm2):
    assert_accurate(*rounded(norm2=norm2, dtype=dtype, length=70, batch=1))


@pytest.mark.parametrize("decay", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["no decay", "decay"])
def test_special_keys(decay):
    """A zero key has a gradient of its own: the value times what the state's cotangent is there."""
    inputs, cotangent = rounded(decay=decay, length=70, dtype=F32)
    assert_accurate(special(inputs), cotangent)


def test_same_key_throughout():
    """Parallel keys make the triangular system as ill-conditioned as it gets: powers of it would overflow."""
    inputs, cotangent = rounded(norm2=1e3, batch=1, length=128)
    inputs["key"] = np.repeat(inputs["key"][:, :1], 128, 1)
    assert_accurate(inputs, cotangent)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 129, 256, 300])
def test_lengths(length):
    inputs, cotangent = rounded(length=length, batch=1, decay=True, dtype=F32)
    assert_accurate(inputs, cotangent, segment_ids=documents((17, 63, 90), 1, length))


@pytest.mark.parametrize("decay", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["no decay", "decay"])
def test_erase_and_write(decay):
    """Any erase and write, a third of each 0, in groups of heads."""
    inputs, cotangent = rounded(decay=decay, heads=2, batch=1, dtype=F32)
    ids = documents((40, 64), 1, 130) if decay else None
    assert_accurate(coefficients(inputs), cotangent, segment_ids=ids, chunk_size=64)


def test_no_initial_state():
    """Zeros are not passed; their gradient is not asked for."""
    inputs, cotangent = rounded(length=5, batch=1)
    inputs.pop("initial_state")
    assert_accurate(inputs, cotangent)


def test_large_keys_stay_finite():
    """Products of squared norms beyond bfloat16's and float32's precision: nothing overflows."""
    inputs, cotangent = rounded(length=70, batch=1)
    inputs["key"] = inputs["key"].astype(np.float32) * 1e6
    got = evaluate(low(inputs), implementation="pallas_tpu", cotangent=cotangent)
    assert all(np.all(np.isfinite(x.astype(np.float32))) for x in got.values())


# Largest relative error of any result, by precision: one pass and three; six are what float32 takes anyway.
BOUNDS = {"default": (1e-3, 2e-2), "high": (2e-6, 2e-4)}


@pytest.mark.parametrize("precision", ["default", pytest.param("high", marks=pytest.mark.slow)])
def test_precision(precision):
    """Every precision has its own accuracy: not less, and not more either, which would cost passes."""
    inputs, cotangent = rounded(length=70, batch=1, dtype=F32)
    run = lambda dtype=None, **options: evaluate(inputs, dtype, cotangent=cotangent, **options)
    found = errors(run(implementation="pallas_tpu", precision=precision), run(np.float64, implementation="scan"))
    least, most = BOUNDS[precision]
    assert all(least < e < most for e in found.values()), found


@pytest.mark.slow
def test_precision_of_bfloat16_inputs():
    """More passes make intermediates of bfloat16 inputs exact; results in float32 show it."""
    inputs, cotangent = rounded(length=70, batch=1)
    run = lambda dtype=None, **options: evaluate(inputs, dtype, cotangent=cotangent, **options)
    want = run(np.float64, implementation="scan")
    found = errors(run(implementation="pallas_tpu", precision="highest"), want)
    assert found["state"] < 2e-6
    assert found["d_beta"] < 2e-6


def test_x64():
    """In a program that has 64-bit numbers on, indices still are of 32 bits."""
    inputs, _ = rounded(length=5, batch=1)
    inputs.pop("initial_state")
    with jax.enable_x64(True):
        output, state = efla_attention(**inputs, implementation="pallas_tpu")
    assert (output.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
