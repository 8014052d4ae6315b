"""Loss and accuracy over a whole set, every record counted once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from efla_jax.evaluation.corruptions import LEVELS, corrupt

BATCH_SIZE = 500


def _batches(images: np.ndarray, labels: np.ndarray, batch_size: int):
    """Batches of one size: the last is filled up with records of weight 0."""
    for start in range(0, len(labels), batch_size):
        index = np.arange(start, start + batch_size)
        inside = index < len(labels)
        index = np.minimum(index, len(labels) - 1)
        yield images[index], labels[index], index.astype(np.int32), inside.astype(np.float32)


def _sums(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """[summed loss, right answers]."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    right = jnp.argmax(logits, -1) == labels
    return jnp.stack([jnp.sum(losses * weights), jnp.sum(right * weights)])


def evaluate(
    graph: nnx.GraphDef,
    params: Any,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int = BATCH_SIZE,
    **call: Any,
) -> dict[str, float]:
    """{"loss": nats per record, "accuracy"} of one model over images [N, ...] and labels [N]."""

    @jax.jit
    def sums(params, images, labels, weights):
        return _sums(nnx.merge(graph, params)(images, **call), labels, weights)

    parts = [sums(params, x, y, weights) for x, y, _, weights in _batches(images, labels, batch_size)]
    loss, right = np.sum(np.asarray(jax.device_get(parts), np.float64), axis=0) / len(labels)
    return {"loss": float(loss), "accuracy": float(right)}


def corruption_accuracy(
    graph: nnx.GraphDef,
    params: Any,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, list[list[float]]]:
    """Accuracy under every corruption and level, for parameters stacked along a leading axis of models.

    Returns {corruption: [[accuracy of each model] for each of its LEVELS]}; images uint8 [N, 28, 28]. All models
    see the same corrupted digits. One program per corruption serves all of its levels.
    """

    @partial(jax.jit, static_argnums=0)
    def sums(name, params, level, images, labels, index, weights):
        corrupted = corrupt(name, images.astype(jnp.float32) / 255, level, index)
        one = lambda params: _sums(nnx.merge(graph, params)(corrupted), labels, weights)
        return jax.vmap(one)(params)

    accuracies: dict[str, list[list[float]]] = {}
    for name, levels in LEVELS.items():
        accuracies[name] = []
        for level in levels:
            if progress:
                progress(name, level)
            parts = [sums(name, params, level, *batch) for batch in _batches(images, labels, batch_size)]
            right = np.sum(np.asarray(jax.device_get(parts), np.float64), axis=0)[:, 1]
            accuracies[name].append([float(count) / len(labels) for count in right])
    return accuracies
