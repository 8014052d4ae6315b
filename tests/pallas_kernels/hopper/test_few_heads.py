"""The forward pass of few heads with nothing kept, which no call that is differentiated takes."""

import numpy as np
import pytest

from efla_jax import efla_attention
from pallas_kernels.hopper import few_heads, pieces
from tests.ops.helpers import errors, evaluate
from tests.pallas_kernels.hopper.helpers import FACTOR, rounded


def test_serves():
    """What has a kernel of its own: both halves of every head's columns on the card at once, and no more to make."""
    plain = dict(gain=None)
    assert few_heads.serves(66, 128, plain, tied=True, save=False)
    assert not few_heads.serves(67, 128, plain, tied=True, save=False)
    assert not few_heads.serves(4, 64, plain, tied=True, save=False)
    assert not few_heads.serves(4, 128, plain, tied=False, save=False)
    assert not few_heads.serves(4, 128, plain, tied=True, save=True)
    assert not few_heads.serves(4, 128, plain | dict(left=None), tied=True, save=False)


CASES = [
    pytest.param(dict(length=330, heads=2), dict(), True, 1, id="grouped"),
    pytest.param(
        dict(length=65, key_dim=128), dict(integrator="euler", scale=0.5), False, 1,
        id="no state", marks=pytest.mark.slow,
    ),
    pytest.param(dict(length=40), dict(), True, 1, id="one chunk"),
    pytest.param(dict(length=700, key_dim=128), dict(), True, 1, id="eleven chunks", marks=pytest.mark.slow),
    pytest.param(dict(length=600, key_dim=128), dict(), True, 2, id="in pieces"),  # of five chunks, summed up as three
    pytest.param(
        dict(length=460, heads=2), dict(integrator="euler"), False, 4, id="in four pieces", marks=pytest.mark.slow
    ),
]  # fmt: skip


@pytest.mark.usefixtures("interpreted")
def test_scores_are_scaled_before_they_are_rounded(monkeypatch):
    """Products of queries and keys beyond the range of float16, which a scale, here a power of two, brings back."""
    monkeypatch.setattr(pieces, "plan", lambda *call, **kind: pieces.Plan("apart", 2, 2))
    inputs, _ = rounded(dtype=np.float16, batch=1, length=70, value_dim=128, norm2=64)
    plain = efla_attention(**inputs, implementation="pallas_gpu")
    large = inputs | dict(query=inputs["query"] * np.float16(8192))
    scaled = efla_attention(**large, implementation="pallas_gpu", scale=2.0**-13)
    products = np.einsum("bihk,bjhk->bhij", *(np.float32(large[name]) for name in ("query", "key")))
    assert np.abs(np.tril(products)).max() > np.finfo(np.float16).max
    for x, y in zip(plain, scaled, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("sizes", "options", "stateful", "count"), CASES)
def test_accurate(monkeypatch, sizes, options, stateful, count):
    """Against the float64 loop, by the error of `xla`."""

    def plan(direction, heads, length, key_dim, value_dim, **kind):
        return pieces.chosen(direction, heads, length, value_dim, dict(apart=count), **kind)

    monkeypatch.setattr(pieces, "plan", plan)
    ran, forward = [], few_heads.forward
    monkeypatch.setattr(few_heads, "forward", lambda *args, **options: ran.append(1) or forward(*args, **options))
    inputs, cotangent = rounded(value_dim=128, batch=1, **sizes)
    if not stateful:
        inputs.pop("initial_state")

    def run(implementation, inputs):
        results = efla_attention(**inputs, implementation=implementation, **options)
        return dict(zip(("output", "state"), map(np.asarray, results), strict=True))

    want = evaluate(inputs, np.float64, implementation="scan", cotangent=cotangent, **options)
    want = {name: want[name] for name in ("output", "state")}
    got, theirs = (errors(run(name, inputs), want) for name in ("pallas_gpu", "xla"))
    assert ran
    assert {name: error for name, error in got.items() if error > FACTOR * theirs[name]} == {}, theirs
