"""Rows of prediction pairs: documents packed for training, sliding windows for evaluation.

A document of n tokens is n + 1 pairs (input, target): separator → t1, t1 → t2, …, tn → separator. A row of T is

    {"inputs": int32 [T], "targets": int32 [T], "segment_ids": int32 [T]}

where a target is -1 if nothing is to be predicted. Segment ids count a row's documents from 0. A row is padded with
the separator as input, -1 as target, and a segment id that no document of the row has.
"""

import operator
from dataclasses import dataclass

import numpy as np

from efla_jax.data.text.store import TokenStore

type Record = dict[str, np.ndarray]


class PackedRows:
    """A random-access source of rows of `length` pairs that hold every pair of every document exactly once.

    Documents follow one another, across the ends of rows too, in an order drawn from `seed` (None: that of the
    store); only the last row is padded. Making it takes about 24 bytes of memory a document, a row
    O(length + log documents) time.
    """

    def __init__(self, store: TokenStore, length: int, separator: int, seed: int | None = None):
        _check_length(length)
        order = np.arange(store.documents)
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        self._store = store
        self._length = length
        self._separator = separator
        self._order = order
        self._starts = _sums(np.diff(store.offsets)[order] + 1)  # of each document's pairs, in that order

    def __len__(self) -> int:
        return -(-int(self._starts[-1]) // self._length)

    def __getitem__(self, index: int) -> Record:
        start = _checked(index, len(self)) * self._length
        stop = min(start + self._length, int(self._starts[-1]))
        first, last = np.searchsorted(self._starts, (start, stop - 1), side="right") - 1
        borders = self._starts[first : last + 2].clip(start, stop)
        segment_ids = np.repeat(np.arange(last + 1 - first), np.diff(borders))
        rank = first + segment_ids
        inputs, targets = _pairs(
            self._store, self._separator, self._order[rank], np.arange(start, stop) - self._starts[rank]
        )
        return _row(inputs, targets, segment_ids, self._length, self._separator)


@dataclass(frozen=True, eq=False)
class EvaluationWindows:
    """A random-access source of rows of `length`: the windows of `evaluation_windows`."""

    store: TokenStore
    length: int
    stride: int
    separator: int
    starts: np.ndarray  # int64 [documents + 1], the number of windows before each document's

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Record:
        index = _checked(index, len(self))
        document = int(np.searchsorted(self.starts, index, side="right")) - 1
        window = index - int(self.starts[document])
        start = window * self.stride
        pairs = int(self.store.offsets[document + 1] - self.store.offsets[document]) + 1
        place = np.arange(start, min(start + self.length, pairs))
        inputs, targets = _pairs(self.store, self.separator, np.full_like(place, document), place)
        if window:
            targets[: self.length - self.stride] = -1  # scored in the window before
        return _row(inputs, targets, np.zeros_like(place), self.length, self.separator)


def evaluation_windows(store: TokenStore, length: int, stride: int, separator: int) -> EvaluationWindows:
    """Windows of at most `length` pairs of one document, each `stride` after the one before, up to its last pair.

    Only pairs that no earlier window holds have a target: every pair is scored once, and where a document is longer
    than `length` all but those of its first window have at least length - stride pairs before them. With
    stride = length the windows do not overlap. Each is padded to `length`.
    """
    _check_length(length)
    if not 1 <= stride <= length:
        raise ValueError(f"stride is {stride}; it must be in [1, {length}], length's range")
    beyond = np.maximum(np.diff(store.offsets) + 1 - length, 0)
    return EvaluationWindows(store, length, stride, separator, _sums(1 + -(-beyond // stride)))


def _pairs(store: TokenStore, separator: int, document: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, int32 [N], of the pairs at `place` in `document`, both int64 [N]."""
    begin, end = store.offsets[document], store.offsets[document + 1]
    target = begin + place
    # Where the index leaves the document, and maybe the array, the separator stands instead.
    inputs = np.where(place == 0, separator, store.tokens.take(target - 1, mode="clip"))
    targets = np.where(target == end, separator, store.tokens.take(target, mode="clip"))
    return inputs.astype(np.int32), targets.astype(np.int32)


def _row(inputs: np.ndarray, targets: np.ndarray, segment_ids: np.ndarray, length: int, separator: int) -> Record:
    """The record, padded to `length`."""

    def padded(values: np.ndarray, value: int) -> np.ndarray:
        row = np.full(length, value, np.int32)
        row[: len(values)] = values
        return row

    return {
        "inputs": padded(inputs, separator),
        "targets": padded(targets, -1),
        "segment_ids": padded(segment_ids, segment_ids[-1] + 1),
    }


def _sums(counts: np.ndarray) -> np.ndarray:
    """The sums of the counts before each, and that of all: int64 [N + 1]."""
    sums = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums


def _check_length(length: int) -> None:
    if length < 2:
        raise ValueError(f"length is {length}; it must be at least 2")


def _checked(index: int, size: int) -> int:
    index = operator.index(index)
    if not 0 <= index < size:
        raise IndexError(f"index is {index}; it must be in [0, {size})")
    return index
