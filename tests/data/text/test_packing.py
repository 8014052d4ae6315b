"""Packing: every pair once, none across documents; windows that score every pair once; through the pipeline."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from efla_jax.data.pipeline import batches
from efla_jax.data.text.packing import PackedRows, evaluation_windows
from efla_jax.data.text.store import TokenStore

SEPARATOR = 7
FIRST = 100  # tokens count up from here, so that each names its place
LENGTHS = st.lists(st.integers(0, 30), max_size=40).filter(any)  # a store has a token


def make_store(lengths):
    """A store of documents of these lengths, no token twice."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenStore(np.arange(FIRST, FIRST + offsets[-1], dtype=np.uint32), offsets, 0, 0)


def pairs_of(store):
    """The (input, target) pairs of each document, by the definition."""
    documents = []
    for begin, end in itertools.pairwise(store.offsets):
        line = [SEPARATOR, *store.tokens[begin:end].tolist(), SEPARATOR]
        documents.append(list(itertools.pairwise(line)))
    return documents


def rows_of(source, length):
    rows = [source[i] for i in range(len(source))]
    for row in rows:
        assert sorted(row) == ["inputs", "segment_ids", "targets"]
        assert all((values.shape, values.dtype) == ((length,), np.int32) for values in row.values())
    return rows


def segments(row):
    """The pairs of each segment of a row in order; padding's targets are -1. Ids must count up from 0."""
    ids = row["segment_ids"]
    assert ids[0] == 0
    assert set(np.diff(ids).tolist()) <= {0, 1}
    pairs = np.stack([row["inputs"], row["targets"]], axis=1)
    return [[tuple(pair) for pair in pairs[ids == i].tolist()] for i in range(ids[-1] + 1)]


def unpacked(rows):
    """The documents in rows, each put together again from its segments, without the padding of the last row."""
    documents = []
    for number, row in enumerate(rows):
        parts = segments(row)
        if number == len(rows) - 1 and parts[-1][-1][1] == -1:
            assert set(parts.pop()) == {(SEPARATOR, -1)}, "the padding has another segment's pairs"
        for i, part in enumerate(parts):
            begins = part[0][0] == SEPARATOR
            assert begins or (i == 0 and number > 0), "a segment begins inside a document"
            if begins:
                documents.append([])
            documents[-1] += part
    return documents


