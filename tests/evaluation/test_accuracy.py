"""Loss and accuracy over whole sets, by a model whose logits are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efla_jax.evaluation.accuracy import corruption_accuracy, evaluate
from efla_jax.evaluation.corruptions import LEVELS, corrupt

COUNT, CLASSES = 23, 10


class Brightness(nnx.Module):
    """logits = weight · mean intensity + bias: all of the evaluation can be done by hand."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.weight = nnx.Param(jnp.asarray(20 * rng.normal(size=CLASSES), jnp.float32))
        self.bias = nnx.Param(jnp.asarray(rng.normal(size=CLASSES), jnp.float32))

    def __call__(self, images, *, factor=1.0):
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 255
        mean = images.reshape(images.shape[0], -1).mean(axis=1)
        return factor * (mean[:, None] * self.weight[...][None] + self.bias[...][None])


def data():
    rng = np.random.default_rng(1)
    scale = rng.integers(1, 256, (COUNT, 1, 1))  # digits of different brightness
    images = (rng.uniform(size=(COUNT, 28, 28)) * scale).astype(np.uint8)
    return images, rng.integers(0, CLASSES, COUNT).astype(np.int32)


def by_hand(model, images, labels):
    """(mean loss, accuracy) in NumPy; images in [0, 1]."""
    mean = np.asarray(images, np.float64).reshape(len(labels), -1).mean(axis=1)
    logits = mean[:, None] * np.asarray(model.weight[...], np.float64) + np.asarray(model.bias[...], np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    return losses.mean(), np.mean(logits.argmax(axis=1) == labels)


@pytest.mark.parametrize("batch_size", [1, 7, COUNT - 1, COUNT, 500])
def test_every_record_counts_once(batch_size):
    images, labels = data()
    model = Brightness()
    brightness = images.reshape(COUNT, -1).mean(axis=1) / 255
    logits = np.outer(brightness, model.weight[...]) + np.asarray(model.bias[...])
    right = np.argmax(logits, axis=1)
    labels[:10], labels[-1] = right[:10], right[-1]  # the record that fills up the last batch would be told
    graph, params = nnx.split(model, nnx.Param)
    result = evaluate(graph, params, images, labels, batch_size=batch_size)
    loss, accuracy = by_hand(model, images / 255, labels)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert 0 < accuracy < 1


def test_what_the_call_takes_reaches_the_model():
    images, labels = data()
    graph, params = nnx.split(Brightness(), nnx.Param)
    assert evaluate(graph, params, images, labels, factor=0.0)["loss"] == pytest.approx(np.log(CLASSES), rel=1e-6)


def stacked(models):
    return jax.tree.map(lambda *x: jnp.stack(x), *(nnx.state(model, nnx.Param) for model in models))


def test_corruptions_of_several_models_at_once():
    """Each model of a stack gets what it gets alone, and what corrupting and evaluating by hand gives."""
    images, labels = data()
    models = [Brightness(seed) for seed in range(3)]
    graph, seen = nnx.graphdef(models[0]), []
    together = corruption_accuracy(
        graph, stacked(models), images, labels, batch_size=8, progress=lambda name, level: seen.append((name, level))
    )
    assert seen == [(name, level) for name, levels in LEVELS.items() for level in levels]
    assert {name: np.shape(rows) for name, rows in together.items()} == {n: (len(x), 3) for n, x in LEVELS.items()}
    corrupted = jax.jit(corrupt, static_argnums=0)
    alone = corruption_accuracy(graph, stacked(models[1:2]), images, labels, batch_size=COUNT)
    for name, levels in LEVELS.items():
        np.testing.assert_array_equal(np.asarray(alone[name])[:, 0], np.asarray(together[name])[:, 1])
        for level, row in zip(levels, together[name], strict=True):
            digits = corrupted(name, images.astype(np.float32) / 255, level, np.arange(COUNT))
            np.testing.assert_allclose(row, [by_hand(model, digits, labels)[1] for model in models], atol=1e-9)
    assert len(np.unique(together["intensity"])) > 2
