"""Long rows of few heads in pieces: how many, the chain over them, and the op as without them."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper import blocks, pieces
from tests.pallas_kernels.hopper.helpers import assert_accurate, documents, rounded


@pytest.mark.parametrize(
    ("heads", "length", "count"),
    [
        (128, 2048, 1),
        (64, 4096, 1),
        (34, 8192, 1),
        (33, 8192, 4),
        (16, 16384, 8),
        (8, 8192, 16),
        (1, 1024, 4),
        (1, 960, 1),
    ],
)
def test_count(heads, length, count):
    """What fills 132 multiprocessors, in pieces of at least 4 chunks, unless that gains less than it costs."""
    assert pieces.count("forward", heads, length, 128, 128) == count


def test_a_measured_count_comes_first(monkeypatch):
    monkeypatch.setattr(blocks, "lookup", lambda *args: {"pieces": 2})
    assert pieces.count("forward", 128, 2048, 128, 128) == 2


@pytest.mark.parametrize("axes", [(), (3,), (2, 3)])
def test_folds_are_inverse(axes):
    x = np.arange(2 * 12 * np.prod(axes, dtype=int)).reshape(2, 12, *axes)
    assert np.array_equal(pieces.unfold(pieces.fold(x, 4), 4), x)
    assert np.array_equal(pieces.fold(x, 4)[1], x[0, 3:6])
    by_head = np.arange(2 * 5 * 12 * np.prod(axes, dtype=int)).reshape(2, 5, 12, *axes)
    folded = pieces.fold_heads(jnp.asarray(by_head), 4)
    assert np.array_equal(folded[1, 2], by_head[0, 2, 3:6])
    assert np.array_equal(pieces.unfold_heads(folded, 4), by_head)


@pytest.mark.parametrize("given", [True, False])
def test_chain(given):
    """S_end = M S_start + E from piece to piece; the cotangents from the far end by Mᵀ."""
    random = np.random.default_rng(0)
    maps, ends = random.normal(size=(4, 1, 5, 5)), random.normal(size=(4, 1, 3, 5))  # of two rows in two pieces: Mᵀ, Eᵀ
    first = random.normal(size=(2, 1, 3, 5)) if given else np.zeros((2, 1, 3, 5))
    state = jnp.asarray(first, jnp.float32) if given else None
    arrays = jnp.asarray(maps, jnp.float32), jnp.asarray(ends, jnp.float32)
    starts, last = pieces.chain(state, arrays[0], arrays[1], 2)
    back, front = pieces.chain(state, arrays[0], arrays[1], 2, backward=True)
    for row in range(2):
        through, end = maps[2 * row : 2 * row + 2, 0], ends[2 * row : 2 * row + 2, 0]
        middle = first[row, 0] @ through[0] + end[0]
        np.testing.assert_allclose(starts[2 * row + 1, 0], middle, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(last[row, 0], middle @ through[1] + end[1], rtol=1e-5, atol=1e-5)
        middle = first[row, 0] @ through[1].T + end[1]
        np.testing.assert_allclose(back[2 * row, 0], middle, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(front[row, 0], middle @ through[0].T + end[0], rtol=1e-5, atol=1e-5)


CASES = {
    "exact, documents": (dict(length=256), (10, 64, 150)),
    "decay, padded to whole pieces": (dict(length=264, decay=True, value_dim=128), None),
}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("sizes", "starts"), CASES.values(), ids=CASES)
def test_op_in_pieces(monkeypatch, sizes, starts):
    """Four pieces of a chunk each, forward and backward, states at both ends given."""
    monkeypatch.setattr(pieces, "SHORTEST", 1)
    monkeypatch.setattr(pieces, "PROCESSORS", 4)
    inputs, cotangent = rounded(batch=1, **sizes)
    assert pieces.count("forward", 1, sizes["length"], 64, 64) == 4
    ids = None if starts is None else documents(starts, *inputs["key"].shape[:2])
    assert_accurate(inputs, cotangent, segment_ids=ids)
