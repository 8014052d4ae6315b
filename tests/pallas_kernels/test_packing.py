"""Bit for bit: documents that do not see each other, chunks that go on where others stopped, runs that repeat."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax import efla_attention
from tests.ops.helpers import evaluate
from tests.pallas_kernels.hopper.helpers import documents, rounded, too_far

pytestmark = pytest.mark.usefixtures("interpreted")

STARTS, LENGTH = (1, 40, 70), 130  # a border behind the first token, two inside one chunk and its neighbour
ON_TPU, SLOW = pytest.mark.cpu("interpreted as TPU kernels"), pytest.mark.slow


# The exact rule with decay writes otherwise than it erases; the others have one coefficient a token.
@pytest.mark.parametrize(
    ("implementation", "dtype", "decay", "integrator"),
    [
        ("pallas_gpu", jnp.bfloat16, True, "exact"),
        ("pallas_gpu", jnp.bfloat16, True, "split"),
        pytest.param("pallas_gpu", jnp.bfloat16, False, "exact", marks=SLOW),
        pytest.param("pallas_tpu", jnp.bfloat16, True, "exact", marks=ON_TPU),
        pytest.param("pallas_tpu", np.float32, True, "split", marks=[ON_TPU, SLOW]),
        pytest.param("pallas_tpu", jnp.bfloat16, False, "exact", marks=[ON_TPU, SLOW]),
    ],
)
def test_no_leak(implementation, dtype, decay, integrator):
    """Everything of one document, cotangents too, is replaced: no bit of any other changes, forward or backward."""
    ids = documents(STARTS, 1, LENGTH)
    sizes = dict(batch=1, length=LENGTH, decay=decay, dtype=dtype)
    inputs, cotangent = rounded(**sizes)
    other, other_cotangent = rounded(9, norm2=20.0, **sizes)
    options = dict(implementation=implementation, segment_ids=ids, integrator=integrator, chunk_size=64)
    run = lambda inputs, cotangent: evaluate(inputs, cotangent=cotangent, **options)
    before = run(inputs, cotangent)
    for name, x in run(inputs, cotangent).items():
        np.testing.assert_array_equal(x, before[name], err_msg=f"{name}, the second time")
    first, last = 0, ids[0, -1]
    for document in (first, 2, last):
        inside = ids == document
        mix = lambda x, y, inside=inside: np.where(inside[..., *[None] * (x.ndim - 2)], y, x)
        changed = {name: mix(x, other[name]) for name, x in inputs.items() if name != "initial_state"}
        changed["initial_state"] = (other if document == first else inputs)["initial_state"]
        d_state = (other_cotangent if document == last else cotangent)[1]
        after = run(changed, (mix(cotangent[0], other_cotangent[0]), d_state))
        for name, x in before.items():
            if name in ("state", "d_initial_state"):
                same = np.array([document != (last if name == "state" else first)])
            else:
                same = ~inside
            np.testing.assert_array_equal(after[name][same], x[same], err_msg=f"{name}, document {document}")
            assert np.all(same) or np.any(after[name][~same] != x[~same])


@pytest.mark.parametrize("implementation", ["pallas_gpu", pytest.param("pallas_tpu", marks=[ON_TPU, SLOW])])
def test_goes_on_where_it_stopped(implementation):
    """A sequence in two calls: cut between chunks to the bit, cut elsewhere to rounding."""
    inputs, _ = rounded(batch=1, length=150)
    state = inputs.pop("initial_state")
    attend = partial(efla_attention, implementation=implementation, chunk_size=64)
    call = jax.jit(lambda inputs, state: attend(**inputs, initial_state=state))
    whole = call(inputs, state)
    xla = jax.jit(lambda: efla_attention(**inputs, initial_state=state, implementation="xla"))()
    named = lambda out, state: dict(output=np.asarray(out), state=np.asarray(state))
    for cut in (64, 86):  # 64 + 86 and 86 + 64 tokens: the same two programs
        part = lambda start, stop, state: call({name: x[:, start:stop] for name, x in inputs.items()}, state)
        first, middle = part(0, cut, state)
        second, final = part(cut, 150, middle)
        got = named(np.concatenate([first, second], 1), final)
        if cut == 64:
            for name, x in named(*whole).items():
                np.testing.assert_array_equal(got[name], x)
        else:
            assert not too_far(got, {name: x.astype(np.float64) for name, x in named(*whole).items()}, named(*xla))
