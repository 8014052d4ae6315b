"""Softmax attention: its equation in NumPy, the window, documents, the ring of the cache, ragged rows, bad options."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efla_jax.layers import AttentionConfig, SoftmaxAttention
from efla_jax.layers.attention import rotate

FEATURES, LENGTH = 6, 13
SMALL = AttentionConfig(heads=4, head_dim=6, rope_base=50.0)  # turns far within LENGTH, in every pair
CASES = {
    "whole context": (SMALL, 64),
    "window, grouped heads": (dataclasses.replace(SMALL, key_value_heads=2), 4),
    "one key head": (dataclasses.replace(SMALL, key_value_heads=1, heads=3, head_dim=2), LENGTH),
}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
WINDOW = CASES["window, grouped heads"]


def draw(seed=0, batch=2, length=LENGTH):
    x = np.random.default_rng(seed).normal(size=(batch, length, FEATURES))
    return jnp.asarray(3 * x, jnp.float32)  # weights far from uniform


@functools.cache
def make(case, **options):
    """Not jitted: what draws parameters is compiled once for all layers with the same shapes."""
    config, reach = case
    return SoftmaxAttention(FEATURES, config, reach, rngs=nnx.Rngs(5), **options)


@nnx.jit
def apply(layer, x, cache=None, ids=None, lengths=None):
    return layer(x, cache=cache, segment_ids=ids, lengths=lengths)


def close(got, want, tolerance=1e-4):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def numpy_attention(layer, x, case):
    """One row [T, E] -> [T, E], token by token in float64, rotary positions as complex numbers."""
    config, reach = case
    x = np.asarray(x, np.float64)
    weight = lambda part: np.asarray(part.kernel[...], np.float64)
    q, k, v = (
        (x @ weight(part)).reshape(len(x), -1, config.head_dim) for part in (layer.query, layer.key, layer.value)
    )
    half = config.head_dim // 2
    turn = lambda y, t: (
        (y[:, :half] + 1j * y[:, half:]) * np.exp(1j * t * config.rope_base ** (-np.arange(half) / half))
    )
    heads, key_heads = q.shape[1], k.shape[1]
    assert (heads, key_heads) == (config.heads, config.key_value_heads or config.heads)
    rows = []
    for t in range(len(x)):
        seen = range(max(0, t - reach + 1), t + 1)
        out = []
        for head in range(heads):
            shared = head // (heads // key_heads)
            scores = [(turn(q[t], t)[head] * turn(k[s], s)[shared].conj()).real.sum() for s in seen]
            weights = np.exp(np.array(scores) / np.sqrt(config.head_dim))
            out.append(weights / weights.sum() @ np.stack([v[s, shared] for s in seen]))
        rows.append(np.concatenate(out))
    return np.stack(rows) @ weight(layer.out)


@EACH
def test_is_its_equation(case):
    layer, x = make(case), draw()
    y, cache = apply(layer, x)
    assert cache is None
    for row in range(len(x)):
        close(y[row], numpy_attention(layer, x[row], case))


def test_reaches_back_a_window_that_counts_the_token_itself():
    layer = make(WINDOW)
    gradient = jax.jit(jax.jacobian(lambda x: layer(x)[0].sum(axis=(0, 2))))(draw(batch=1))  # [T, 1, S, E]
    reach = np.any(np.asarray(gradient) != 0, axis=(1, 3))
    to, of = np.indices(reach.shape)
    np.testing.assert_array_equal(reach, (of <= to) & (to - of < 4))


def test_rotation_keeps_its_type_and_is_exact_far_out():
    """The angle of position 30,000 needs float32, whatever the type of the keys."""
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    position = jnp.full((1, 1), 30_000)
    turned = rotate(x, position, 100.0)
    assert turned.dtype == jnp.bfloat16
    want = (1 + 1j) * np.exp(1j * 30_000 * np.array([1.0, 0.1]))
    close(np.asarray(turned[0, 0, 0], np.float64), np.concatenate([want.real, want.imag]), 0.01)


# ---- documents ----

IDS = np.array([[1] * 2 + [2] * 7 + [1] * 4, [0] * LENGTH], np.int32)  # the third document has an id seen before
BORDERS = (0, 2, 9, LENGTH)


@pytest.mark.parametrize("case", [CASES["whole context"], WINDOW], ids=["whole context", "window"])
def test_packed_documents_are_attended_one_by_one(case):
    layer, x = make(case), draw()
    packed, _ = apply(layer, x, None, jnp.asarray(IDS))
    parts = [numpy_attention(layer, x[0, start:stop], case) for start, stop in itertools.pairwise(BORDERS)]
    close(packed[0], np.concatenate(parts))
    close(packed[1], numpy_attention(layer, x[1], case))


def test_no_bit_of_a_document_enters_another():
    layer = make(CASES["whole context"])

    @jax.jit
    def run(x, cotangent):
        y, pullback = jax.vjp(lambda x: layer(x, segment_ids=jnp.asarray(IDS[:1]))[0], x)
        return y, pullback(cotangent)[0]

    x, cotangent, other = draw(0, batch=1), draw(1, batch=1), draw(2, batch=1)
    before = run(x, cotangent)
    for start, stop in itertools.pairwise(BORDERS):
        inside = np.zeros((1, LENGTH, 1), bool)
        inside[:, start:stop] = True
        after = run(jnp.where(inside, 3 * other, x), jnp.where(inside, other, cotangent))
        for old, new in zip(before, after, strict=True):
            same = ~inside[..., 0]
            np.testing.assert_array_equal(np.asarray(old)[same], np.asarray(new)[same])
            assert np.all(np.any(np.asarray(old)[~same] != np.asarray(new)[~same], axis=-1))


# ---- the cache ----


@EACH
@pytest.mark.parametrize("borders", [(0, 3, 9, 10, 11, LENGTH), (0, 11, 12, LENGTH)], ids=str)
def test_calls_in_parts_are_one_call(case, borders):
    """The window is shorter than some pieces, and its ring goes round several times."""
    layer, x = make(case), draw()
    cache, parts = layer.empty_cache(2), []
    for start, stop in itertools.pairwise(borders):
        y, cache = apply(layer, x[:, start:stop], cache)
        parts.append(y)
    for row in range(len(x)):
        close(jnp.concatenate(parts, axis=1)[row], numpy_attention(layer, x[row], case))
    np.testing.assert_array_equal(cache.position, LENGTH)
    assert cache.key.shape[:2] == (2, case[1])


@EACH
def test_ragged_rows_go_on_as_each_would_alone(case):
    """What lies behind a row's length is drawn large; a row of length 0 keeps every bit of its cache."""
    layer, tokens = make(case), draw(batch=4)
    pieces = np.array([[5, 0, 2, 1], [5, 5, 0, 3], [1, 5, 3, 0], [2, 3, 5, 5]])
    cache, done, outputs = layer.empty_cache(4), np.zeros(4, int), [[] for _ in range(4)]
    for lengths in pieces:
        x = 30 * np.asarray(draw(7, batch=4, length=5))
        for row, count in enumerate(lengths):
            x[row, :count] = tokens[row, done[row] : done[row] + count]
        held = cache
        y, cache = apply(layer, jnp.asarray(x), held, None, jnp.asarray(lengths, jnp.int32))
        for row, count in enumerate(lengths):
            outputs[row].append(y[row, :count])
            if count == 0:
                jax.tree.map(lambda old, new, row=row: np.testing.assert_array_equal(old[row], new[row]), held, cache)
        done += lengths
        np.testing.assert_array_equal(cache.position, done)
    for row, parts in enumerate(outputs):
        close(jnp.concatenate(parts), numpy_attention(layer, tokens[row, : done[row]], case))


