"""The kernels, interpreted, against the float64 token loop: outputs, final state and the gradient of every input."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.helpers import evaluate
from tests.pallas_kernels.hopper.helpers import assert_accurate, documents, low, rounded

pytestmark = pytest.mark.usefixtures("interpreted")

# inputs, options of the call, and where documents start
CASES = {
    "exact, documents": (dict(value_dim=128), dict(), (1, 40, 64, 100)),
    "exact, decay, documents": (dict(decay=True), dict(), (30, 70, 71, 128)),
    "split, decay, grouped": (dict(decay=True, heads=4, key_heads=2, batch=1), dict(integrator="split"), None),
    "padded": (dict(key_dim=32, value_dim=40, length=65), dict(), None),
}
SLOW_CASES = {
    "euler": (dict(), dict(integrator="euler"), None),
    "exact, decay": (dict(decay=True, key_dim=128), dict(scale=0.5), None),
    "padded to 128": (dict(key_dim=96, value_dim=72, decay=True, batch=1), dict(), (50,)),
    "exact, scaled": (dict(heads=2, batch=1, key_dim=128, value_dim=128), dict(scale=0.3), None),
    "implicit, decay, documents": (dict(decay=True), dict(integrator="implicit"), (10, 64, 100)),
    "rk2": (dict(), dict(integrator="rk2"), None),
    "rk4, decay": (dict(decay=True), dict(integrator="rk4"), None),
    "euler, decay": (dict(decay=True, key_dim=128, value_dim=128), dict(integrator="euler"), None),
    "implicit": (dict(value_dim=128), dict(integrator="implicit", scale=-2.0), None),
    "all large": (
        dict(decay=True, key_dim=128, value_dim=128, heads=4, key_heads=2, length=250), dict(scale=0.1), (64, 90, 200),
    ),
}  # fmt: skip


PARAMETERS = [
    pytest.param(*case, id=name, marks=pytest.mark.slow if name in SLOW_CASES else ())
    for name, case in (CASES | SLOW_CASES).items()
]


@pytest.mark.parametrize(("sizes", "options", "starts"), PARAMETERS)
def test_accurate(sizes, options, starts):
    inputs, cotangent = rounded(**sizes)
    ids = None if starts is None else documents(starts, *inputs["key"].shape[:2])
    assert_accurate(inputs, cotangent, segment_ids=ids, **options)


@pytest.mark.parametrize("norm2", [1e-8, 1.0, 1e3, *(pytest.param(x, marks=pytest.mark.slow) for x in (1e-4, 30.0))])
def test_norms(norm2):
    assert_accurate(*rounded(norm2=norm2))


def test_small_forgetting_is_kept():
    """V - K S in one 16-bit number would be V where keys are short: all that is forgotten, 2e-4 here, would be lost.

    The error along the true state, which rounding that is not biased leaves far below that of every single number.
    """
    inputs, cotangent = rounded(norm2=1e-4, length=512, batch=1, heads=2, key_heads=2)
    inputs.pop("initial_state")
    got, want = (
        evaluate(inputs, dtype, implementation=name, cotangent=cotangent)["state"].astype(np.float64)
        for name, dtype in (("pallas_gpu", None), ("scan", np.float64))
    )
    assert abs(np.vdot(got - want, want) / np.vdot(want, want)) < 5e-5


@pytest.mark.slow
def test_norms_with_decay():
    """The two ends; the cases above stand between."""
    for norm2 in (1e-8, 1e3):
        assert_accurate(*rounded(norm2=norm2, decay=True, batch=4, length=65))


def special(inputs):
    """Zero and repeated keys, and betas of 0, in one sequence."""
    inputs = dict(inputs)
    inputs["key"] = inputs["key"].copy()
    inputs["beta"] = inputs["beta"].copy()
    inputs["key"][:, 3::4] = 0
    inputs["key"][:, 1::4] = inputs["key"][:, :1]
    inputs["beta"][:, 2::5] = 0
    return inputs


@pytest.mark.parametrize("decay", [False, True], ids=["no decay", "decay"])
def test_special_keys(decay):
    """A zero key has a gradient of its own: the value times what the state's cotangent is there."""
    inputs, cotangent = rounded(decay=decay)
    assert_accurate(special(inputs), cotangent)


def test_same_key_throughout():
    """Parallel keys make the triangular system as ill-conditioned as it gets; most entries of its inverse are tiny."""
    inputs, cotangent = rounded(norm2=1e3)
    inputs["key"] = np.repeat(inputs["key"][:, :1], 130, 1)
    assert_accurate(inputs, cotangent)


@pytest.mark.parametrize("length", [1, 65, *(pytest.param(length, marks=pytest.mark.slow) for length in (63, 64, 200))])
def test_lengths(length):
    """One token makes one number of an array of gradients, whose error says little: there are 8 rows of it."""
    batch = 8 if length == 1 else 1
    inputs, cotangent = rounded(length=length, batch=batch, decay=True)
    assert_accurate(inputs, cotangent, segment_ids=documents((17, 63, 90), batch, length))


def coefficients(inputs, seed=7):
    """The same with erase and write, a third of each 0, in place of beta."""
    rng = np.random.default_rng(seed)
    shape = inputs["beta"].shape
    pick = lambda: (rng.uniform(size=shape) * (rng.uniform(size=shape) < 2 / 3)).astype(np.float32)
    return {name: x for name, x in inputs.items() if name != "beta"} | dict(erase=pick(), write=pick())


@pytest.mark.parametrize("decay", [pytest.param(False, marks=pytest.mark.slow), True], ids=["no decay", "decay"])
def test_erase_and_write(decay):
    """Any erase and write, in groups of heads."""
    inputs, cotangent = rounded(decay=decay, heads=2)
    ids = documents((40, 64), 2, 130) if decay else None
    assert_accurate(coefficients(inputs), cotangent, segment_ids=ids)


def test_no_initial_state():
    """Zeros are not passed; their gradient is not asked for."""
    inputs, cotangent = rounded(length=65)
    inputs.pop("initial_state")
    assert_accurate(inputs, cotangent)


# float16: 2^-11 relative to what a number is, but nothing below 2^-24: keys no shorter than 1e-4.
@pytest.mark.parametrize("decay", [pytest.param(False, marks=pytest.mark.slow), True], ids=["no decay", "decay"])
def test_float16(decay):
    for norm2 in (1e-4, 1.0, 1e3):
        assert_accurate(*rounded(norm2=norm2, dtype=jnp.float16, decay=decay, length=70))


def test_large_keys_stay_finite():
    """Keys whose squared norm is beyond float16's range: the inverse is taken on unit keys."""
    for dtype in (jnp.float16, jnp.bfloat16):
        inputs, cotangent = rounded(length=70, batch=1)
        inputs["key"] = inputs["key"].astype(np.float32) * 400
        got = evaluate(low(inputs, dtype), implementation="pallas_gpu", cotangent=cotangent)
        assert all(np.all(np.isfinite(x.astype(np.float32))) for x in got.values())
