"""Which block size the tuning script writes down."""

import pytest
from absl import app

from experiments.kernels import tune
from pallas_kernels.hopper.decode import default_columns

CHOICES = [dict(columns=64), dict(columns=32), dict(columns=16)]


@pytest.mark.parametrize(
    ("seconds", "columns"),
    [((1.0, 0.9, 0.95), 32), ((1.0, 0.99, 1.2), 64), ((1.0, 1.1, 0.5), 16), ((1.0, 1.0, 1.0), 64)],
    ids=str,
)
def test_best(seconds, columns):
    """The fastest, unless the kernel's own choice is within the margin."""
    assert tune.best(CHOICES[0], CHOICES, list(seconds)) == dict(columns=columns)


@pytest.mark.parametrize("shape", [(1, 1, 16, 128, 128), (256, 8, 16, 64, 192), (256, 1, 16, 256, 256)], ids=str)
def test_own_choice_is_a_candidate(shape):
    own, choices = tune.decode_candidates(shape)
    assert own == dict(columns=default_columns(shape[3], shape[4], shape[0] * shape[2]))
    assert own in choices
    assert all(shape[4] % choice["columns"] == 0 for choice in choices)


@pytest.mark.parametrize(
    ("shape", "own", "all_of_them"),
    [
        ((1, 16384, 16, 64, 64), 8, {1, 4, 8, 16}),
        ((1, 2048, 16, 64, 64), 4, {1, 2, 4}),
        ((8, 2048, 16, 64, 64), 1, {1, 2}),
    ],
    ids=str,
)
def test_pieces_around_the_own_choice(shape, own, all_of_them):
    """Neighbours, but no piece shorter than `pieces.SHORTEST` chunks."""
    assert tune.pieces_candidates("both", shape) == (dict(pieces=own), [dict(pieces=n) for n in sorted(all_of_them)])


def test_few_heads_have_a_kernel_to_try():
    """Of two halves of columns for each head on the card at once, forward."""
    apart = dict(apart=1)
    assert tune.pieces_candidates("forward", (4, 4096, 16, 128, 128))[0] == apart
    assert apart in tune.pieces_candidates("forward", (2, 8192, 16, 128, 128))[1]
    assert tune.pieces_candidates("forward", (2, 8192, 16, 128, 128))[0] == dict(pieces=4)
    assert tune.pieces_candidates("forward", (1, 8192, 8, 128, 128))[0] == dict(apart=8)
    assert dict(apart=4) in tune.pieces_candidates("forward", (1, 16384, 16, 128, 128))[1]
    assert apart not in tune.pieces_candidates("both", (4, 4096, 16, 128, 128))[1]
    assert apart not in tune.pieces_candidates("forward", (8, 2048, 16, 128, 128))[1]


def test_measured_in_turns():
    """One call each to compile, then round after round."""
    calls = []
    seconds = tune.measure([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3)
    assert calls == ["a", "b"] * 4
    assert len(seconds) == 2


def test_shape():
    assert tune._shape("1x2x16x128x64") == (1, 2, 16, 128, 64)
    for text in ("1x2x3x4", "0x1x1x1x1", "axbxcxdxe"):
        with pytest.raises(app.UsageError, match="BxTxHxKxV"):
            tune._shape(text)