def test_no_tokens_leave_the_cache():
    layer = make(WINDOW)
    _, cache = apply(layer, draw(), layer.empty_cache(2))
    y, same = apply(layer, draw()[:, :0], cache)
    assert y.shape == (2, 0, FEATURES)
    jax.tree.map(np.testing.assert_array_equal, same, cache)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_empty_cache_is_of_the_types_that_calls_return(dtype):
    """So that a cache can be a loop's carry."""
    layer = make(WINDOW, dtype=dtype)
    empty = layer.empty_cache(2)
    form = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert form(jax.eval_shape(lambda x: layer(x, cache=empty)[1], draw())) == form(empty)
    assert empty.key.dtype == dtype


def test_bfloat16_with_float32_parameters():
    case = CASES["whole context"]
    layer, x = make(case, dtype=jnp.bfloat16), draw() / 3
    y, _ = apply(layer, x)
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    want = np.stack([numpy_attention(layer, row, case) for row in x])
    error = np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)
    assert 1e-4 < error < 0.02  # a few times 2^-9, the rounding of one product


# ---- bad options ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(heads=0), "heads is 0; it must be at least 1"),
        (dict(head_dim=0), "head_dim is 0; it must be at least 1"),
        (dict(head_dim=7), "head_dim is 7; it must be even"),
        (dict(window=0), "window is 0; it must be at least 1"),
        (dict(key_value_heads=3), "key_value_heads is 3; it must be 0 or divide heads = 4"),
        (dict(key_value_heads=-1), "key_value_heads is -1"),
        (dict(key_value_heads=8), "key_value_heads is 8"),
    ],
)
def test_a_bad_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**change)


def test_documents_and_a_cache_together_are_refused():
    layer = make(WINDOW)
    with pytest.raises(ValueError, match="segment_ids is given together with a cache; a cache continues one document"):
        apply(layer, draw(), layer.empty_cache(2), jnp.asarray(IDS))
