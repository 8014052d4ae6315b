"""bfloat16 and float16 inputs, by the error that rounding the inputs once more would make."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.helpers import draw, errors, evaluate, on_gpu

LOW = ("query", "key", "value")


def rounded(inputs, dtype):
    return inputs | {name: inputs[name].astype(dtype) for name in LOW}


def rounding_model(inputs, dtype, want):
    """Error that float64 makes when every low-precision input is moved by up to half its last place."""
    half = float(jnp.finfo(dtype).eps) / 2
    rng = np.random.default_rng(5)
    nudge = lambda x: x.astype(np.float64) * (1 + half * rng.uniform(-1, 1, x.shape))
    nudged = inputs | {name: nudge(inputs[name]) for name in LOW}
    model = errors(evaluate(nudged, np.float64, implementation="scan"), want)
    return {name: max(e, half) for name, e in model.items()}


# What is in float32 inside makes about one rounding, of the result. With bfloat16 products `xla` rounds every
# intermediate too, the triangular inverse and the states among them, which large keys amplify. So it does with float16
# on a GPU, whose TF32 products cut each number off behind float16's mantissa: errors twice as large, all to one side.
@pytest.mark.parametrize("decay", [False, True], ids=["no decay", "decay"])
@pytest.mark.parametrize("norm2", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize(
    ("implementation", "dtype", "factor"),
    [("scan", jnp.bfloat16, 3), ("xla", jnp.bfloat16, 12), ("scan", jnp.float16, 3), ("xla", jnp.float16, 3)],
)
def test_error(implementation, dtype, factor, norm2, decay):
    inputs = rounded(draw(length=100, heads=2, norm2=norm2, decay=decay), dtype)
    want = evaluate(inputs, np.float64, implementation="scan")
    model = rounding_model(inputs, dtype, want)
    if on_gpu() and implementation == "xla" and dtype == jnp.float16:
        factor = 24
    got = evaluate(inputs, implementation=implementation)
    too_far = {n: (e, model[n]) for n, e in errors(got, want).items() if not e <= factor * model[n]}
    assert not too_far, f"error made, and made by rounding the inputs: {too_far}"


@pytest.mark.parametrize("implementation", ["scan", "xla"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_large_keys_stay_finite(implementation, dtype):
    """‖k‖² of 1e3 and, summed beyond float16's range, of 1e5."""
    for norm2 in (1e3, 1e5):
        inputs = rounded(draw(length=100, heads=2, norm2=norm2), dtype)
        assert all(
            np.all(np.isfinite(x.astype(np.float32))) for x in evaluate(inputs, implementation=implementation).values()
        )


@pytest.mark.cpu("a GPU multiplies in TF32 by default")
@pytest.mark.parametrize("implementation", ["scan", "xla"])
def test_named_precision(implementation):
    """A named precision is taken, as a string or an enum, and changes nothing on a CPU that multiplies in float32."""
    inputs = draw(length=20)
    want = evaluate(inputs, implementation=implementation)
    for precision in ("highest", "default"):
        got = evaluate(inputs, implementation=implementation, precision=precision)
        assert max(errors(got, want).values()) < 2e-6