@given(LENGTHS, st.integers(2, 40), st.none() | st.integers(0, 3))
@example([0, 1, 0], 2, None)
@example([1], 2, 0)  # exactly one row
@example([0, 0, 0, 0, 3, 0], 3, 1)
@example([50], 7, None)
@settings(deadline=None, max_examples=300)
def test_every_pair_once_and_none_across_documents(lengths, length, seed):
    store = make_store(lengths)
    source = PackedRows(store, length, SEPARATOR, seed)
    rows = rows_of(source, length)
    assert len(rows) == -(-(sum(lengths) + len(lengths)) // length)
    found, expected = unpacked(rows), pairs_of(store)
    assert all((row["targets"] >= 0).all() for row in rows[:-1]), "a row but the last is padded"
    assert found == expected if seed is None else sorted(found) == sorted(expected)


def test_a_row_by_hand():
    rows = rows_of(PackedRows(make_store([2, 0, 3]), 5, SEPARATOR, None), 5)
    assert [{name: values.tolist() for name, values in row.items()} for row in rows] == [
        {"inputs": [7, 100, 101, 7, 7], "targets": [100, 101, 7, 7, 102], "segment_ids": [0, 0, 0, 1, 2]},
        {"inputs": [102, 103, 104, 7, 7], "targets": [103, 104, 7, -1, -1], "segment_ids": [0, 0, 0, 1, 1]},
    ]


def first_tokens(store, seed):
    """The first token of each document, in the order that `seed` draws."""
    rows = rows_of(PackedRows(store, 16, SEPARATOR, seed), 16)
    return [int(pair[1]) for document in unpacked(rows) for pair in document[:1]]


def test_the_seed_draws_the_order_of_documents():
    store = make_store([5] * 50)
    orders = [first_tokens(store, seed) for seed in (None, 0, 0, 1)]
    assert orders[0] == list(range(FIRST, FIRST + 250, 5))
    assert orders[1] == orders[2]
    assert len({tuple(order) for order in orders}) == 3
    # Each document anywhere: not only its neighbours' places.
    assert np.abs(np.argsort(orders[1]) - np.arange(50)).max() > 20


def test_tokens_of_16_bits():
    store = TokenStore(np.array([65535, 3], np.uint16), np.array([0, 2], np.int64), 0, 0)
    row = PackedRows(store, 3, 65534)[0]
    assert row["inputs"].tolist() == [65534, 65535, 3]
    assert row["targets"].tolist() == [65535, 3, 65534]


@pytest.mark.parametrize("length", [1, 0, -3])
def test_length_must_be_two(length):
    for make in (
        lambda: PackedRows(make_store([3]), length, 0),
        lambda: evaluation_windows(make_store([3]), length, 1, 0),
    ):
        with pytest.raises(ValueError, match=f"length is {length}; it must be at least 2"):
            make()


@pytest.mark.parametrize("stride", [0, 9, -1])
def test_stride_must_be_in_range(stride):
    with pytest.raises(ValueError, match=rf"stride is {stride}; it must be in \[1, 8\]"):
        evaluation_windows(make_store([3]), 8, stride, 0)


@pytest.mark.parametrize("index", [-1, 3])
def test_rows_that_are_not_there(index):
    for source in (PackedRows(make_store([8, 8]), 6, 0), evaluation_windows(make_store([8, 4]), 6, 5, 0)):
        with pytest.raises(IndexError, match=rf"index is {index}; it must be in \[0, 3\)"):
            source[index]


def windows_by_definition(pairs, length, stride):
    """(pairs of the window, how many of them were scored before), for one document."""
    start = scored = 0
    while True:
        end = min(start + length, len(pairs))
        yield pairs[start:end], scored - start
        scored = end
        if end == len(pairs):
            return
        start += stride


@given(LENGTHS, st.integers(2, 20), st.data())
@settings(deadline=None, max_examples=300)
def test_windows(lengths, length, data):
    stride = data.draw(st.integers(1, length))
    store = make_store(lengths)
    rows = rows_of(evaluation_windows(store, length, stride, SEPARATOR), length)
    documents = pairs_of(store)
    expected = [window for pairs in documents for window in windows_by_definition(pairs, length, stride)]
    scored = []
    for row, (window, seen) in zip(rows, expected, strict=True):
        parts = segments(row)
        assert len(parts) == 1 + (len(window) < length)
        assert set(parts[1] if len(parts) > 1 else []) <= {(SEPARATOR, -1)}
        assert [pair[0] for pair in parts[0]] == [pair[0] for pair in window]
        assert [pair[1] for pair in parts[0]] == [-1] * seen + [pair[1] for pair in window[seen:]]
        scored += [pair for pair in parts[0] if pair[1] >= 0]
    assert scored == [pair for pairs in documents for pair in pairs], "a pair is not scored exactly once"


def test_windows_that_do_not_overlap_score_all_they_hold():
    source = evaluation_windows(make_store([20, 3]), 8, 8, SEPARATOR)
    targets = [source[i]["targets"] for i in range(len(source))]
    assert [(row >= 0).sum() for row in targets] == [8, 8, 5, 4]


def test_every_epoch_of_batches_has_every_pair_once():
    store = make_store([5, 0, 17, 2, 9, 30])
    source = PackedRows(store, 4, SEPARATOR, 1)
    data = batches(source, batch_size=len(source), seed=3)
    expected = sorted(pair for pairs in pairs_of(store) for pair in pairs)
    epochs = [next(data) for _ in range(2)]
    for batch in epochs:
        kept = batch["targets"] >= 0
        assert sorted(zip(batch["inputs"][kept].tolist(), batch["targets"][kept].tolist(), strict=True)) == expected
    assert (epochs[0]["inputs"] != epochs[1]["inputs"]).any(), "two epochs have one order"


def stream(count, **options):
    """The first `count` batches, and the iterator behind them."""
    data = batches(PackedRows(make_store([5, 0, 17, 2, 9, 30]), 4, SEPARATOR, 1), batch_size=4, seed=3, **options)
    return [next(data) for _ in range(count)], data


def assert_equal(batches_a, batches_b):
    for a, b in zip(batches_a, batches_b, strict=True):
        for name in ("inputs", "targets", "segment_ids"):
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("step", [1, 4, 7])  # an epoch is 69 pairs, 18 rows, 4½ batches
def test_batches_resume_exactly(step):
    whole, _ = stream(12)
    _, stopped = stream(step)
    _, again = stream(0)
    again.set_state(stopped.get_state())
    assert_equal([next(again) for _ in range(12 - step)], whole[step:])


def test_batches_are_shared_by_two_processes():
    whole, _ = stream(12)
    parts = [stream(12, process_index=i, process_count=2)[0] for i in range(2)]
    together = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts, strict=True)]
    assert_equal(together, whole)
