"""The short convolution: against NumPy, causal, and with documents and calls kept apart or joined."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efla_jax.layers import ShortConvolution

BATCH, LENGTH, FEATURES = 2, 11, 3


def draw(seed=0, length=LENGTH):
    return np.random.default_rng(seed).normal(size=(BATCH, length, FEATURES)).astype(np.float32)


apply = nnx.jit(lambda layer, x, history=None, ids=None: layer(x, history=history, segment_ids=ids))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def make(width):
    return ShortConvolution(FEATURES, width, rngs=nnx.Rngs(width))


@pytest.mark.parametrize("width", [1, 2, 4, 16])
def test_is_a_convolution_of_each_channel(width):
    x, layer = draw(), make(width)
    y, history = apply(layer, jnp.asarray(x))
    kernel = np.asarray(layer.kernel[...], np.float64)
    assert kernel.shape == (width, FEATURES)
    assert history.shape == (BATCH, width - 1, FEATURES)
    for row, channel in itertools.product(range(BATCH), range(FEATURES)):
        want = np.convolve(x[row, :, channel].astype(np.float64), kernel[:, channel])[:LENGTH]
        close(y[row, :, channel], want)


@pytest.mark.parametrize("width", [1, 3])
def test_reaches_width_tokens_back_and_none_ahead(width):
    layer = make(width)
    jacobian = jax.jacobian(lambda x: layer(x)[0].sum(axis=(0, 2)))(jnp.asarray(draw()))  # [T, B, S, D]
    reach = np.any(np.asarray(jacobian) != 0, axis=(1, 3))
    to, of = np.indices(reach.shape)
    np.testing.assert_array_equal(reach, (of <= to) & (to - of < width))


def test_kernel_starts_as_a_dense_layer_of_width_inputs_does():
    kernel = np.asarray(ShortConvolution(1000, 4, rngs=nnx.Rngs(0)).kernel[...])
    assert np.all(np.abs(kernel) <= 0.5)
    assert kernel.min() < -0.49
    assert kernel.max() > 0.49
    assert abs(kernel.mean()) < 0.02


def test_width_below_one_is_refused():
    with pytest.raises(ValueError, match="width is 0; it must be at least 1"):
        make(0)


IDS = np.array([[1, 1, 1, 1, 2, 0, 0, 3, 3, 3, 1], [5] * LENGTH], np.int32)  # documents shorter than the width too


@pytest.mark.parametrize("document", [1, 2, 0, 3])
def test_no_bit_of_a_document_enters_another(document):
    """What is inside one document, cotangents too, is replaced: nothing outside changes, forward or backward."""
    layer = make(4)
    convolve = lambda x: layer(x, segment_ids=jnp.asarray(IDS))[0]

    @jax.jit
    def run(x, cotangent):
        y, pullback = jax.vjp(convolve, x)
        return y, pullback(cotangent)[0]

    inside = np.zeros(IDS.shape, bool)
    inside[0, :10] = IDS[0, :10] == document  # the last token is a document of its own with an id seen before
    mix = lambda x, other: np.where(inside[..., None], other, x)
    before = run(draw(0), draw(1))
    after = run(mix(draw(0), draw(2)), mix(draw(1), draw(3)))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(old)[~inside], np.asarray(new)[~inside])
        assert np.all(np.asarray(old)[inside] != np.asarray(new)[inside])


def test_packed_documents_are_convolved_one_by_one():
    layer, x = make(4), jnp.asarray(draw())
    packed, history = apply(layer, x, None, jnp.asarray(IDS))
    borders = [0, 4, 5, 7, 10, LENGTH]
    parts = [apply(layer, x[:1, start:stop]) for start, stop in itertools.pairwise(borders)]
    close(packed[:1], jnp.concatenate([part[0] for part in parts], axis=1))
    np.testing.assert_array_equal(history[0], parts[-1][1][0])
    np.testing.assert_array_equal(history[1], x[1, -3:])


@pytest.mark.parametrize("segments", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("splits", [(6, 3, 1, 1), (1, 2, 1, 7), (1,) * 11, (0, 2, 0, 9)])
def test_calls_in_parts_are_one_call(splits, segments):
    """Parts shorter than the width included. A part's first token goes on with the last document of the part before."""
    layer, x = make(4), jnp.asarray(draw())
    ids = jnp.asarray(IDS) if segments else None
    borders = [0, *itertools.accumulate(splits)]
    # a new document at the first token of a part is the caller's to start, with no history
    history, parts = None, []
    for start, stop in itertools.pairwise(borders):
        part_ids = None if ids is None else ids[:, start:stop]
        if ids is not None and history is not None and 0 < start < LENGTH:
            history = jnp.where((ids[:, start] == ids[:, start - 1])[:, None, None], history, 0)
        y, history = apply(layer, x[:, start:stop], history, part_ids)
        parts.append(y)
    want, want_history = apply(layer, x, None, ids)
    close(jnp.concatenate(parts, axis=1), want)
    np.testing.assert_array_equal(history, want_history)


def test_computes_in_the_type_of_its_input():
    y, history = make(4)(jnp.asarray(draw(), jnp.bfloat16), history=jnp.ones((BATCH, 3, FEATURES)))
    assert y.dtype == history.dtype == jnp.bfloat16
