"""The residual classifier: its tokens, its sizes, dropout, causality up to the mean, and that it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efla_jax.layers import MixerConfig
from efla_jax.models import Classifier, ClassifierConfig, build
from efla_jax.models.classifier import pixel_tokens

MIXER = MixerConfig(heads=2, key_dim=4, value_dim=4, conv_width=2, activation=True)
TINY = ClassifierConfig(pixels=64, pixels_per_token=8, features=16, layers=2, hidden=24, mixer=MIXER)
DROPOUT = dataclasses.replace(TINY, dropout=0.4)


@functools.cache
def model_of(config):
    make = lambda: build(config, rngs=nnx.Rngs(1))
    return nnx.merge(nnx.graphdef(nnx.eval_shape(make)), jax.jit(lambda: nnx.state(make(), nnx.Param))())


classify = nnx.jit(lambda model, images, dropout_key=None: model(images, dropout_key=dropout_key))


def digits(count=3, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (count, 8, 8)), jnp.uint8)


# ---- tokens ----


def test_tokens_keep_the_order_of_the_pixels():
    images = np.arange(2 * 4 * 6, dtype=np.uint8).reshape(2, 4, 6)
    tokens = pixel_tokens(jnp.asarray(images), 3)
    assert tokens.shape == (2, 8, 3)
    np.testing.assert_allclose(tokens.reshape(2, -1), images.reshape(2, -1) / 255, rtol=1e-6)


def test_intensities_stay_as_they_are():
    images = jnp.asarray([[0.0, 0.5], [1.0, 7.5]])
    np.testing.assert_array_equal(pixel_tokens(images, 1)[..., 0], images)


def test_integers_are_255_times_intensities():
    intensities = digits().astype(jnp.float32) / 255
    want = classify(model_of(TINY), digits())
    np.testing.assert_allclose(classify(model_of(TINY), intensities), want, rtol=1e-5, atol=1e-5)


def test_tokens_must_be_whole():
    with pytest.raises(ValueError, match="pixels_per_token is 5; it must divide the 64 pixels"):
        pixel_tokens(digits(), 5)


# ---- the model ----


def test_first_block_sees_no_later_token():
    """Through embedding, positions and blocks, token t is a function of tokens 0 … t alone."""
    model = model_of(TINY)

    def features(image):
        x = model.embed(pixel_tokens(image[None], TINY.pixels_per_token)) + model.position[...][None]
        for block in model.blocks:
            x = block(x, dropout_key=None, partition_spec=None)
        return x[0].sum(axis=-1)

    gradient = jax.jit(jax.jacobian(features))(digits(1)[0].reshape(-1).astype(jnp.float32) / 255)
    reach = np.any(np.asarray(gradient).reshape(8, 8, 8) != 0, axis=-1)
    np.testing.assert_array_equal(reach, np.tril(np.ones((8, 8), bool)))


def test_positions_tell_tokens_apart():
    model, image = model_of(TINY), digits(1)
    assert np.abs(classify(model, image) - classify(model, image[:, ::-1])).max() > 1e-3


@pytest.mark.parametrize("config", [TINY, ClassifierConfig()], ids=["tiny", "default"])
def test_parameter_count(config):
    model = nnx.eval_shape(lambda: Classifier(config, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    e, m = config.features, config.mixer
    keys, values = m.heads * m.key_dim, m.heads * m.value_dim
    mixer = e * (2 * keys + values) + e * m.heads + m.heads + values * e + m.value_dim
    mixer += m.conv_width * (2 * keys + values)
    block = mixer + 3 * e * config.hidden + 2 * e
    edges = (config.pixels_per_token + 1) * e + config.tokens * e + e + (e + 1) * config.classes
    assert count == config.layers * block + edges
    assert len(nnx.state(model, nnx.Not(nnx.Param))) == 0  # all there is to train, save and load


def test_build_makes_the_model_of_the_config():
    assert isinstance(model_of(TINY), Classifier)
    assert classify(model_of(TINY), digits()).shape == (3, 10)


# ---- dropout ----


def test_no_dropout_in_evaluation():
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(DROPOUT, rngs=nnx.Rngs(0))))
    same_parameters = nnx.merge(graph, nnx.state(model_of(TINY), nnx.Param))
    np.testing.assert_array_equal(classify(same_parameters, digits()), classify(model_of(TINY), digits()))


def test_dropout_is_a_function_of_the_key():
    model, keys = model_of(DROPOUT), [jax.random.key(seed) for seed in (0, 0, 1)]
    first, same, other = (np.asarray(classify(model, digits(), key)) for key in keys)
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - classify(model, digits())).max() > 1e-3


def test_every_sublayer_drops_on_its_own(monkeypatch):
    """Two blocks of two sublayers draw four different keys."""
    drawn = []
    original = nnx.Dropout.__call__

    def call(self, inputs, *, deterministic, rngs):
        drawn.append(jax.random.key_data(rngs))
        return original(self, inputs, deterministic=deterministic, rngs=rngs)

    monkeypatch.setattr(nnx.Dropout, "__call__", call)
    model = model_of(DROPOUT)
    keys = jax.jit(lambda key: (model(digits(1), dropout_key=key), jnp.stack(drawn))[1])(jax.random.key(0))
    assert len(np.unique(keys, axis=0)) == len(keys) == 4


# ---- learning ----


def test_learns_random_digits_by_heart():
    images = digits(16)
    labels = jnp.asarray(np.random.default_rng(1).integers(0, 10, 16))
    graph, params = nnx.split(model_of(TINY), nnx.Param)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params):
        def loss_of(params):
            logits = nnx.merge(graph, params)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def step(carry, _):
            params, moments = carry
            loss, gradient = jax.value_and_grad(loss_of)(params)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(params, updates), moments), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), length=120)[1]

    losses = train(params)
    assert losses[0] > 1.5
    assert losses[-1] < 0.01


# ---- bad configs ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: 0}, f"{name} is 0; it must be at least 1") for name in ("features", "layers", "hidden", "classes")),
        (dict(pixels_per_token=0), "pixels_per_token is 0; it must be at least 1"),
        (dict(pixels_per_token=5), "pixels_per_token is 5; it must divide the 784 pixels"),
        *((dict(dropout=p), f"dropout is {p}; it must be in ") for p in (-0.1, 1.0)),
    ],
)
def test_a_bad_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**change)


def test_tokens_of_a_config():
    assert [ClassifierConfig(pixels_per_token=n).tokens for n in (1, 14, 28, 784)] == [784, 56, 28, 1]
