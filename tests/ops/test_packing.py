"""Packed documents: nothing of one enters another, not even by rounding."""

import numpy as np
import pytest

from tests.ops.helpers import EPS, assert_accurate, cotangents, draw, errors, evaluate, reordered

LENGTH, CHUNK = 64, 16
# starts of the documents of a row: inside chunks, on their borders, of length 1, over several chunks
BORDERS = {
    "inside chunks": (0, 5, 21, 60),
    "on chunk borders": (0, 16, 32, 48),
    "length 1": (0, 15, 16, 17, 18, 40, 63),
    "over chunks": (0, 10),
}
CASES = pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["scan", "xla"])
DECAYS = pytest.mark.parametrize("decay", [False, True], ids=["no decay", "decay"])


def ids_of(borders, length=LENGTH):
    """[2, T] ids; the second row is one document, so that rows differ."""
    ids = np.searchsorted(borders, np.arange(length), side="right")
    return np.stack([ids, np.ones_like(ids)]).astype(np.int32)


def run(inputs, implementation, ids, cotangent=None):
    return evaluate(inputs, segment_ids=ids, implementation=implementation, chunk_size=CHUNK, cotangent=cotangent)


@CASES
@DECAYS
@IMPLEMENTATIONS
def test_no_leak(implementation, decay, borders):
    """Everything of one document, cotangents too, is replaced: no bit of any other changes, forward or backward."""
    inputs, ids = draw(length=LENGTH, decay=decay), ids_of(borders)
    other = draw(seed=9, length=LENGTH, decay=decay, norm2=20.0)
    (d_out, d_state), (other_d_out, other_d_state) = cotangents(inputs), cotangents(inputs, seed=8)
    before = run(inputs, implementation, ids, (d_out, d_state))
    last = ids[0, -1]
    for document in range(1, last + 1):
        inside = np.zeros(ids.shape, bool)
        inside[0] = ids[0] == document
        mix = lambda x, y, inside=inside: np.where(inside[..., *[None] * (x.ndim - 2)], y, x)
        changed = {name: mix(x, other[name]) for name, x in inputs.items() if name != "initial_state"}
        changed["initial_state"], new_d_state = inputs["initial_state"].copy(), d_state.copy()
        if document == 1:
            changed["initial_state"][0] = other["initial_state"][0]
        if document == last:
            new_d_state[0] = other_d_state[0]
        after = run(changed, implementation, ids, (mix(d_out, other_d_out), new_d_state))
        for name, x in before.items():
            if name in ("state", "d_initial_state"):
                mine = document == (last if name == "state" else 1)
                same = np.array([not mine, True])
            else:
                same = ~inside
            np.testing.assert_array_equal(after[name][same], x[same], err_msg=f"{name}, document {document}")
            assert np.all(same) or np.any(after[name][~same] != x[~same])


@CASES
@DECAYS
def test_accurate(decay, borders):
    assert_accurate(draw(length=LENGTH, decay=decay), segment_ids=ids_of(borders), chunk_size=CHUNK)


@DECAYS
@IMPLEMENTATIONS
def test_packed_is_separate(implementation, decay):
    """A packed row equals its documents called one by one; initial and final state belong to the first and the last."""
    length, borders = 63, (0, 21, 42)
    inputs = draw(batch=1, length=length, decay=decay)
    d_out, d_state = cotangents(inputs)
    got = run(inputs, implementation, ids_of(borders, length)[:1], (d_out, d_state))
    for start, stop in zip(borders, (*borders[1:], length), strict=True):
        part = {name: x[:, start:stop] for name, x in inputs.items() if name != "initial_state"}
        part["initial_state"] = inputs["initial_state"] * (start == 0)
        want = run(part, implementation, None, (d_out[:, start:stop], d_state * (stop == length)))
        mine = {name: x[:, start:stop] for name, x in got.items() if not name.endswith("state")}
        mine |= {"d_initial_state": got["d_initial_state"]} if start == 0 else {}
        mine |= {"state": got["state"]} if stop == length else {}
        want = {name: want[name] for name in mine}
        assert max(errors(mine, want).values()) < max(reordered(), 40 * EPS if implementation == "xla" else 0)


@IMPLEMENTATIONS
def test_every_change_resets(implementation):
    """0, 1, 0 are three documents, and 0 is an id like any other; the initial state goes with token 0's."""
    inputs, length = draw(length=30), 30
    once, twice = np.zeros((2, length), np.int32), np.zeros((2, length), np.int32)
    once[:, 10:20] = 1
    twice[:, 10:], twice[:, 20:] = 7, -3
    got, want = (run(inputs, implementation, ids) for ids in (once, twice))
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x)
    one, none = run(inputs, implementation, np.full((2, length), 5, np.int32)), run(inputs, implementation, None)
    assert max(errors(one, none).values()) < reordered()
    assert errors(got, none)["output"] > 0.1
