"""The paper's sequential-MNIST model against a few lines of NumPy written from the paper."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efla_jax.models import LastStateClassifier, LastStateConfig, build

PIXELS, FEATURES = 36, 8
RULES = {
    "EFLA": LastStateConfig(pixels=PIXELS, features=FEATURES),
    "DeltaNet": LastStateConfig(pixels=PIXELS, features=FEATURES, integrator="euler", normalize_keys=True),
    "loose β": LastStateConfig(pixels=PIXELS, features=FEATURES, beta="softplus", pixels_per_token=4),
}
EACH = pytest.mark.parametrize("config", RULES.values(), ids=RULES)
gelu = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)


@functools.cache
def model_of(config):
    """Fresh parameters, the hidden ones enlarged so that gates and keys matter."""
    make = lambda: build(config, rngs=nnx.Rngs(1))
    params = jax.jit(lambda: nnx.state(make(), nnx.Param))()
    large = ("key", "value", "beta", "position")
    enlarge = lambda path, leaf: 6 * leaf if path[0].key in large and "bias" not in str(path) else leaf
    params = jax.tree_util.tree_map_with_path(enlarge, params)
    return nnx.merge(nnx.graphdef(nnx.eval_shape(make)), params)


classify = nnx.jit(lambda model, images: model(images))


def digits(count=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 6, 6)).astype(np.uint8)


def papers_model(model, image, config):
    """Logits of one image [6, 6] of uint8, in float64."""
    weight = lambda name: np.asarray(getattr(model, name).kernel[...], np.float64)
    tokens = image.reshape(-1, config.pixels_per_token) / 255
    x = gelu(tokens @ weight("embed") + np.asarray(model.position[...], np.float64))
    state = np.zeros((FEATURES, FEATURES))
    for x_t in x:
        k, v = x_t @ weight("key"), x_t @ weight("value")
        (logit,) = x_t @ weight("beta") + np.asarray(model.beta.bias[...])
        beta = 1 / (1 + np.exp(-logit)) if config.beta == "sigmoid" else np.log1p(np.exp(logit))
        if config.normalize_keys:
            k, alpha = k / np.linalg.norm(k), beta
        else:
            alpha = (1 - np.exp(-beta * k @ k)) / (k @ k)
        state = state - alpha * np.outer(k, k) @ state + alpha * np.outer(k, v)
    out = state.T @ (x[-1] @ weight("query"))
    normed = (out - out.mean()) / np.sqrt(out.var() + 1e-6)
    normed = normed * np.asarray(model.norm.scale[...]) + np.asarray(model.norm.bias[...])
    return normed @ weight("head") + np.asarray(model.head.bias[...])


@EACH
def test_is_the_papers_model(config):
    model = model_of(config)
    logits = classify(model, jnp.asarray(digits()))
    want = [papers_model(model, image, config) for image in digits()]
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)
    assert np.ptp(want, axis=0).max() > 0.1  # the digits tell in the logits


def test_integers_are_255_times_intensities():
    model = model_of(RULES["EFLA"])
    intensities = jnp.asarray(digits(), jnp.float32) / 255
    want = classify(model, jnp.asarray(digits()))
    np.testing.assert_allclose(classify(model, intensities), want, rtol=1e-5, atol=1e-5)


def test_parameters_are_those_of_the_paper():
    model = nnx.eval_shape(lambda: LastStateClassifier(LastStateConfig(), rngs=nnx.Rngs(0)))
    shapes = {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert shapes == {
        "embed/kernel": (1, 64),
        "position": (784, 64),
        "query/kernel": (64, 64),
        "key/kernel": (64, 64),
        "value/kernel": (64, 64),
        "beta/kernel": (64, 1),
        "beta/bias": (1,),
        "norm/scale": (64,),
        "norm/bias": (64,),
        "head/kernel": (64, 10),
        "head/bias": (10,),
    }


def test_parameters_start_as_in_the_paper():
    make = lambda: LastStateClassifier(LastStateConfig(), rngs=nnx.Rngs(0))
    params = jax.jit(lambda: nnx.state(make(), nnx.Param))()
    assert 0.019 < np.std(params["position"][...]) < 0.021
    bound = math.sqrt(6 / (64 + 64))  # Xavier's, uniform
    for name in ("query", "key", "value"):
        assert 0.98 * bound < np.abs(params[name]["kernel"][...]).max() <= bound
    np.testing.assert_array_equal(params["beta"]["bias"][...], -2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(beta="sigmod"), "beta is 'sigmod'; .*did you mean 'sigmoid'"),
        (dict(integrator="eluer"), "integrator is 'eluer'; .*did you mean 'euler'"),
        (dict(features=0), "features is 0; it must be at least 1"),
        (dict(pixels_per_token=0), "pixels_per_token is 0; it must be at least 1"),
        (dict(pixels_per_token=27), "pixels_per_token is 27; it must divide the 784 pixels"),
    ],
)
def test_a_bad_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LastStateConfig(**change)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype):
    """Parameters and logits stay float32; the logits are those of float32 to a few roundings of the type."""
    low = dataclasses.replace(RULES["EFLA"], dtype=dtype)
    params = nnx.state(model_of(RULES["EFLA"]), nnx.Param)
    model = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: build(low, rngs=nnx.Rngs(1)))), params)
    fresh = jax.eval_shape(lambda: nnx.state(build(low, rngs=nnx.Rngs(1)), nnx.Param))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    got, want = classify(model, digits()), classify(model_of(RULES["EFLA"]), digits())
    assert got.dtype == jnp.float32
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert float(jnp.finfo(dtype).eps) / 16 < error < 16 * float(jnp.finfo(dtype).eps)
