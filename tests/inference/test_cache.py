"""Prefill in parts and decoding are one forward pass, for every mixer, in rows of different lengths."""

import dataclasses

import jax
import numpy as np
import pytest

from efla_jax.inference.prefill import pieces, prefill
from efla_jax.inference.programs import read_slot, write_slot
from efla_jax.models.language_model import MIXERS
from tests.inference.small import COMPILED, HYBRID, SMALL, draw_tokens, full_logits, parameters, programs, rounding

CONFIGS = {name: dataclasses.replace(SMALL, mixers=(name,)) for name in MIXERS} | {"hybrid": HYBRID}
# (length of the program, tokens of each row): longer than the window and the convolution, and shorter
CALLS = (
    (8, (8, 5, 0, 1)),
    (8, (3, 8, 8, 0)),
    (1, (1, 1, 0, 1)),
    (1, (1, 0, 1, 1)),
    (8, (8, 1, 7, 2)),
    (1, (1, 1, 1, 1)),
)


def close(config, got, want):
    """To float32 rounding: that of every parameter once moves the logits half as far."""
    np.testing.assert_allclose(got, want, rtol=0, atol=2 * rounding(config))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parts_are_one_forward_pass(config):
    served, params, tokens = programs(config, (4,), (1, 8)), parameters(config), draw_tokens(4, 23)
    want = full_logits(config, tokens)
    assert np.std(want) > 1
    cache, position = served.empty_cache(4), np.zeros(4, int)
    for size, counts in CALLS:
        given = np.full((4, size), 7, np.int32)  # what stands behind a row's tokens must not matter
        for row, count in enumerate(counts):
            given[row, :count] = tokens[row, position[row] : position[row] + count]
        logits, cache = served.forward(params, given, np.array(counts, np.int32), cache)
        position += counts
        for row in np.flatnonzero(counts):
            close(config, logits[row], want[row, position[row] - 1])
    assert position.tolist() == [22, 16, 17, 6]


def test_a_row_without_tokens_keeps_its_cache():
    served, params = programs(HYBRID), parameters(HYBRID)
    fill = lambda cache: jax.tree.map(lambda x: x + np.ones((), x.dtype), cache)
    lengths = np.array([0, 3, 0, 4], np.int32)
    _, cache = served.forward(params, draw_tokens(4, 8), lengths, fill(served.empty_cache(4)))
    for old, new in zip(jax.tree.leaves(fill(served.empty_cache(4))), jax.tree.leaves(cache), strict=True):
        old, new = np.asarray(old), np.asarray(new)
        np.testing.assert_array_equal(new[[0, 2]], old[[0, 2]])
        assert np.any(new[1] != old[1])
        assert np.any(new[3] != old[3])


@pytest.mark.parametrize(
    ("length", "lengths", "want"),
    [
        (0, (1, 4, 8), []),
        (1, (1, 4, 8), [1]),
        (2, (1, 4, 8), [4]),
        (8, (1, 4, 8), [8]),
        (9, (1, 4, 8), [8, 1]),
        (21, (1, 4, 8), [8, 8, 8]),
        (3, (1,), [1, 1, 1]),
    ],
)
def test_pieces(length, lengths, want):
    assert pieces(length, lengths) == want


def test_prompts_of_any_lengths_are_prefilled_together():
    """One in many pieces, one in the first of them alone; three rows in a program of four."""
    tokens = draw_tokens(3, 30)
    lengths = (30, 10, 1)
    logits, cache = prefill(
        programs(HYBRID), parameters(HYBRID), [row[:n] for row, n in zip(tokens, lengths, strict=True)], [None] * 3
    )
    assert logits.shape == (4, HYBRID.vocab_size)
    want = full_logits(HYBRID, tokens)
    for row, length in enumerate(lengths):
        close(HYBRID, logits[row], want[row, length - 1])
    # the cache goes on
    logits, _ = programs(HYBRID).forward(
        parameters(HYBRID), np.pad(tokens[:, 10:11], ((0, 1), (0, 0))), np.array([0, 1, 0, 0], np.int32), cache
    )
    close(HYBRID, logits[1], want[1, 10])


def test_slots_are_read_and_written_by_index():
    served, params = programs(HYBRID), parameters(HYBRID)
    _, cache = served.forward(params, draw_tokens(4, 8), np.array([4, 3, 2, 1], np.int32), served.empty_cache(4))
    host = jax.tree.map(np.asarray, jax.device_get(cache))
    row = read_slot(cache, 2)
    jax.tree.map(lambda got, want: np.testing.assert_array_equal(got, want[2:3]), row, host)
    moved = write_slot(cache, row, 1)
    expected = jax.tree.map(lambda leaf: leaf[[0, 2, 2, 3]], host)
    jax.tree.map(np.testing.assert_array_equal, moved, expected)
    COMPILED.clear()
    moved = write_slot(moved, read_slot(moved, 0), 3)
    assert COMPILED == []  # the index is no constant of a program
    jax.tree.map(np.testing.assert_array_equal, moved, jax.tree.map(lambda leaf: leaf[[0, 2, 2, 0]], host))
