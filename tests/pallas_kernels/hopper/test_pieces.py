"""Long rows of few heads: which kernels run, in how many pieces, the chain over them, and the op as without them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper import blocks, op, pieces
from pallas_kernels.hopper.chain import chain, split
from pallas_kernels.hopper.pieces import Plan
from tests.pallas_kernels.hopper.helpers import assert_accurate, documents, rounded


@pytest.mark.parametrize(
    ("heads", "length", "count"),
    [
        (128, 2048, 1),
        (64, 4096, 2),
        (34, 8192, 2),
        (33, 8192, 4),
        (16, 16384, 8),
        (8, 8192, 16),
        (1, 1024, 2),
        (1, 448, 1),
    ],
)
def test_fill(heads, length, count):
    """What fills 132 multiprocessors, in pieces of at least 8 chunks."""
    assert pieces.fill(heads, length) == count


@pytest.mark.parametrize(
    ("direction", "heads", "length", "value_dim", "want"),
    [
        ("both", 128, 2048, 128, Plan(True, 32, 32)),
        ("both", 64, 4096, 128, Plan(True, 64, 32)),  # of two pieces no map is needed
        ("forward", 64, 4096, 128, Plan(True, 64, 64, apart=64)),
        ("forward", 32, 8192, 128, Plan(False, 128, 128)),  # the scan alone takes no longer
        ("both", 32, 8192, 128, Plan(False, 64, 32)),
        ("forward", 16, 16384, 128, Plan(False, 64, 64)),
        ("forward", 16, 16384, 64, Plan(False, 32, 32)),
        ("both", 16, 16000, 128, Plan(False, 64, 32)),  # the last piece is shorter
        ("both", 16, 1, 128, Plan(True, 1, 1)),
    ],
)
def test_plan(direction, heads, length, value_dim, want):
    assert pieces.plan(direction, heads, length, 128, value_dim) == want


def test_a_measured_count_comes_first(monkeypatch):
    monkeypatch.setattr(blocks, "lookup", lambda *args: {"pieces": 4})
    assert pieces.plan("both", 128, 2048, 128, 128) == Plan(False, 16, 8)


@pytest.mark.parametrize(
    ("heads", "measured", "want"),
    [
        (32, {"apart": 1}, Plan(False, 128, 128, apart=128)),
        (32, {"apart": 3}, Plan(False, 128, 128, apart=43)),
        (64, {"pieces": 2}, Plan(True, 128, 128)),
        (32, {}, Plan(False, 128, 128)),
    ],
    ids=str,
)
def test_states_and_outputs_apart(monkeypatch, heads, measured, want):
    """As measured. What the kernel of few heads does not serve is cut as if there were no such kernel."""
    monkeypatch.setattr(blocks, "lookup", lambda *args: measured)
    assert pieces.plan("forward", heads, 8192, 128, 128) == want
    assert not pieces.plan("both", heads, 8192, 128, 128).apart


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("given", [True, False])
def test_chain(given):
    """S_end = M S_start + E from piece to piece; the cotangents from the far end by Mᵀ; nearly in float32."""
    random = np.random.default_rng(0)
    count, size = 4, 64
    maps, ends = random.normal(size=(count, size, size)) / 16, random.normal(size=(count, size, size))  # Mᵀ, Eᵀ
    first = random.normal(size=(size, size)) if given else np.zeros((size, size))
    state = jnp.asarray(first, jnp.float32)[None, None] if given else None
    parts = jnp.concatenate(split(jnp.asarray(maps, jnp.float32)), axis=1)[None, None]
    for backward in (False, True):
        got = np.asarray(chain(state, parts, jnp.asarray(ends, jnp.float32)[None, None], backward=backward))[0, 0]
        order = range(count)[::-1] if backward else range(count)
        want, now = np.zeros((count, size, size)), first
        for step, piece in enumerate(order):
            want[piece] = now  # the first one's end is of `first` already
            now = ends[piece] + (now @ (maps[piece].T if backward else maps[piece]) if step else 0)
        np.testing.assert_allclose(got, want, atol=2**-15 * np.abs(want).max())


CASES = [
    pytest.param(dict(length=440), (10, 64, 150, 290), id="exact, documents, a shorter last piece"),
    pytest.param(dict(length=264, decay=True, value_dim=128), None, id="decay, two columns", marks=pytest.mark.slow),
]


def test_borders():
    """Of each piece, the chunks before the last one in which a document begins, and those up to the first such one."""
    starts = (10, 64, 70, 64 * 5 + 63, 64 * 9)
    number = np.searchsorted(starts, np.arange(64 * 10), side="right")
    found: Any = op._borders(jnp.asarray(number[None], jnp.int32), 3)  # chunks 0, 1; 5; none; 9, the only one
    assert np.array_equal(found, [[[1, 2, 0, 0]], [[1, 3, 3, 1]]])
    without: Any = op._borders(jnp.zeros((1, 64 * 5), jnp.int32), 3)
    assert np.array_equal(without, [[[0, 0]], [[3, 2]]])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("sizes", "starts"), CASES)
def test_op_in_pieces(monkeypatch, sizes, starts):
    """Four pieces, forward and backward, states at both ends given."""
    monkeypatch.setattr(pieces, "SHORTEST", 1)
    monkeypatch.setattr(pieces, "PROCESSORS", 4)
    inputs, cotangent = rounded(batch=1, **sizes)
    assert pieces.fill(1, sizes["length"]) == 4
    ids = None if starts is None else documents(starts, *inputs["key"].shape[:2])
    assert_accurate(inputs, cotangent, segment_ids=ids)


@pytest.mark.usefixtures("interpreted")
def test_op_in_two_pieces(monkeypatch):
    """Only the backward pass is in pieces; no map is made."""
    monkeypatch.setattr(pieces, "SHORTEST", 1)
    monkeypatch.setattr(pieces, "PROCESSORS", 2)
    inputs, cotangent = rounded(batch=1, length=192)
    assert_accurate(inputs, cotangent)
